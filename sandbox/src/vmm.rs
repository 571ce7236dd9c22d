//! The VMM's process: spawned into a PID namespace of its own, spoken to over
//! the control socket, watched until it has gone.

use std::{
    collections::HashMap,
    fmt,
    fs::File,
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::process::{CommandExt, ExitStatusExt},
    },
    path::Path,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use caisson_vmm_api::{Call, Channel, ChannelError, Event, ExitReason, Message, Request, Response};
use rustix::thread::UnshareFlags;
use tokio::sync::{oneshot, watch};

use crate::{
    deadline::{self, scaled},
    error::Error,
};

/// Longest that the VMM may take to answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Most of the VMM's stderr that is kept.
const STDERR_KEPT: usize = 4096;

/// How a microVM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gone {
    /// Why.
    pub reason: ExitReason,
    /// Last output of the guest's console.
    pub console_tail: String,
}

impl fmt::Display for Gone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.reason {
            ExitReason::GuestShutdown => write!(f, "the VM has ended: the guest shut down")?,
            ExitReason::GuestPanic => write!(f, "the VM has ended: kernel panic in the guest")?,
            ExitReason::TripleFault => write!(f, "the VM has ended: triple fault in the guest")?,
            ExitReason::VcpuFailed { message } => {
                write!(f, "the VM has ended: KVM could not go on: {message}")?
            }
            ExitReason::Stopped => write!(f, "the VM has been stopped")?,
            ExitReason::Internal { message } => write!(f, "the VM has ended: {message}")?,
        }
        let lines: Vec<&str> = self
            .console_tail
            .lines()
            .filter(|line| !line.trim().is_empty())
            .collect();
        let told = last_words(&lines);
        if !told.is_empty() {
            write!(f, "; last lines of its console:")?;
            for line in told {
                // A guest must not move the reader's cursor.
                let clean: String = line.chars().filter(|c| !c.is_control()).collect();
                write!(f, "\n    {clean}")?;
            }
        }
        Ok(())
    }
}

/// What a report of Linux' about itself begins with (arch/x86/mm/fault.c, kernel/panic.c).
const REPORT_BEGINS: [&str; 5] = [
    "BUG: ",
    "Oops: ",
    "invalid opcode: ",
    "double fault: ",
    "Kernel panic - not syncing",
];

/// Lines of a console that are told of a microVM's end.
const LINES_TOLD: usize = 12;
/// And of a kernel's report.
const REPORT_LINES_TOLD: usize = 30;

/// The lines of a console that tell most of its end: the last ones, or a kernel's report from its
/// first line on, which says what happened and where; registers and calls follow.
fn last_words<'a>(lines: &'a [&'a str]) -> &'a [&'a str] {
    let begins = |line: &&str| REPORT_BEGINS.iter().any(|begin| line.contains(begin));
    let end = &lines[lines.len().saturating_sub(LINES_TOLD)..];
    match lines.iter().position(begins) {
        Some(start) if lines.len() - start > end.len() => {
            &lines[start..lines.len().min(start + REPORT_LINES_TOLD)]
        }
        _ => end,
    }
}

type Answer = Result<Response, caisson_vmm_api::Failure>;

#[derive(Default)]
struct Pending {
    answers: HashMap<u64, oneshot::Sender<Answer>>,
    exit: Option<Gone>,
}

/// A running VMM.
pub struct Vmm {
    channel: Arc<Channel>,
    pending: Arc<Mutex<Pending>>,
    next: AtomicU64,
    gone: watch::Receiver<Option<Gone>>,
    pid: u32,
}

fn lock(pending: &Mutex<Pending>) -> MutexGuard<'_, Pending> {
    pending.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Vmm {
    /// Starts `program` as user `uid` for the sandbox with the id `sandbox`, which the log names.
    ///
    /// # Errors
    /// It cannot be run.
    pub fn spawn(program: &Path, uid: u32, sandbox: &str) -> Result<Self, Error> {
        let (ours, theirs) = Channel::pair().map_err(|error| Error::Io {
            what: "make the VMM's control socket".to_owned(),
            source: io::Error::other(error),
        })?;
        let (stderr, stderr_writer) = io::pipe().map_err(Error::io("make a pipe"))?;
        let mut command = Command::new(program);
        command
            .arg("--api-fd")
            .arg(theirs.as_fd().as_raw_fd().to_string())
            .args(["--uid", &uid.to_string(), "--gid", &uid.to_string()])
            .env_clear()
            .envs(deadline::variable())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr_writer);
        let child =
            spawn_in_pid_namespace(command, theirs.into()).map_err(|source| Error::Asset {
                what: "VMM",
                path: program.to_owned(),
                reason: source.to_string(),
            })?;
        let channel = Arc::new(ours);
        let pending = Arc::new(Mutex::new(Pending::default()));
        let (announce, gone) = watch::channel(None);
        let pid = child.id();
        let watcher = Watcher {
            sandbox: sandbox.to_owned(),
            channel: channel.clone(),
            pending: pending.clone(),
            stderr: OwnedFd::from(stderr).into(),
            child,
        };
        std::thread::Builder::new()
            .name("vmm".into())
            .stack_size(256 << 10)
            .spawn(move || watcher.run(&announce))
            .map_err(Error::io("start a thread"))?;
        Ok(Self {
            channel,
            pending,
            next: AtomicU64::new(1),
            gone,
            pid,
        })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Asks for `request` and waits for the answer.
    ///
    /// # Errors
    /// The VMM refuses, has gone, or does not answer in time.
    pub async fn call(
        &self,
        what: &'static str,
        request: Request,
        fds: &[BorrowedFd<'_>],
    ) -> Result<Response, Error> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        lock(&self.pending).answers.insert(id, sender);
        if let Err(error) = self.channel.send(&Call { id, request }, fds) {
            lock(&self.pending).answers.remove(&id);
            return match error {
                ChannelError::Closed => Err(Error::Gone(self.wait_gone().await)),
                other => Err(Error::Vmm {
                    what,
                    reason: other.to_string(),
                }),
            };
        }
        let limit = scaled(ANSWER_LIMIT);
        match tokio::time::timeout(limit, receiver).await {
            Ok(Ok(answer)) => answer.map_err(|failure| Error::Vmm {
                what,
                reason: failure.message,
            }),
            Ok(Err(_)) => Err(Error::Gone(self.wait_gone().await)),
            Err(_) => {
                lock(&self.pending).answers.remove(&id);
                Err(Error::Vmm {
                    what,
                    reason: format!("no answer within {} s", limit.as_secs()),
                })
            }
        }
    }

    /// Waits until the VMM has gone, and why.
    pub async fn wait_gone(&self) -> Gone {
        let mut gone = self.gone.clone();
        let seen = gone.wait_for(Option::is_some).await;
        match seen.as_deref() {
            Ok(Some(gone)) => gone.clone(),
            // The watcher never ends without a word; if it were to, the VMM is gone all the same.
            _ => Gone {
                reason: ExitReason::Internal {
                    message: "its watcher ended".to_owned(),
                },
                console_tail: String::new(),
            },
        }
    }

    /// Why the VMM has gone, if it has.
    pub fn gone(&self) -> Option<Gone> {
        self.gone.borrow().clone()
    }
}

/// unshare(2) with `CLONE_NEWPID` counts for children to come, so a thread of its own does it.
fn spawn_in_pid_namespace(mut command: Command, passed: OwnedFd) -> io::Result<Child> {
    let number = passed.as_raw_fd();
    let work = move || {
        // SAFETY: NEWPID changes nothing of this thread but where its children are born.
        if let Err(error) = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) } {
            log::warn!("the VMM shares the host's PID namespace: {error}");
        }
        let keep = move || {
            // SAFETY: the parent holds this descriptor until the child has been spawned.
            let fd = unsafe { BorrowedFd::borrow_raw(number) };
            rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
            Ok(())
        };
        // SAFETY: between fork and exec only one fcntl(2) runs, which is async-signal-safe.
        unsafe { command.pre_exec(keep) };
        let child = command.spawn();
        drop(passed);
        child
    };
    std::thread::Builder::new()
        .name("spawn".into())
        .stack_size(256 << 10)
        .spawn(work)?
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the spawning thread failed")))
}

/// Why no more is heard of a VMM.
enum End {
    /// Its end of the socket is closed.
    Closed,
    /// What it says makes no sense, so nothing that it says later can be trusted.
    Broken(ChannelError),
}

struct Watcher {
    sandbox: String,
    channel: Arc<Channel>,
    pending: Arc<Mutex<Pending>>,
    stderr: File,
    child: Child,
}

impl Watcher {
    fn run(mut self, announce: &watch::Sender<Option<Gone>>) {
        let mut words = Vec::new();
        let mut stderr_open = true;
        let end = loop {
            let (control, output) = self.wait(stderr_open);
            if output {
                stderr_open = self.hear(&mut words);
            }
            if control && let Some(end) = self.receive() {
                break end;
            }
        };
        let status = match &end {
            End::Closed => self.reap(),
            End::Broken(_) => self.kill(),
        };
        if stderr_open {
            let _ = rustix::io::ioctl_fionbio(&self.stderr, true);
            while self.hear(&mut words) {}
        }
        let mut pending = lock(&self.pending);
        let gone = pending.exit.take().unwrap_or_else(|| Gone {
            reason: ExitReason::Internal {
                message: match end {
                    End::Closed => describe(status, &words),
                    End::Broken(error) => format!("the VMM was killed: {error}"),
                },
            },
            console_tail: String::new(),
        });
        // Callers that wait find out by their senders' end, and then what is announced.
        let _ = announce.send(Some(gone));
        pending.answers.clear();
    }

    fn wait(&self, stderr_open: bool) -> (bool, bool) {
        use rustix::event::{PollFd, PollFlags, poll};
        let mut fds = vec![PollFd::new(&self.channel, PollFlags::IN)];
        if stderr_open {
            fds.push(PollFd::new(&self.stderr, PollFlags::IN));
        }
        let _ = rustix::io::retry_on_intr(|| poll(&mut fds, None));
        let ready = |index: usize| fds.get(index).is_some_and(|fd| !fd.revents().is_empty());
        (ready(0), ready(1))
    }

    /// Reads some of stderr; false at its end.
    fn hear(&mut self, words: &mut Vec<u8>) -> bool {
        let mut buffer = [0; 1024];
        match self.stderr.read(&mut buffer) {
            Ok(length @ 1..) => {
                let text = String::from_utf8_lossy(&buffer[..length]);
                log::warn!("caisson-vmm: {}", text.trim_end());
                words.extend_from_slice(&buffer[..length]);
                let excess = words.len().saturating_sub(STDERR_KEPT);
                words.drain(..excess);
                true
            }
            _ => false,
        }
    }

    /// Takes one packet; tells when there will be no more.
    fn receive(&self) -> Option<End> {
        match self.channel.receive::<Message>() {
            Ok((Message::Reply { id, result }, _)) => {
                if let Some(sender) = lock(&self.pending).answers.remove(&id) {
                    // A caller that has given up needs no answer.
                    let _ = sender.send(result);
                }
                None
            }
            Ok((
                Message::Event(Event::Exited {
                    reason,
                    console_tail,
                }),
                _,
            )) => {
                lock(&self.pending).exit = Some(Gone {
                    reason,
                    console_tail,
                });
                None
            }
            Ok((Message::Event(Event::DeviceFailed { message, .. }), _)) => {
                let sandbox = &self.sandbox;
                log::error!("sandbox {sandbox}: {message}; the guest sees I/O errors there");
                None
            }
            Err(ChannelError::TimedOut) => None,
            Err(ChannelError::Closed) => Some(End::Closed),
            Err(error) => Some(End::Broken(error)),
        }
    }

    /// The VMM has closed its socket, so it is about to end; one that does not is made to.
    fn reap(&mut self) -> io::Result<ExitStatus> {
        for _ in 0..500 {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        self.kill()
    }

    fn kill(&mut self) -> io::Result<ExitStatus> {
        self.child.kill()?;
        self.child.wait()
    }
}

fn describe(status: io::Result<ExitStatus>, words: &[u8]) -> String {
    let how = match status {
        Ok(status) => match (status.signal(), status.code()) {
            (Some(libc::SIGSYS), _) => "the VMM was killed by its system call filter".to_owned(),
            (Some(signal), _) => format!("the VMM was killed by signal {signal}"),
            (None, Some(code)) => format!("the VMM exited with status {code}"),
            (None, None) => "the VMM ended".to_owned(),
        },
        Err(error) => format!("the VMM ended ({error})"),
    };
    let words = String::from_utf8_lossy(words);
    let words = words.trim();
    if words.is_empty() {
        how
    } else {
        format!("{how}: {words}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(console: &[String]) -> Vec<String> {
        let gone = Gone {
            reason: ExitReason::GuestPanic,
            console_tail: console.join("\n"),
        };
        let text = gone.to_string();
        assert!(text.starts_with("the VM has ended: kernel panic in the guest"));
        text.lines()
            .skip(1)
            .map(|line| line.trim().to_owned())
            .collect()
    }

    #[test]
    fn a_kernels_report_is_told_from_its_beginning() {
        let mut console: Vec<String> = (0..40).map(|n| format!("hello {n}")).collect();
        assert_eq!(told(&console), &console[28..]);
        console.push("[    7.8] BUG: unable to handle page fault for address: 3e0".into());
        console.extend((0..50).map(|n| format!("[    7.9] register {n}")));
        console.push("[    8.0] Kernel panic - not syncing: Fatal exception".into());
        assert_eq!(told(&console), &console[40..70]);
    }

    #[test]
    fn a_short_report_has_its_context() {
        let mut console: Vec<String> = (0..40).map(|n| format!("hello {n}")).collect();
        console.push("Kernel panic - not syncing: VFS: \u{1b}[2Jno root".into());
        let told = told(&console);
        assert_eq!(told.len(), 12);
        assert!(told[11].ends_with("VFS: [2Jno root") && told[10] == "hello 39");
    }
}
