//! End-to-end tests: every verb and flag of `caisson`, and everything that can go wrong, each in
//! a real microVM. Run by `tests/run`.
#![forbid(unsafe_code)]
#![allow(
    clippy::panic,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by panicking"
)]

mod bad_images;
mod bad_input;
mod check;
mod configuration;
mod containerd;
mod copy;
mod crash;
mod cri;
mod deploy;
mod docker;
mod exec;
mod huge_pages;
mod images;
mod lifecycle;
mod load;
mod logs;
mod network;
mod observability;
mod oci;
mod podman;
mod registry;
mod rootless;
mod run_flags;
mod run_network;
mod run_resources;
mod run_volumes;
mod shim;
mod sizing;
mod storage;
mod terminal;
mod vmm;
mod volumes;
