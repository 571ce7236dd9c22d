//! What becomes of a sandbox when the VMM, the guest or the file server does not do its part.
//!
//! This program is also its own VMM and file server: a symbolic link to it named
//! `vmm-<behaviour>` or `fs-<behaviour>` stands for the real one, which misbehaves as named. The
//! agent answers in the fake VMM's process, over the same sockets as the real one.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod agent;
mod file_server;
mod host;
mod shares;
mod sizing;
mod start;
mod vmm;

use std::{path::PathBuf, process::ExitCode};

use libtest_mimic::{Arguments, Trial};

const SCALE: &str = "CAISSON_TIMEOUT_SCALE";

fn main() -> ExitCode {
    let program = PathBuf::from(std::env::args_os().next().unwrap_or_default());
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    if let Some(behaviour) = name.strip_prefix("vmm-") {
        assert_eq!(std::env::var(SCALE).as_deref(), Ok("0.1"), "the VMM's own");
        vmm::run(behaviour, program.parent().unwrap());
    }
    if let Some(behaviour) = name.strip_prefix("fs-") {
        file_server::run(behaviour);
    }
    // A tenth of the deadlines of bare metal is still long for fakes.
    // SAFETY: no other thread runs yet.
    unsafe { std::env::set_var(SCALE, "0.1") };
    let mut trials = start::trials();
    trials.extend(shares::trials());
    trials.extend(sizing::trials());
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// A test of an async function.
fn trial<F>(name: &str, test: impl FnOnce() -> F + Send + 'static) -> Trial
where
    F: Future<Output = ()>,
{
    Trial::test(name, move || {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap()
            .block_on(test());
        Ok(())
    })
}
