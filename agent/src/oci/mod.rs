//! Parts of the OCI runtime specification that are translation and nothing else.

pub mod capabilities;
pub mod seccomp;
pub mod user;
