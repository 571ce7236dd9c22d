//! The agent's side of a container's init process: starts it and hears how it fares.

use std::{
    fs::File,
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    process::Command,
};

use rustix::{
    io::{FdFlags, fcntl_setfd},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags,
        SocketFlags, SocketType, recvmsg, socketpair,
    },
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use tokio::{
    io::unix::AsyncFd,
    time::{Instant, timeout_at},
};

use super::{
    init,
    request::{MAX_PACKET, Report, Request, START, memory_file},
};
use crate::{
    failure::{During, Failure, Kind, Result},
    stdio::Prepared,
};

/// An init process that waits to execute its program; dropped, it is killed.
pub struct Waiting {
    /// PID in the guest.
    pub pid: u32,
    /// Master of its terminal.
    pub terminal: Option<OwnedFd>,
    sync: AsyncFd<OwnedFd>,
    steps: Steps,
}

/// The processes (pidfds) that lead to the program; dropped before that runs, they are killed.
#[derive(Default)]
struct Steps(Vec<OwnedFd>);

impl Steps {
    fn add(&mut self, pid: u32) {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        // One that has ended already needs no killing.
        if let Some(Ok(pidfd)) = pid.map(|pid| pidfd_open(pid, PidfdFlags::empty())) {
            self.0.push(pidfd);
        }
    }

    /// The program runs.
    fn over(&mut self) {
        self.0.clear();
    }
}

impl Drop for Steps {
    fn drop(&mut self) {
        for pidfd in &self.0 {
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        }
    }
}

/// Starts an init process for `request` and waits until it is set up.
///
/// # Errors
/// What the process says went wrong. It is not set up at `deadline`: it is killed then.
pub async fn spawn(request: &Request, streams: Prepared, deadline: Instant) -> Result<Waiting> {
    timeout_at(deadline, set_up(request, streams))
        .await
        .unwrap_or_else(|_| Err(late("was not set up")))
}

async fn set_up(request: &Request, streams: Prepared) -> Result<Waiting> {
    let text = serde_json::to_vec(request)
        .map_err(|error| Failure::internal(format!("cannot encode the request: {error}")))?;
    let memory = memory_file("container-init", &text)?;
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .during(|| "make a socket pair".to_owned())?;
    rustix::io::ioctl_fionbio(&theirs, false).during(|| "prepare a socket".to_owned())?;
    let mut steps = Steps::default();
    // Nobody reaps before the next await: this is the one thread that does.
    steps.add(start(&theirs, &memory, streams)?);
    drop((theirs, memory));
    let sync = crate::readiness::watch(ours).during(|| "watch a socket".to_owned())?;
    let (mut pid, mut ready, mut terminal) = (None, false, None);
    loop {
        match receive(&sync).await? {
            Some((Report::Pid(number), _)) => {
                steps.add(number);
                pid = Some(number);
            }
            Some((Report::Terminal, fd)) => terminal = fd,
            Some((Report::Ready, _)) => ready = true,
            Some((Report::Failed(failure), _)) => return Err(failure),
            None => return Err(died()),
        }
        // The first step's report of the PID and the second's of readiness race.
        if let (Some(pid), true) = (pid, ready) {
            return Ok(Waiting {
                pid,
                terminal,
                sync,
                steps,
            });
        }
    }
}

fn late(what: &str) -> Failure {
    Failure::new(
        Kind::DeadlineExceeded,
        format!(
            "the container's init process {what} in time and was killed (a hook, a stalled disk or \
             host directory, a paused container?)"
        ),
    )
}

fn died() -> Failure {
    Failure::internal(
        "the container's init process died while it was set up (out of memory or processes?)",
    )
}

/// Starts the first step and gives its PID.
fn start(sync: &OwnedFd, request: &File, streams: Prepared) -> Result<u32> {
    // The agent has one thread, so no other child can inherit these two in between.
    for fd in [sync.as_fd(), request.as_fd()] {
        fcntl_setfd(fd, FdFlags::empty()).during(|| "pass a descriptor on".to_owned())?;
    }
    Command::new("/proc/self/exe")
        .arg(init::VERB)
        .arg(sync.as_raw_fd().to_string())
        .arg(request.as_raw_fd().to_string())
        .env_clear()
        .stdin(streams.stdin)
        .stdout(streams.stdout)
        .stderr(streams.stderr)
        .spawn()
        .during(|| "start a container's init process".to_owned())
        // Reaped with everybody else.
        .map(|child| child.id())
}

impl Waiting {
    /// Lets the process execute its program; comes back once it has.
    ///
    /// # Errors
    /// What kept it from doing so. It has not at `deadline`: it is killed then.
    pub async fn go(mut self, deadline: Instant) -> Result<()> {
        rustix::net::send(&self.sync, START, SendFlags::NOSIGNAL).map_err(|_| died())?;
        let heard = timeout_at(deadline, receive(&self.sync))
            .await
            .unwrap_or_else(|_| Err(late("did not execute its program")));
        // The socket closes by itself when execve succeeds.
        match heard? {
            None => {
                self.steps.over();
                Ok(())
            }
            Some((Report::Failed(failure), _)) => Err(failure),
            Some(_) => Err(Failure::internal(
                "the container's init process is out of step",
            )),
        }
    }
}

async fn receive(sync: &AsyncFd<OwnedFd>) -> Result<Option<(Report, Option<OwnedFd>)>> {
    let mut buffer = vec![0; MAX_PACKET];
    loop {
        let mut guard = sync
            .readable()
            .await
            .during(|| "wait for the init process".to_owned())?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received = guard.try_io(|fd| {
            let mut data = [io::IoSliceMut::new(&mut buffer)];
            Ok(recvmsg(
                fd.get_ref(),
                &mut data,
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            )?)
        });
        let length = match received {
            Err(_would_block) => continue,
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionReset => 0,
            Ok(result) => {
                result
                    .during(|| "hear from the init process".to_owned())?
                    .bytes
            }
        };
        if length == 0 {
            return Ok(None);
        }
        let fd = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let report = serde_json::from_slice(&buffer[..length]).map_err(|error| {
            Failure::internal(format!("malformed report of the init process: {error}"))
        })?;
        return Ok(Some((report, fd)));
    }
}

#[cfg(test)]
pub mod tests {
    use std::{
        os::unix::process::ExitStatusExt,
        process::{Child, Stdio},
    };

    use super::*;

    /// A process that waits to be started, as far as can be told, and its end of the sync socket.
    pub fn sleeper() -> (Child, Waiting, OwnedFd) {
        let child = Command::new("sleep")
            .arg("1000")
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut steps = Steps::default();
        steps.add(child.id());
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .unwrap();
        let waiting = Waiting {
            pid: child.id(),
            terminal: None,
            sync: crate::readiness::watch(ours).unwrap(),
            steps,
        };
        (child, waiting, theirs)
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_process_that_does_not_execute_its_program_in_time_is_killed() {
        let (mut child, waiting, _theirs) = sleeper();
        let failure = waiting.go(Instant::now()).await.unwrap_err();
        assert_eq!(failure.kind, Kind::DeadlineExceeded, "{failure}");
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_process_that_executes_its_program_lives_and_one_given_up_does_not() {
        let (mut child, waiting, theirs) = sleeper();
        let hour = std::time::Duration::from_secs(3600);
        let started = tokio::spawn(waiting.go(Instant::now() + hour));
        tokio::task::yield_now().await;
        drop(theirs); // As execve does.
        started.await.unwrap().unwrap();
        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();

        let (mut child, waiting, _theirs) = sleeper();
        drop(waiting);
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    }
}
