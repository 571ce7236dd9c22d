//! `caisson-vmm --api-fd N [--uid U --gid G] [--seccomp enforce|log]`: one microVM, controlled
//! through the socket that its parent left open as descriptor N.

use std::{
    os::fd::{FromRawFd, OwnedFd, RawFd},
    process::ExitCode,
};

use caisson_vmm::{
    api::{Server, exit_status},
    jail, logging,
    machine::Stages,
    seccomp::{self, Mode},
};
use caisson_vmm_api::Channel;

const USAGE: &str =
    "usage: caisson-vmm --api-fd N [--uid U --gid G] [--seccomp enforce|log] | --version";
/// Exit status for a wrong command line, as most programs have it.
const USAGE_STATUS: u8 = 2;
/// As of `ExitReason::Internal`.
const INTERNAL_STATUS: u8 = 13;

struct Arguments {
    api_fd: RawFd,
    identity: Option<(u32, u32)>,
    seccomp: Mode,
}

fn main() -> ExitCode {
    let stages = Stages::start();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments == ["--version"] {
        println!("caisson-vmm {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    let arguments = match parse(&arguments) {
        Ok(arguments) => arguments,
        Err(message) => {
            eprintln!("caisson-vmm: {message}\n{USAGE}");
            return ExitCode::from(USAGE_STATUS);
        }
    };
    match serve(&arguments, stages) {
        Ok(status) => std::process::exit(status),
        Err(message) => {
            eprintln!("caisson-vmm: {message}");
            ExitCode::from(INTERNAL_STATUS)
        }
    }
}

fn serve(arguments: &Arguments, stages: Stages) -> Result<i32, String> {
    logging::install().map_err(|error| error.to_string())?;
    let channel = api_channel(arguments.api_fd)?;
    let config = jail::Config {
        api_fd: arguments.api_fd,
        identity: arguments.identity,
    };
    for warning in jail::enter(&config).map_err(|error| error.to_string())? {
        log::warn!("{warning}");
    }
    seccomp::start(arguments.seccomp).map_err(|error| error.to_string())?;
    let server = Server::new(channel, stages).map_err(|error| format!("eventfd: {error}"))?;
    Ok(exit_status(&server.serve()))
}

fn api_channel(fd: RawFd) -> Result<Channel, String> {
    // SAFETY: F_GETFD on any number is harmless, and nothing in this process owns a descriptor
    // above standard error yet.
    let open = unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } == 0;
    if fd <= libc::STDERR_FILENO || !open {
        return Err(format!(
            "--api-fd {fd}: not an open descriptor above 2; the parent has to leave its end of a \
             socket pair open there"
        ));
    }
    // SAFETY: the descriptor is open (checked above) and this is its only owner.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    match rustix::net::sockopt::socket_type(&fd) {
        Ok(rustix::net::SocketType::SEQPACKET) => Ok(fd.into()),
        Ok(_) | Err(_) => Err("--api-fd: not a SOCK_SEQPACKET socket".into()),
    }
}

fn parse(arguments: &[String]) -> Result<Arguments, String> {
    let (mut api_fd, mut uid, mut gid) = (None, None, None);
    let mut seccomp = Mode::Enforce;
    let mut rest = arguments.iter();
    while let Some(flag) = rest.next() {
        let value = rest
            .next()
            .ok_or_else(|| format!("{flag}: a value must follow"))?;
        if flag == "--seccomp" {
            seccomp = match value.as_str() {
                "enforce" => Mode::Enforce,
                "log" => Mode::Log,
                _ => return Err(format!("{flag} {value}: must be enforce or log")),
            };
            continue;
        }
        let number: u32 = value
            .parse()
            .map_err(|_| format!("{flag} {value}: not a number"))?;
        match flag.as_str() {
            "--api-fd" => api_fd = Some(number),
            "--uid" => uid = Some(number),
            "--gid" => gid = Some(number),
            _ => return Err(format!("{flag}: unknown")),
        }
    }
    let api_fd = api_fd.ok_or("--api-fd is missing")?;
    let api_fd = RawFd::try_from(api_fd).map_err(|_| format!("--api-fd {api_fd}: too large"))?;
    let identity = match (uid, gid) {
        (Some(uid), Some(gid)) => Some((uid, gid)),
        (None, None) => None,
        _ => return Err("--uid and --gid only go together".into()),
    };
    Ok(Arguments {
        api_fd,
        identity,
        seccomp,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse_line(line: &str) -> Result<Arguments, String> {
        let arguments: Vec<_> = line.split_whitespace().map(String::from).collect();
        parse(&arguments)
    }

    #[test]
    fn command_lines() {
        let arguments = parse_line("--api-fd 3 --uid 7 --gid 8").unwrap();
        assert_eq!((arguments.api_fd, arguments.identity), (3, Some((7, 8))));
        assert_eq!(arguments.seccomp, Mode::Enforce);
        let arguments = parse_line("--seccomp log --api-fd 3").unwrap();
        assert_eq!(arguments.seccomp, Mode::Log);
        for (line, message) in [
            ("", "--api-fd is missing"),
            ("--api-fd", "--api-fd: a value must follow"),
            ("--api-fd x", "--api-fd x: not a number"),
            ("--api-fd 4294967295", "--api-fd 4294967295: too large"),
            ("--api-fd 3 --uid 1", "--uid and --gid only go together"),
            (
                "--api-fd 3 --seccomp off",
                "--seccomp off: must be enforce or log",
            ),
            ("--fast 1", "--fast: unknown"),
        ] {
            assert_eq!(parse_line(line).err().as_deref(), Some(message));
        }
    }
}
