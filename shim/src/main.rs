//! `containerd-shim-caisson-v2`: one process per pod between containerd (or the
//! `caisson` command) and a microVM.
//!
//! | verb | what it does |
//! |---|---|
//! | `start` | makes the pod's socket and a server behind it, or finds the one there is; prints the address: [`bootstrap`] |
//! | `delete` | removes what a server that died has left; prints a `DeleteResponse` |
//! | `-info` | prints a `RuntimeInfo` |
//! | none | is that server: [`server`] |
#![forbid(unsafe_code)]

mod arguments;
mod bootstrap;
mod delete;
mod error;
mod events;
mod figures;
mod hooks;
mod info;
mod logger;
mod metrics;
mod options;
mod pod;
mod process;
mod rootfs;
mod sandbox;
mod server;
mod service;
mod start;
mod stdio;
mod tasks;

use std::process::ExitCode;

use arguments::{Arguments, Verb};

fn main() -> ExitCode {
    let arguments = match Arguments::parse(std::env::args().skip(1)) {
        Ok(arguments) => arguments,
        Err(error) => return fail(&error),
    };
    let result = match arguments.verb {
        Verb::Version => {
            println!(
                "containerd-shim-caisson-v2:\n  Version: {}",
                env!("CARGO_PKG_VERSION")
            );
            Ok(())
        }
        Verb::Info => info::run(),
        Verb::Start => start::run(arguments),
        Verb::Delete => delete::run(&arguments),
        Verb::Serve => server::run(arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&error),
    }
}

fn fail(error: &error::Error) -> ExitCode {
    eprintln!("containerd-shim-caisson-v2: {error}");
    ExitCode::FAILURE
}
