//! The agent: PID 1 of a Caisson guest.
//!
//! It mounts what a Linux user space needs, listens on vsock for the host, and
//! turns OCI specifications into containers. The same program, run as
//! `caisson-agent container-init`, is the short-lived process that becomes a
//! container's first process ([`container::init`]), and as `caisson-agent pod-init`
//! the one that keeps a pod's PID namespace ([`container::pod_init`]).

mod boot;
mod cgroup;
mod container;
mod device;
mod events;
mod failure;
mod forward;
mod huge_pages;
mod kmsg;
mod network;
mod oci;
mod oom;
mod readiness;
mod reaper;
mod resolver;
mod resources;
mod rpc;
mod sandbox;
mod stdio;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some(container::init::VERB) => container::init::main(arguments),
        Some(container::pod_init::VERB) => container::pod_init::main(),
        Some("--version") => {
            println!("caisson-agent {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        // The kernel passes words of its command line that it does not know.
        _ if rustix::process::getpid().is_init() => agent(),
        _ => {
            eprintln!(
                "caisson-agent: this is the init of a Caisson guest; it has nothing to do here"
            );
            ExitCode::from(2)
        }
    }
}

/// Runs as PID 1. Returns only when the agent cannot work; the kernel then panics, which
/// is how the host learns of it.
fn agent() -> ExitCode {
    let mut stages = boot::Stages::default();
    stages.reached("agent_start");
    kmsg::init();
    if let Err(failure) = boot::mount_all() {
        log::error!("cannot set up the guest: {failure}");
        return ExitCode::FAILURE;
    }
    stages.reached("mounts");
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            log::error!("cannot start the event loop: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(rpc::serve(stages)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            log::error!("{failure}");
            ExitCode::FAILURE
        }
    }
}
