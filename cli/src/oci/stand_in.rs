//! The process on the host whose id a container is known by. Callers do to it what they would do to
//! the container's first process, and so it looks like that one from outside: they wait for its
//! exit code, signal it, read its cgroup, put interfaces into its network namespace, and enter its
//! mount and PID namespaces (`podman cp`, `podman top`) — which therefore must not be the host's.
//! Its root is the container's; what it is told to do comes from the container's monitor.

use std::{
    fs::File,
    io::{self, BufRead, BufReader, Read, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    time::Duration,
};

use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, openat, openat2, statat},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
        OpenTreeFlags, UnmountFlags, fsconfig_create, fsmount, fsopen, mount_change, move_mount,
        open_tree, unmount,
    },
    process::{Signal, pivot_root},
    thread::UnshareFlags,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use signal_hook::iterator::Signals;

use super::{
    cgroup::Place,
    handshake::{receive, send},
    process,
    state::{self, shim_bundle},
};
use crate::error::Error;

/// The hidden verb.
pub const VERB: &str = "oci-process";

/// [`Start`], in the container's directory.
const FILE: &str = "start.json";

/// 128 + SIGKILL: nobody can say how the container ended.
const KILLED: u8 = 137;

/// Signals that are meant for the process in the guest.
const PASSED: [i32; 7] = [1, 2, 3, 10, 12, 15, 18];

/// What the monitor says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Task {
    /// The container is there: take its root.
    Enter,
    /// It has ended with this code: so do you.
    End(u8),
}

/// What it answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// It has the container's root, or could not take it.
    Entered(Result<(), String>),
    /// It got a signal.
    Signal(u32),
}

/// How it begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// The container's.
    pub directory: PathBuf,
    /// It makes a network namespace.
    pub own_network: bool,
    /// Its cgroup, which is there.
    pub cgroup: Option<Place>,
}

/// What its starter hears.
#[derive(Debug, Serialize, Deserialize)]
enum Report {
    /// Its id.
    Pid(u32),
    /// It has its namespaces, or could not make them.
    Ready(Result<(), String>),
}

/// Starts it; `socket` leads to the monitor. Its id.
///
/// # Errors
/// A namespace cannot be made, or its cgroup not be entered.
pub fn start(start: &Start, socket: OwnedFd, limit: Duration) -> Result<u32, Error> {
    let program = std::env::current_exe().map_err(Error::io("find this program"))?;
    let (ours, theirs) = UnixStream::pair().map_err(Error::io("make a socket"))?;
    state::write(&start.directory.join(FILE), json!(start).to_string())?;
    let mut first = Command::new(&program)
        .arg(VERB)
        .arg(&start.directory)
        .stdin(socket)
        .stdout(OwnedFd::from(theirs))
        .stderr(Stdio::null())
        .current_dir("/")
        .spawn()
        .map_err(Error::file("run", program))?;
    let _ = first.wait();
    ours.set_read_timeout(Some(limit))
        .map_err(Error::io("prepare a socket"))?;
    let hear = || {
        receive::<Report>(&ours).map_err(|error| {
            Error::State(format!("the container's process did not start: {error}"))
        })
    };
    let mut pid = 0;
    loop {
        match hear()? {
            Report::Pid(number) => pid = number,
            Report::Ready(Ok(())) if pid != 0 => return Ok(pid),
            Report::Ready(Ok(())) => {}
            Report::Ready(Err(message)) => return Err(Error::State(message)),
        }
    }
}

/// Runs the hidden verb: first as a process that makes a PID namespace and leaves its first
/// process behind, then as that.
pub fn run(words: &[String]) -> ExitCode {
    let (Some(directory), stays) = (words.first(), words.len() > 1) else {
        return usage();
    };
    let file = Path::new(directory).join(FILE);
    let Some(start) = std::fs::read(file)
        .ok()
        .and_then(|text| serde_json::from_slice::<Start>(&text).ok())
    else {
        return usage();
    };
    let Ok(report) = socket(io::stdout().as_fd()) else {
        return usage();
    };
    if !stays {
        let left = leave_behind(directory).and_then(|pid| send(&report, &Report::Pid(pid)));
        if let Err(error) = left {
            let _ = send(&report, &Report::Ready(Err(error.to_string())));
            return ExitCode::FAILURE;
        }
        return ExitCode::SUCCESS;
    }
    let prepared = prepare(&start);
    let failed = prepared.is_err();
    let _ = send(
        &report,
        &Report::Ready(prepared.map_err(|error| error.to_string())),
    );
    drop(report);
    if failed {
        return ExitCode::FAILURE;
    }
    ExitCode::from(stay(&start).unwrap_or(KILLED))
}

fn usage() -> ExitCode {
    eprintln!("caisson: {VERB} is started by `caisson create`");
    ExitCode::FAILURE
}

fn socket(fd: rustix::fd::BorrowedFd<'_>) -> io::Result<UnixStream> {
    let socket = UnixStream::from(fd.try_clone_to_owned()?);
    socket.peer_addr()?;
    Ok(socket)
}

fn leave_behind(directory: &str) -> Result<u32, Error> {
    process::unshare(UnshareFlags::NEWPID)?;
    let program = std::env::current_exe().map_err(Error::io("find this program"))?;
    Command::new(&program)
        .args([VERB, directory, "stay"])
        .spawn()
        .map(|child| child.id())
        .map_err(Error::file("run", program))
}

fn prepare(start: &Start) -> Result<(), Error> {
    let _ = rustix::process::setsid();
    if start.own_network {
        process::unshare(UnshareFlags::NEWNET)?;
    }
    if let Some(cgroup) = &start.cgroup {
        cgroup.join()?;
    }
    // The starter waits for the end of it.
    let null = File::options()
        .write(true)
        .open("/dev/null")
        .map_err(Error::file("open", "/dev/null"))?;
    rustix::stdio::dup2_stdout(&null).map_err(Error::io("leave standard output"))?;
    Ok(())
}

/// Does what the monitor says. Without one the container is lost.
fn stay(start: &Start) -> io::Result<u8> {
    let monitor = socket(io::stdin().as_fd())?;
    loop {
        match receive::<Task>(&monitor)? {
            Task::End(code) => return Ok(code),
            Task::Enter => {
                let entered = enter(&start.directory).map_err(|error| error.to_string());
                let monitor = monitor.try_clone()?;
                send(&monitor, &Answer::Entered(entered)).map_err(io::Error::other)?;
                // Threads come last: each would keep the namespaces it was started in.
                let mut signals = Signals::new(PASSED)?;
                std::thread::spawn(move || {
                    for number in &mut signals {
                        let _ = send(&monitor, &Answer::Signal(number.unsigned_abs()));
                    }
                });
            }
        }
    }
}

/// Takes the container's root, with what of the host is mounted in it.
fn enter(directory: &Path) -> Result<(), Error> {
    let file = shim_bundle(directory).join("config.json");
    let text = std::fs::read(&file).map_err(Error::file("read", &file))?;
    let config: Value = serde_json::from_slice(&text)
        .map_err(|error| Error::file("read", &file)(io::Error::other(error)))?;
    let rootfs = PathBuf::from(config["root"]["path"].as_str().unwrap_or_default());
    process::unshare(UnshareFlags::NEWNS)?;
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .map_err(Error::io("keep mounts to itself"))?;
    let failed = || Error::file::<rustix::io::Errno>("take the root", &rootfs);
    let clone = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(CWD, &rootfs, clone).map_err(failed())?;
    move_mount(
        &tree,
        "",
        CWD,
        &rootfs,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .map_err(failed())?;
    let root = openat(
        CWD,
        &rootfs,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(failed())?;
    for mount in config["mounts"].as_array().into_iter().flatten() {
        // What is missing is missing for those who look, not for the container.
        let _ = attach(&root, mount);
    }
    rustix::process::fchdir(&root).map_err(failed())?;
    // pivot_root(2): with the old root on top of the new one, which is then lifted off.
    pivot_root(".", ".").map_err(failed())?;
    unmount(".", UnmountFlags::DETACH).map_err(failed())?;
    rustix::process::chdir("/").map_err(failed())
}

/// Mounts a host directory, or this PID namespace's /proc, where the container has it.
fn attach(root: &OwnedFd, mount: &Value) -> rustix::io::Result<()> {
    let kind = mount["type"].as_str().unwrap_or_default();
    let has = |option: &str| {
        mount["options"]
            .as_array()
            .into_iter()
            .flatten()
            .any(|one| one == option)
    };
    let source = if kind == "proc" {
        let context = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_create(&context)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NOEXEC
            | MountAttrFlags::MOUNT_ATTR_NODEV;
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?
    } else if kind == "bind" || has("bind") || has("rbind") {
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        if has("rbind") {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        open_tree(CWD, mount["source"].as_str().unwrap_or_default(), flags)?
    } else {
        return Ok(());
    };
    // The image's links lead nowhere outside.
    let target = openat2(
        root,
        mount["destination"].as_str().unwrap_or_default(),
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )?;
    statat(&target, "", AtFlags::EMPTY_PATH)?;
    move_mount(
        &source,
        "",
        &target,
        "",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )
}

/// The monitor's end.
pub struct StandIn {
    socket: UnixStream,
}

impl StandIn {
    /// On the socket whose other end the process has.
    pub fn new(socket: OwnedFd) -> Self {
        Self {
            socket: socket.into(),
        }
    }

    /// Has it take the container's root.
    ///
    /// # Errors
    /// It could not, or is gone.
    pub fn enter(&self, limit: Duration) -> Result<(), Error> {
        let gone =
            |error: io::Error| Error::State(format!("the container's process was ended: {error}"));
        self.socket.set_read_timeout(Some(limit)).map_err(gone)?;
        send(&self.socket, &Task::Enter)?;
        let answer = receive(&self.socket).map_err(gone)?;
        self.socket.set_read_timeout(None).map_err(gone)?;
        match answer {
            Answer::Entered(Ok(())) | Answer::Signal(_) => Ok(()),
            Answer::Entered(Err(message)) => Err(Error::State(message)),
        }
    }

    /// Signals that it gets; SIGKILL when it has died.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn signals(&self) -> Result<tokio::sync::mpsc::Receiver<u32>, Error> {
        let socket = self
            .socket
            .try_clone()
            .map_err(Error::io("copy a socket"))?;
        let (sender, receiver) = tokio::sync::mpsc::channel(16);
        std::thread::Builder::new()
            .name("signals".to_owned())
            .stack_size(128 << 10)
            .spawn(move || {
                let mut lines = BufReader::new(socket.take(u64::MAX)).lines();
                while let Some(Ok(line)) = lines.next() {
                    if let Ok(Answer::Signal(number)) = serde_json::from_str(&line)
                        && sender.blocking_send(number).is_err()
                    {
                        return;
                    }
                }
                let kill = u32::try_from(Signal::KILL.as_raw()).unwrap_or(9);
                let _ = sender.blocking_send(kill);
            })
            .map_err(Error::io("start a thread"))?;
        Ok(receiver)
    }

    /// Ends it with the container's exit code.
    pub fn end(self, code: u8) {
        // It may have been killed.
        let _ = send(&self.socket, &Task::End(code));
        let _ = (&self.socket).flush();
    }
}
