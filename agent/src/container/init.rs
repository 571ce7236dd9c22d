//! The process that becomes a container's: `caisson-agent container-init SYNC REQUEST`.
//!
//! Single-threaded, so that namespaces and credentials are those of the whole
//! process. It runs in two steps: the first enters or makes the PID namespace
//! and forks; the second, a member of that namespace, does the rest and executes
//! the program. The first one's end makes the second a child of PID 1, the agent.

use std::{
    fs::File,
    io::Read,
    os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    process::ExitCode,
};

use oci_spec::runtime::{LinuxNamespaceType, Spec};
use rustix::{
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags},
    process::{DumpableBehavior, Pid, PidfdFlags, pidfd_open},
    thread::{ThreadNameSpaceType, UnshareFlags, move_into_thread_name_spaces},
};

use super::{
    exec, hooks,
    request::{ContainerRequest, ExecRequest, MAX_PACKET, Report, Request, START},
    rootfs, terminal,
};
use crate::{
    cgroup,
    failure::{During, Failure, Kind, Result},
};

/// First argument of the program when it is this process.
pub const VERB: &str = "container-init";

/// The sync socket and what is said over it.
pub struct Sync(OwnedFd);

impl Sync {
    /// Sends `report`.
    ///
    /// # Errors
    /// The agent is gone.
    pub fn report(&self, report: &Report) -> Result<()> {
        self.send(report, &[])
    }

    /// Sends the terminal's master.
    ///
    /// # Errors
    /// The agent is gone.
    pub fn terminal(&self, master: BorrowedFd<'_>) -> Result<()> {
        self.send(&Report::Terminal, &[master])
    }

    fn send(&self, report: &Report, fds: &[BorrowedFd<'_>]) -> Result<()> {
        let mut bytes = serde_json::to_vec(report)
            .map_err(|error| Failure::internal(format!("cannot encode a report: {error}")))?;
        if bytes.len() > MAX_PACKET {
            let short =
                Failure::internal("a container's init process failed with an endless message");
            bytes = serde_json::to_vec(&Report::Failed(short)).unwrap_or_default();
        }
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(Failure::internal("no room for the terminal's descriptor"));
        }
        let data = [std::io::IoSlice::new(&bytes)];
        rustix::io::retry_on_intr(|| {
            rustix::net::sendmsg(&self.0, &data, &mut control, SendFlags::NOSIGNAL)
        })
        .during(|| "report to the agent".to_owned())
        .map(drop)
    }

    /// Waits until the agent says start. False: it hung up, the container is not wanted any more.
    fn wait_for_start(&self) -> Result<bool> {
        let mut buffer = [0; 16];
        let (_, length) = rustix::io::retry_on_intr(|| {
            rustix::net::recv(&self.0, &mut buffer[..], rustix::net::RecvFlags::empty())
        })
        .during(|| "wait for the agent".to_owned())?;
        Ok(&buffer[..length] == START)
    }
}

/// Runs the process; comes back only when it failed, which the agent has been told.
pub fn main(mut arguments: impl Iterator<Item = String>) -> ExitCode {
    let mut descriptor = || {
        let number: RawFd = arguments
            .next()?
            .parse()
            .ok()
            .filter(|number| *number > 2)?;
        // SAFETY: the agent, our only caller, made this descriptor for us alone and passes its
        // number; nothing else in this fresh process owns it.
        Some(unsafe { OwnedFd::from_raw_fd(number) })
    };
    let (Some(sync), Some(request)) = (descriptor(), descriptor()) else {
        return ExitCode::from(2);
    };
    let sync = Sync(sync);
    for fd in [sync.0.as_fd(), request.as_fd()] {
        let _ = rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC);
    }
    match run(&sync, File::from(request)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // When the agent does not listen any more there is nobody to tell.
            let _ = sync.report(&Report::Failed(failure));
            ExitCode::FAILURE
        }
    }
}

fn run(sync: &Sync, mut request: File) -> Result<()> {
    let mut text = Vec::new();
    request
        .read_to_end(&mut text)
        .during(|| "read the request".to_owned())?;
    drop(request);
    let request: Request = serde_json::from_slice(&text)
        .map_err(|error| Failure::invalid(format!("malformed container specification: {error}")))?;
    drop(text);
    match request {
        Request::Container(request) => container(sync, *request),
        Request::Exec(request) => exec_in(sync, *request),
    }
}

fn container(sync: &Sync, request: ContainerRequest) -> Result<()> {
    // Before any namespace, so that the cgroup namespace's root is it.
    cgroup::enter(&request.cgroup, None)?;
    let mut own = UnshareFlags::NEWNS;
    let mut pid = false;
    for namespace in request
        .spec
        .linux()
        .iter()
        .flat_map(|l| l.namespaces().iter().flatten())
    {
        if let Some(path) = namespace.path() {
            return Err(Failure::invalid(format!(
                "cannot join the namespace {}: a container's namespaces live in its guest",
                path.display()
            )));
        }
        match namespace.typ() {
            LinuxNamespaceType::Pid => pid = true,
            LinuxNamespaceType::Uts => own |= UnshareFlags::NEWUTS,
            LinuxNamespaceType::Ipc => own |= UnshareFlags::NEWIPC,
            LinuxNamespaceType::Cgroup => own |= UnshareFlags::NEWCGROUP,
            LinuxNamespaceType::Network => own |= UnshareFlags::NEWNET,
            LinuxNamespaceType::Mount => {}
            other => {
                return Err(Failure::new(
                    Kind::Unimplemented,
                    format!("{other:?} namespaces are not supported inside a guest yet"),
                ));
            }
        }
    }
    write_oom_score(oom_score(&request.spec))?;
    if let Some(init) = request.pid_namespace_of {
        join(init, ThreadNameSpaceType::PROCESS_ID)?;
    } else if pid {
        unshare(UnshareFlags::NEWPID)?;
    }
    fork_into(sync, || {
        unshare(own)?;
        let stage = rootfs::enter(sync, &request)?;
        become_program(sync, stage)
    })
}

fn exec_in(sync: &Sync, request: ExecRequest) -> Result<()> {
    cgroup::enter(&request.cgroup, Some(request.init))?;
    write_oom_score(request.oom_score)?;
    join(
        request.init,
        ThreadNameSpaceType::PROCESS_ID
            | ThreadNameSpaceType::MOUNT
            | ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME
            | ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION
            | ThreadNameSpaceType::CONTROL_GROUP
            | ThreadNameSpaceType::NETWORK,
    )?;
    fork_into(sync, || {
        if let Some(archive) = &request.archive {
            return copy_files(sync, archive);
        }
        let terminal = request
            .terminal
            .map(|size| terminal::open(sync, size, None))
            .transpose()?;
        become_program(
            sync,
            exec::Program {
                process: request.process,
                user: request.user,
                seccomp: request.seccomp,
                terminal,
                start_hooks: Vec::new(),
                about: hooks::About::default(),
            },
        )
    })
}

fn unshare(flags: UnshareFlags) -> Result<()> {
    // SAFETY: the process is single-threaded and shares no descriptor table with another one;
    // FILES is never among the flags.
    unsafe { rustix::thread::unshare_unsafe(flags) }
        .during(|| format!("make namespaces ({flags:?})"))
}

fn join(pid: u32, kinds: ThreadNameSpaceType) -> Result<()> {
    let pid = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(|| Failure::invalid(format!("{pid} is no process ID")))?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|_| {
        Failure::new(
            Kind::FailedPrecondition,
            "the container has no running process",
        )
    })?;
    move_into_thread_name_spaces(pidfd.as_fd(), kinds)
        .during(|| format!("enter the namespaces of process {pid:?}"))
}

/// Forks; the child runs `step`, the parent reports the child's PID and ends.
fn fork_into(sync: &Sync, step: impl FnOnce() -> Result<()>) -> Result<()> {
    // SAFETY: the process is single-threaded, so the child may go on as if nothing had happened.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()).during(|| "fork".to_owned()),
        0 => step(),
        child => sync.report(&Report::Pid(child.unsigned_abs())),
    }
}

fn become_program(sync: &Sync, program: exec::Program) -> Result<()> {
    exec::check(&program.process)?;
    sync.report(&Report::Ready)?;
    if !sync.wait_for_start()? {
        return Err(Failure::internal("the agent gave the process up"));
    }
    exec::run(program)
}

/// Copies files between standard input or output and the container's mount namespace, as root.
/// What goes wrong is told on standard error, as a program would.
fn copy_files(sync: &Sync, request: &caisson_archive::Request) -> Result<()> {
    // Programs of the container see this process.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .during(|| "hide the process".to_owned())?;
    rustix::process::chdir("/").during(|| "enter the root".to_owned())?;
    sync.report(&Report::Ready)?;
    if !sync.wait_for_start()? {
        return Err(Failure::internal("the agent gave the process up"));
    }
    // What execve does for programs.
    rustix::net::shutdown(&sync.0, rustix::net::Shutdown::Both).during(|| "hang up".to_owned())?;
    let copied = match request {
        caisson_archive::Request::Pack { source, follow } => {
            let output = std::io::BufWriter::with_capacity(64 << 10, std::io::stdout().lock());
            caisson_archive::pack(source, *follow, output)
        }
        caisson_archive::Request::Unpack {
            destination,
            attributes,
        } => caisson_archive::unpack(std::io::stdin().lock(), destination, *attributes),
    };
    if let Err(error) = copied {
        eprintln!("{error}");
        std::process::exit(1);
    }
    Ok(())
}

/// What the out-of-memory killer is told of the container: without a wish the default, not the
/// agent's protection.
pub fn oom_score(spec: &Spec) -> i32 {
    spec.process()
        .as_ref()
        .and_then(|process| process.oom_score_adj())
        .unwrap_or(0)
}

/// Sets the calling process's own `oom_score_adj`.
///
/// # Errors
/// Those of the write.
pub fn write_oom_score(score: i32) -> Result<()> {
    std::fs::write("/proc/self/oom_score_adj", score.to_string())
        .during(|| format!("set oom_score_adj to {score}"))
}
