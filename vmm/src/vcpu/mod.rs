//! Threads that run virtual processors.
