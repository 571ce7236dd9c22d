//! What is particular to x86_64.
