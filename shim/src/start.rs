//! `start`: the pod's socket, and a server behind it.

use std::{
    fs::{self, File},
    io,
    os::{
        fd::OwnedFd,
        unix::{
            fs::{FileTypeExt, PermissionsExt},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use caisson_sandbox::{Config, pod_of, scaled};
use oci_spec::runtime::Spec;
use rustix::{
    fs::FlockOperation,
    net::{
        AddressFamily, SocketAddrUnix, SocketType,
        sockopt::{self, Timeout},
    },
    pipe::PipeFlags,
};

use crate::{arguments::Arguments, bootstrap, error::Error};

/// This program's name.
pub const PROGRAM: &str = "containerd-shim-caisson-v2";

/// Before a socket's path.
const SCHEME: &str = "unix://";

/// Longest to wait for a server whose queue of connections is full.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Longest to wait for others that bind sockets.
const BIND_LIMIT: Duration = Duration::from_secs(10);

/// Sockets of others that each start looks at: each look wakes a server.
const LOOKED_AT: usize = 4;

/// Runs the verb.
///
/// # Errors
/// No bundle, no socket, no server.
pub fn run(mut arguments: Arguments) -> Result<(), Error> {
    let bootstrapped = bootstrap::read(&mut arguments)?;
    let bundle = arguments.bundle()?;
    let pod = pod_in(&bundle)?.unwrap_or_else(|| arguments.id.clone());
    let config = Config::load(None).map_err(caisson_sandbox::Error::from)?;
    let directory = arguments.socket_dir.clone();
    let directory = directory.unwrap_or_else(|| socket_dir(&config));
    let socket = socket_path(&directory, &arguments.namespace, &pod);
    // Somebody else of the pod may have been first.
    let server = if is_served(&socket) {
        None
    } else {
        Some(serve(&config, &arguments, &bundle, &pod, &socket)?)
    };
    let address = format!("{SCHEME}{}", socket.display());
    let file = bundle.join("address");
    fs::write(&file, &address).map_err(Error::file("write", file))?;
    bootstrap::answer(&address, bootstrapped)?;
    let Some(server) = server else { return Ok(()) };
    rustix::io::write(server, &[0]).map(drop).map_err(|error| {
        remove_socket(&config, &socket);
        Error::io("tell the server of the answer: it has died")(error)
    })
}

/// The pod that the bundle's container belongs to, if it belongs to one.
fn pod_in(bundle: &Path) -> Result<Option<String>, Error> {
    Ok(read_spec(bundle)?.and_then(|spec| pod_of(&spec).cloned()))
}

/// The bundle's specification. That of a sandbox (containerd's sandbox API) need not have one.
///
/// # Errors
/// It cannot be read, or is none.
pub fn read_spec(bundle: &Path) -> Result<Option<Spec>, Error> {
    let path = bundle.join("config.json");
    let text = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text.map_err(Error::file("read", &path))?,
    };
    serde_json::from_slice(&text).map(Some).map_err(|error| {
        Error::Invalid(format!(
            "{} is no OCI specification: {error}",
            path.display()
        ))
    })
}

/// Where sockets are whose place nobody has chosen.
pub fn socket_dir(config: &Config) -> PathBuf {
    config.run_dir.join("shim")
}

/// A short name, as socket paths must not exceed 107 bytes (unix(7)).
pub fn socket_path(directory: &Path, namespace: &str, pod: &str) -> PathBuf {
    // FNV-1a, 64 bits: ids are random already, and a clash only makes the start fail.
    let hash = namespace
        .bytes()
        .chain([0])
        .chain(pod.bytes())
        .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
    directory.join(format!("{hash:016x}.sock"))
}

/// Removes the socket, and our own directory for them if that was the last one.
pub fn remove_socket(config: &Config, socket: &Path) {
    let _ = fs::remove_file(socket);
    let directory = socket_dir(config);
    if socket.starts_with(&directory) {
        let _ = fs::remove_dir(&directory).and_then(|()| fs::remove_dir(&config.run_dir));
    }
}

/// The directory of the socket that a bundle's `start` has answered.
pub fn socket_dir_of(bundle: &Path) -> Option<PathBuf> {
    let address = fs::read_to_string(bundle.join("address")).ok()?;
    let path = Path::new(address.strip_prefix(SCHEME)?);
    path.parent().map(Path::to_owned)
}

/// Starts a server. Unless a byte is written to the pipe that is returned, the server ends when it
/// is closed: a caller that this program did not answer, because it was killed, knows of none.
fn serve(
    config: &Config,
    arguments: &Arguments,
    bundle: &Path,
    pod: &str,
    socket: &Path,
) -> Result<OwnedFd, Error> {
    let listener = bind(socket)?;
    let started = spawn(arguments, bundle, pod, listener.into());
    if started.is_err() {
        remove_socket(config, socket);
    }
    started
}

/// Whether somebody listens. A server that is too busy to answer in time is one, too.
fn is_served(socket: &Path) -> bool {
    let connect = || {
        let client = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
        // unix(7) waits for room in the queue for as long.
        sockopt::set_socket_timeout(&client, Timeout::Send, Some(scaled(CONNECT_LIMIT)))?;
        rustix::net::connect(&client, &SocketAddrUnix::new(socket)?)
    };
    matches!(connect(), Ok(()) | Err(rustix::io::Errno::AGAIN))
}

/// Binds the socket for root alone. One that nobody serves is of a server that died; the lock keeps
/// two from finding that at once, and the later from removing what the earlier has made.
fn bind(socket: &Path) -> Result<UnixListener, Error> {
    let fail = || Error::file::<io::Error>("listen on", socket);
    let end = Instant::now() + scaled(BIND_LIMIT);
    while Instant::now() < end {
        let parent = socket.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(parent).map_err(fail())?;
        let Ok(lock) = File::open(parent) else {
            continue; // The last other pod's server has just removed the directory.
        };
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            std::thread::sleep(Duration::from_millis(2));
            continue;
        }
        if fs::symlink_metadata(socket).is_ok_and(|data| data.file_type().is_socket())
            && !is_served(socket)
        {
            let _ = fs::remove_file(socket);
        }
        remove_dead_sockets(parent);
        match UnixListener::bind(socket) {
            Ok(listener) => {
                fs::set_permissions(socket, fs::Permissions::from_mode(0o600)).map_err(fail())?;
                return Ok(listener);
            }
            // As above, after it was opened.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(fail()(error)),
        }
    }
    Err(fail()(io::ErrorKind::TimedOut.into()))
}

/// Looks at a few sockets in the directory, others each time, and removes those that nobody serves.
/// One stays behind where this program or a server is killed while nobody yet, or any more, would
/// call `delete` for it. The caller holds the directory's lock, so that none is being made.
fn remove_dead_sockets(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    let sockets: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| is_ours(path))
        .collect();
    let first = std::process::id() as usize % sockets.len().max(1);
    for socket in sockets
        .iter()
        .cycle()
        .skip(first)
        .take(LOOKED_AT.min(sockets.len()))
    {
        if !is_served(socket) {
            let _ = fs::remove_file(socket);
        }
    }
}

/// Whether the path is one that [`socket_path`] has made: the directory can be containerd's, for
/// all its shims.
fn is_ours(socket: &Path) -> bool {
    let name = socket.file_name().and_then(|name| name.to_str());
    let hash = name.and_then(|name| name.strip_suffix(".sock"));
    hash.is_some_and(|hash| hash.len() == 16 && hash.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

fn spawn(
    arguments: &Arguments,
    bundle: &Path,
    pod: &str,
    listener: OwnedFd,
) -> Result<OwnedFd, Error> {
    let mut command =
        Command::new(std::env::current_exe().map_err(Error::io("find this program"))?);
    command
        .args([
            "-namespace",
            &arguments.namespace,
            "-id",
            pod,
            "-address",
            &arguments.address,
        ])
        .arg("-bundle")
        .arg(bundle);
    if let Some(binary) = &arguments.publish_binary {
        command.arg("-publish-binary").arg(binary);
    }
    if !arguments.ttrpc_address.is_empty() {
        command.args(["-ttrpc-address", &arguments.ttrpc_address]);
    }
    if arguments.debug {
        command.arg("-debug");
    }
    let (known, knows) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
        .map_err(Error::io("make a pipe to the server"))?;
    let child = command
        .current_dir(bundle)
        .stdin(listener)
        .stdout(known)
        .stderr(log_of(bundle)?)
        .spawn()
        .map_err(Error::io("start the server"))?;
    let file = bundle.join("shim.pid");
    fs::write(&file, child.id().to_string()).map_err(Error::file("write", file))?;
    Ok(knows)
}

/// containerd makes a FIFO of that name and reads it; else it is a file.
fn log_of(bundle: &Path) -> Result<Stdio, Error> {
    let path = bundle.join("log");
    let fifo = fs::symlink_metadata(&path).is_ok_and(|data| data.file_type().is_fifo());
    let file = if fifo {
        // Both ways, so that a reader that is late or gone neither blocks nor kills.
        File::options().read(true).write(true).open(&path)
    } else {
        File::options().create(true).append(true).open(&path)
    };
    file.map(Stdio::from).map_err(Error::file("open", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pod_is_in_the_annotations() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(pod_in(bundle.path()).unwrap(), None, "a sandbox");
        let write = |text: &str| fs::write(bundle.path().join("config.json"), text).unwrap();
        write(r#"{"ociVersion":"1.2.0"}"#);
        assert_eq!(pod_in(bundle.path()).unwrap(), None);
        write(r#"{"ociVersion":"1.2.0","annotations":{"io.kubernetes.cri.sandbox-id":"p"}}"#);
        assert_eq!(pod_in(bundle.path()).unwrap().as_deref(), Some("p"));
        write("{");
        assert!(pod_in(bundle.path()).is_err());
    }

    #[test]
    fn a_dead_servers_socket_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let config = Config {
            run_dir: directory.path().join("run"),
            ..Config::default()
        };
        let sockets = socket_dir(&config);
        let socket = socket_path(&sockets, "n", "p");
        assert_ne!(socket, socket_path(&sockets, "np", ""));
        drop(bind(&socket).unwrap());
        let live = bind(&socket).unwrap();
        assert!(bind(&socket).is_err(), "a live one is left alone");
        drop(bind(&socket_path(&sockets, "n", "dead")).unwrap());
        fs::write(sockets.join("containerd's"), "").unwrap();
        let other = bind(&socket_path(&sockets, "n", "other")).unwrap();
        let left = fs::read_dir(&sockets).unwrap().count();
        assert_eq!(left, 3, "dead ones go with the next that is made");
        drop((live, other));
        fs::remove_file(sockets.join("containerd's")).unwrap();
        fs::remove_file(socket_path(&sockets, "n", "other")).unwrap();
        remove_socket(&config, &socket);
        assert!(!config.run_dir.exists());
    }
}
