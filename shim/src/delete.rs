//! `delete`: after the server has died, whatever the reason, or when containerd has lost it.

use std::{
    fs,
    io::Write,
    path::Path,
    time::{Duration, Instant},
};

use caisson_sandbox::{Config, scaled};
use containerd_shim_protos::{
    api::DeleteResponse,
    protobuf::{Message, MessageField, well_known_types::timestamp::Timestamp},
};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::{arguments::Arguments, error::Error, hooks::HostHooks, rootfs, server, start};

/// 128 + SIGKILL: nobody saw how the container ended.
const KILLED: u32 = 137;

/// From SIGTERM to SIGKILL: a server that lives cleans up by itself.
const TERM_LIMIT: Duration = Duration::from_secs(3);

/// From SIGKILL to giving up.
const KILL_LIMIT: Duration = Duration::from_secs(2);

/// Runs the verb.
///
/// # Errors
/// Something could not be removed.
pub fn run(arguments: &Arguments) -> Result<(), Error> {
    let config = Config::load(None).map_err(caisson_sandbox::Error::from)?;
    let bundle = arguments.bundle()?;
    end_server(arguments, &bundle)?;
    caisson_sandbox::cleanup(
        &config,
        &server::sandbox_id(&arguments.namespace, &arguments.id),
    )?;
    rootfs::release(&bundle)?;
    run_poststop_hooks(&bundle, &arguments.id);
    let sockets = start::socket_dir_of(&bundle).unwrap_or_else(|| start::socket_dir(&config));
    let socket = start::socket_path(&sockets, &arguments.namespace, &arguments.id);
    start::remove_socket(&config, &socket);
    let response = DeleteResponse {
        exit_status: KILLED,
        exited_at: MessageField::some(Timestamp::now()),
        ..Default::default()
    };
    let bytes = response
        .write_to_bytes()
        .map_err(|error| Error::io("encode the answer")(std::io::Error::other(error)))?;
    std::io::stdout()
        .write_all(&bytes)
        .map_err(Error::io("write the answer"))
}

/// Of a bundle that can still be read.
fn run_poststop_hooks(bundle: &Path, id: &str) {
    let spec = fs::read(bundle.join("config.json"))
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok());
    let Some(hooks) = spec.and_then(|spec| HostHooks::of(&spec, id, bundle).ok()) else {
        return;
    };
    for failure in hooks.run_poststop() {
        eprintln!("{failure}");
    }
}

/// Ends the server of this container's pod if it still runs: without its socket and its microVM it
/// is of no use. A container that is not its pod's first has no server of its own to end.
fn end_server(arguments: &Arguments, bundle: &Path) -> Result<(), Error> {
    let pid = fs::read_to_string(bundle.join("shim.pid"))
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .and_then(Pid::from_raw);
    let Some(pid) = pid else { return Ok(()) };
    // Held before it is looked at, so that a signal cannot go to a later process of the same id.
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else {
        return Ok(());
    };
    let serves = || {
        fs::read(format!("/proc/{pid}/cmdline", pid = pid.as_raw_nonzero()))
            .is_ok_and(|line| is_server_of(&line, arguments))
    };
    for (signal, limit) in [(Signal::TERM, TERM_LIMIT), (Signal::KILL, KILL_LIMIT)] {
        if !serves() {
            return Ok(());
        }
        let _ = pidfd_send_signal(&process, signal);
        let end = Instant::now() + scaled(limit);
        // The command line of a process that has ended is empty.
        while serves() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
    if serves() {
        return Err(Error::FailedPrecondition(format!(
            "the shim of {} (process {}) does not die",
            arguments.id,
            pid.as_raw_nonzero()
        )));
    }
    Ok(())
}

/// Whether a command line (of /proc) is that of the server [`start`] makes.
fn is_server_of(line: &[u8], arguments: &Arguments) -> bool {
    let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
    let has = |flag: &str, value: &str| {
        words
            .windows(2)
            .any(|pair| pair == [flag.as_bytes(), value.as_bytes()])
    };
    has("-namespace", &arguments.namespace)
        && has("-id", &arguments.id)
        && words
            .first()
            .is_some_and(|program| program.ends_with(start::PROGRAM.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(id: &str) -> Arguments {
        let words = ["-namespace", "n", "-id", id, "delete"];
        Arguments::parse(words.into_iter().map(str::to_owned)).unwrap()
    }

    #[test]
    fn servers_are_known_by_their_command_line() {
        let line = b"/usr/bin/containerd-shim-caisson-v2\0-namespace\0n\0-id\0pod\0-address\0\0";
        assert!(is_server_of(line, &arguments("pod")));
        assert!(!is_server_of(line, &arguments("container")));
        assert!(!is_server_of(b"", &arguments("pod")));
        let other = b"/usr/bin/grep\0-namespace\0n\0-id\0pod\0";
        assert!(!is_server_of(other, &arguments("pod")));
    }

    #[test]
    fn another_process_of_that_id_lives() {
        let bundle = tempfile::tempdir().unwrap();
        fs::write(
            bundle.path().join("shim.pid"),
            std::process::id().to_string(),
        )
        .unwrap();
        end_server(&arguments("pod"), bundle.path()).unwrap();
        fs::write(bundle.path().join("shim.pid"), "no number").unwrap();
        end_server(&arguments("pod"), bundle.path()).unwrap();
    }
}
