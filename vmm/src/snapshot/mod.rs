//! Saved state of a microVM.
