//! `create`.

use std::{
    fs,
    io::{stderr, stdin, stdout},
    os::{fd::AsFd, unix::net::UnixStream},
    path::Path,
    time::Duration,
};

use caisson_sandbox::{hooks, scaled};
use clap::ArgMatches;
use serde_json::json;

use super::{
    bundle::Bundle,
    cgroup::Place,
    console,
    handshake::{Link, Order},
    process, stand_in,
    state::{self, Container, Record, Root, Status},
};
use crate::{
    arguments::one,
    container::{Identity, start_time},
    error::{Error, ShimCode},
};

/// Until the container's process has its namespaces.
const READY_LIMIT: Duration = Duration::from_secs(15);

/// Until the microVM has booted and holds the container; the shim has shorter limits of its own.
const CREATE_LIMIT: Duration = Duration::from_secs(90);

/// What a process that is given up may take to clean up.
const GIVE_UP_LIMIT: Duration = Duration::from_secs(20);

/// Flags before the verb.
#[derive(Debug, Clone, Copy)]
pub struct Flags {
    /// `linux.cgroupsPath` is systemd's.
    pub systemd_cgroup: bool,
    /// The shim's log says more.
    pub debug: bool,
}

/// Descriptors beyond the standard ones cannot be passed on.
///
/// # Errors
/// They are asked for.
pub fn refuse_descriptors(matches: &ArgMatches) -> Result<(), Error> {
    match one(matches, "preserve-fds") {
        None | Some("0") => Ok(()),
        Some(other) => Err(Error::Usage(format!(
            "--preserve-fds {other}: descriptors of the host cannot cross into a microVM"
        ))),
    }
}

/// Whether a terminal and a socket for it are there together.
///
/// # Errors
/// One without the other.
pub fn check_console(terminal: bool, socket: Option<&str>) -> Result<(), Error> {
    match (terminal, socket) {
        (true, None) => Err(Error::Usage(
            "cannot allocate a terminal: process.terminal is true and --console-socket is missing"
                .to_owned(),
        )),
        (false, Some(_)) => Err(Error::Usage(
            "--console-socket is given and process.terminal is not true".to_owned(),
        )),
        _ => Ok(()),
    }
}

/// Runs the verb.
///
/// # Errors
/// The bundle is none, the id is taken, something cannot be made; nothing is left then.
pub fn run(root: &Root, flags: Flags, matches: &ArgMatches) -> Result<u8, Error> {
    process::keep_descriptors()?;
    refuse_descriptors(matches)?;
    let id = one(matches, "id").unwrap_or_default();
    let bundle = Bundle::load(Path::new(one(matches, "bundle").unwrap_or(".")))?;
    let socket = one(matches, "console-socket");
    check_console(bundle.terminal, socket)?;
    let cgroup = bundle
        .cgroups_path
        .as_deref()
        .map(|path| Place::of(path, flags.systemd_cgroup))
        .transpose()?;
    let container = Container {
        directory: root.claim(id)?,
        record: Record {
            oci_version: bundle.version.clone(),
            bundle: bundle.path.clone(),
            rootfs: bundle.rootfs.clone(),
            annotations: bundle.annotations.clone(),
            cgroup,
            hooks: bundle.hooks.clone(),
            ..Record::new(id)
        },
    };
    let created = create(&container, &bundle, flags, socket.map(Path::new))
        .and_then(|pid| write_pid(matches, pid));
    created.map(|()| 0).map_err(|error| {
        // As `delete --force`, whose errors would hide what went wrong.
        if let Err(more) = super::lifecycle::remove(root, &container) {
            eprintln!("caisson: {more}");
        }
        explained(error)
    })
}

/// For `--pid-file`.
///
/// # Errors
/// It cannot be written.
pub fn write_pid(matches: &ArgMatches, pid: u32) -> Result<(), Error> {
    match one(matches, "pid-file") {
        Some(path) => state::write(Path::new(path), pid.to_string()),
        None => Ok(()),
    }
}

/// Programs that cannot be run are told in words that callers look for.
pub fn explained(error: Error) -> Error {
    match error {
        Error::Shim {
            code: code @ (ShimCode::NotFound | ShimCode::PermissionDenied),
            message,
        } => Error::Shim {
            code,
            message: format!("unable to start container process: {message}"),
        },
        other => other,
    }
}

fn create(
    container: &Container,
    bundle: &Bundle,
    flags: Flags,
    socket: Option<&Path>,
) -> Result<u32, Error> {
    container.save()?;
    let shim_bundle = container.shim_bundle();
    fs::create_dir(&shim_bundle).map_err(Error::file("create", &shim_bundle))?;
    let order = Order {
        directory: container.directory.clone(),
        exec: None,
        terminal: bundle.terminal,
        debug: flags.debug,
        cgroup: container.record.cgroup.clone(),
    };
    let slave = socket
        .map(|socket| console::make(socket, bundle.console_size))
        .transpose()?;
    let (stdin, stdout, stderr) = (stdin(), stdout(), stderr());
    let (monitors, stand_ins) = UnixStream::pair().map_err(Error::io("make a socket"))?;
    let other = monitors.as_fd();
    let mut link = match &slave {
        Some(slave) => Link::start(&order, &[other, slave.as_fd()])?,
        None => Link::start(
            &order,
            &[other, stdin.as_fd(), stdout.as_fd(), stderr.as_fd()],
        )?,
    };
    // From here on the process holds them alone.
    drop((slave, monitors));
    drive(&mut link, container, bundle, stand_ins).inspect_err(|_| {
        link.give_up(scaled(GIVE_UP_LIMIT));
    })
}

fn drive(
    link: &mut Link,
    container: &Container,
    bundle: &Bundle,
    socket: UnixStream,
) -> Result<u32, Error> {
    link.next(scaled(READY_LIMIT))?;
    let start = stand_in::Start {
        directory: container.directory.clone(),
        own_network: bundle.own_network,
        cgroup: container.record.cgroup.clone(),
    };
    let pid = stand_in::start(&start, socket.into(), scaled(READY_LIMIT))?;
    let identity = Identity {
        pid,
        start_time: start_time(pid).unwrap_or(0),
    };
    state::write(
        &container.directory.join("process.json"),
        json!(identity).to_string(),
    )?;
    let network = bundle.own_network.then(|| format!("/proc/{pid}/ns/net"));
    let cgroup = container.record.cgroup.as_ref();
    let config = bundle.for_shim(
        network.as_deref().map(Path::new),
        cgroup.map(|cgroup| cgroup.path.as_path()),
    );
    state::write(
        &container.shim_bundle().join("config.json"),
        config.to_string(),
    )?;
    let state = container.state(Status::Creating);
    hooks::run("createRuntime", &bundle.hooks.create, &state)?;
    link.go()?;
    link.next(scaled(CREATE_LIMIT))?;
    Ok(pid)
}
