//! `caisson-fs`: serves the root of its jail to one guest by vhost-user-fs.
//!
//! Its parent starts it with [`caisson_fs::FileServer::spawn`]. It ends when
//! the VMM closes the vhost-user connection and when its parent dies.

mod filter;
mod jail;
mod policy;
mod serve;

use std::{
    io::{Read, Write},
    os::{
        fd::{FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
    process::ExitCode,
};

const USAGE: &str = "usage: caisson-fs --listener-fd N --lifeline-fd N

Serves a guest's shared directories. Started by the Caisson runtime, not by hand.
  --listener-fd N   listening unix socket with the VMM's connection waiting
  --lifeline-fd N   unix stream to the parent: \"ready\" or an error is written to it,
                    and the server ends when it is closed
  --version         print the version";

/// Exit status of a wrong call.
const USAGE_STATUS: u8 = 2;

fn main() -> ExitCode {
    let mut numbers = [None; 2];
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let slot = match argument.as_str() {
            "--version" => {
                println!("caisson-fs {}", env!("CARGO_PKG_VERSION"));
                return ExitCode::SUCCESS;
            }
            "--help" => {
                println!("{USAGE}");
                return ExitCode::SUCCESS;
            }
            "--listener-fd" => &mut numbers[0],
            "--lifeline-fd" => &mut numbers[1],
            other => return wrong_call(&format!("unknown argument {other:?}")),
        };
        let number = arguments.next().and_then(|text| text.parse().ok());
        match number.filter(|number: &RawFd| *number > 2) {
            Some(number) => *slot = Some(number),
            None => return wrong_call(&format!("{argument} needs the number of a descriptor")),
        }
    }
    let [Some(listener), Some(lifeline)] = numbers else {
        return wrong_call("--listener-fd and --lifeline-fd are needed");
    };
    if listener == lifeline || !is_open(listener) || !is_open(lifeline) {
        return wrong_call("the descriptors must be open and different");
    }
    // SAFETY: the number was checked to be open, and nothing else in this process owns it: the
    // parent handed it over.
    let listener = unsafe { OwnedFd::from_raw_fd(listener) };
    // SAFETY: as above.
    let lifeline = unsafe { OwnedFd::from_raw_fd(lifeline) };
    run(listener, UnixStream::from(lifeline))
}

fn run(listener: OwnedFd, mut lifeline: UnixStream) -> ExitCode {
    serve::log_to_stderr();
    match serve::prepare(listener, &lifeline) {
        Ok(server) => {
            let watched = lifeline
                .write_all(b"ready\n")
                .and_then(|()| end_with(lifeline));
            if let Err(error) = watched {
                log::error!("lifeline: {error}");
                return ExitCode::FAILURE;
            }
            server.run()
        }
        Err(error) => {
            log::error!("{error}");
            // The parent may be gone; there is nobody else to tell.
            let _ = writeln!(lifeline, "{error}");
            ExitCode::FAILURE
        }
    }
}

/// Ends the process when the parent closes its end.
fn end_with(mut lifeline: UnixStream) -> std::io::Result<()> {
    let watch = move || {
        let mut byte = [0];
        loop {
            match lifeline.read(&mut byte) {
                Ok(count) if count > 0 => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                _ => std::process::exit(0),
            }
        }
    };
    std::thread::Builder::new()
        .name("lifeline".into())
        .stack_size(64 << 10)
        .spawn(watch)
        .map(drop)
}

fn is_open(fd: RawFd) -> bool {
    // SAFETY: F_GETFD of any number is harmless.
    unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
}

fn wrong_call(what: &str) -> ExitCode {
    eprintln!("caisson-fs: {what}\n{USAGE}");
    ExitCode::from(USAGE_STATUS)
}
