//! A microVM put together.
