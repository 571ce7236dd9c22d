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
};
use tokio::io::unix::AsyncFd;

use super::{
    init,
    request::{MAX_PACKET, Report, Request, START, memory_file},
};
use crate::{
    failure::{During, Failure, Result},
    stdio::Prepared,
};

/// An init process that waits to execute its program.
pub struct Waiting {
    /// PID in the guest.
    pub pid: u32,
    /// Master of its terminal.
    pub terminal: Option<OwnedFd>,
    sync: AsyncFd<OwnedFd>,
}

/// Starts an init process for `request` and waits until it is set up.
///
/// `born` is called with the PID as soon as it is known, before anything can have been heard of
/// the process's end.
///
/// # Errors
/// What the process says went wrong.
pub async fn spawn(
    request: &Request,
    streams: Prepared,
    mut born: impl FnMut(u32),
) -> Result<Waiting> {
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
    start(&theirs, &memory, streams)?;
    drop((theirs, memory));
    let sync = crate::readiness::watch(ours).during(|| "watch a socket".to_owned())?;
    let mut pid = None;
    let mut terminal = None;
    loop {
        match receive(&sync).await? {
            Some((Report::Pid(number), _)) => {
                born(number);
                pid = Some(number);
            }
            Some((Report::Terminal, fd)) => terminal = fd,
            // The first step's report of the PID and the second's of readiness race.
            Some((Report::Ready, _)) => {
                while pid.is_none() {
                    match receive(&sync).await? {
                        Some((Report::Pid(number), _)) => {
                            born(number);
                            pid = Some(number);
                        }
                        Some((Report::Failed(failure), _)) => return Err(failure),
                        _ => return Err(died()),
                    }
                }
                let pid = pid.unwrap_or_default();
                return Ok(Waiting {
                    pid,
                    terminal,
                    sync,
                });
            }
            Some((Report::Failed(failure), _)) => return Err(failure),
            None => return Err(died()),
        }
    }
}

fn died() -> Failure {
    Failure::internal(
        "the container's init process died while it was set up (out of memory or processes?)",
    )
}

fn start(sync: &OwnedFd, request: &File, streams: Prepared) -> Result<()> {
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
        .map(drop)
}

impl Waiting {
    /// Lets the process execute its program; comes back once it has.
    ///
    /// # Errors
    /// What kept it from doing so.
    pub async fn go(self) -> Result<()> {
        rustix::net::send(&self.sync, START, SendFlags::NOSIGNAL).map_err(|_| died())?;
        // The socket closes by itself when execve succeeds.
        match receive(&self.sync).await? {
            None => Ok(()),
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
