//! A process's streams: the caller's descriptors on one side, the shim's FIFOs on the other.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::mpsc,
    time::Duration,
};

use caisson_sandbox::scaled;
use rustix::{
    fs::{FileType, Mode, OFlags, makedev},
    process::Signal,
};
use tokio::sync::oneshot;

use crate::{
    error::Error,
    shim::{Shim, Streams, make_fifo},
};

/// Bytes copied at a time.
const CHUNK: usize = 32 * 1024;

/// What the kernel sends to who writes to a pipe without a reader (signal(7)).
const SIGPIPE: u32 = Signal::PIPE.as_raw().unsigned_abs();

/// Longest that what a process has written waits for a reader, once it has ended.
const DRAIN_LIMIT: Duration = Duration::from_secs(10);

/// The caller's side.
pub struct Ends {
    /// The streams are one terminal.
    pub terminal: bool,
    /// Read from.
    pub stdin: Option<File>,
    /// Written to.
    pub stdout: Option<File>,
    /// Written to; None with a terminal.
    pub stderr: Option<File>,
}

impl Ends {
    /// Three descriptors; /dev/null is none.
    pub fn of([stdin, stdout, stderr]: [File; 3]) -> Self {
        Self {
            terminal: false,
            stdin: unless_null(stdin),
            stdout: unless_null(stdout),
            stderr: unless_null(stderr),
        }
    }

    /// A terminal's slave.
    ///
    /// # Errors
    /// No descriptor left.
    pub fn of_terminal(slave: &File) -> Result<Self, Error> {
        let copy = || slave.try_clone().map_err(Error::io("copy a descriptor"));
        Ok(Self {
            terminal: true,
            stdin: Some(copy()?),
            stdout: Some(copy()?),
            stderr: None,
        })
    }
}

fn unless_null(file: File) -> Option<File> {
    let null = rustix::fs::fstat(&file).is_ok_and(|stat| {
        FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
            && stat.st_rdev == makedev(1, 3)
    });
    (!null).then_some(file)
}

/// Streams that are ready to be given to the shim.
pub struct Relay {
    /// For the shim.
    pub streams: Streams,
    stdin: Option<File>,
    outputs: Vec<(File, File)>,
}

impl Relay {
    /// Makes FIFOs in a directory.
    ///
    /// # Errors
    /// Those of mkfifo(3) and open(2).
    pub fn prepare(directory: &Path, ends: Ends) -> Result<Self, Error> {
        fs::create_dir_all(directory).map_err(Error::file("create", directory))?;
        let fifo = |name: &str, end: &Option<File>| {
            end.as_ref()
                .map(|_| make_fifo(directory.join(name)))
                .transpose()
        };
        let streams = Streams {
            terminal: ends.terminal,
            stdin: fifo("stdin", &ends.stdin)?,
            stdout: fifo("stdout", &ends.stdout)?,
            stderr: fifo("stderr", &ends.stderr)?,
        };
        let mut outputs = Vec::new();
        for (path, end) in [
            (&streams.stdout, ends.stdout),
            (&streams.stderr, ends.stderr),
        ] {
            if let (Some(path), Some(end)) = (path, end) {
                outputs.push((open_reader(path)?, end));
            }
        }
        Ok(Self {
            streams,
            stdin: ends.stdin,
            outputs,
        })
    }

    /// Starts copying, once the shim holds its ends. The process's input ends with the caller's.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(self, shim: Shim, id: &str, exec: &str) -> Result<Copies, Error> {
        let (done, drained) = mpsc::channel();
        let count = self.outputs.len();
        for (fifo, to) in self.outputs {
            let done = done.clone();
            let (left, reader) = oneshot::channel();
            spawn("output", move || {
                copy_output(fifo, to, left);
                let _ = done.send(());
            })?;
            let (shim, id, exec) = (shim.clone(), id.to_owned(), exec.to_owned());
            tokio::spawn(async move {
                if reader.await.is_ok() {
                    // It may have ended by itself.
                    let _ = shim.kill(&id, &exec, SIGPIPE, false).await;
                }
            });
        }
        if let (Some(from), Some(fifo)) = (self.stdin, self.streams.stdin) {
            let (ended, end) = oneshot::channel();
            spawn("stdin", move || {
                copy_input(from, &fifo);
                let _ = ended.send(());
            })?;
            let (id, exec, terminal) = (id.to_owned(), exec.to_owned(), self.streams.terminal);
            tokio::spawn(async move {
                if end.await.is_ok() && !terminal {
                    // It may have ended by itself.
                    let _ = shim.close_stdin(&id, &exec).await;
                }
            });
        }
        Ok(Copies { drained, count })
    }
}

/// Streams that are being copied.
pub struct Copies {
    drained: mpsc::Receiver<()>,
    count: usize,
}

impl Copies {
    /// Waits until all that the process has written has been passed on, or for long enough.
    pub fn finish(self) {
        let end = std::time::Instant::now() + scaled(DRAIN_LIMIT);
        for _ in 0..self.count {
            let left = end.saturating_duration_since(std::time::Instant::now());
            if self.drained.recv_timeout(left).is_err() {
                return;
            }
        }
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(128 << 10)
        .spawn(work)
        .map(drop)
        .map_err(Error::io("start a thread"))
}

/// Does not wait for the shim, which opens its end later.
fn open_reader(path: &Path) -> Result<File, Error> {
    rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map(File::from)
    .map_err(|error| Error::file("open the FIFO", path)(io::Error::from(error)))
}

/// Tells `left` when the caller's reader has left. The rest is read nevertheless: a process that ignores
/// SIGPIPE goes on, too.
fn copy_output(mut fifo: File, to: File, left: oneshot::Sender<()>) {
    // From here on the shim holds the writing end, so reading waits for data or the end.
    if rustix::io::ioctl_fionbio(&fifo, false).is_err() {
        return;
    }
    let mut reader = Some((to, left));
    let mut buffer = vec![0; CHUNK];
    loop {
        match fifo.read(&mut buffer) {
            Ok(length @ 1..) => {
                let bytes = buffer.get(..length).unwrap_or_default();
                if let Some((mut to, left)) = reader.take() {
                    if write_all(&mut to, bytes).is_err() {
                        let _ = left.send(());
                    } else {
                        reader = Some((to, left));
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            _ => return,
        }
    }
}

/// The caller's descriptor may be one that does not wait.
fn write_all(to: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(length) => bytes = bytes.get(length..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                wait_for(to, rustix::event::PollFlags::OUT)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn wait_for(file: &File, what: rustix::event::PollFlags) -> io::Result<()> {
    let mut polled = [rustix::event::PollFd::new(file, what)];
    rustix::event::poll(&mut polled, None)?;
    Ok(())
}

fn copy_input(mut from: File, fifo: &PathBuf) {
    let Ok(mut pipe) = File::options().write(true).open(fifo) else {
        return;
    };
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer) {
            Ok(length @ 1..) => {
                let bytes = buffer.get(..length).unwrap_or_default();
                if pipe.write_all(bytes).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if wait_for(&from, rustix::event::PollFlags::IN).is_err() {
                    return;
                }
            }
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    #[test]
    fn null_is_no_stream() {
        let null = || {
            File::options()
                .read(true)
                .write(true)
                .open("/dev/null")
                .unwrap()
        };
        let (reader, _writer) = io::pipe().unwrap();
        let ends = Ends::of([File::from(OwnedFd::from(reader)), null(), null()]);
        assert!(ends.stdin.is_some() && ends.stdout.is_none() && ends.stderr.is_none());
    }

    #[test]
    fn output_reaches_a_descriptor_that_does_not_wait() {
        let (mut reader, writer) = io::pipe().unwrap();
        rustix::io::ioctl_fionbio(&writer, true).unwrap();
        let to = File::from(OwnedFd::from(writer));
        let (fifo, mut from) = io::pipe().unwrap();
        let (left, mut reader_left) = oneshot::channel();
        let copy =
            std::thread::spawn(move || copy_output(File::from(OwnedFd::from(fifo)), to, left));
        let sent = vec![7; 1 << 20];
        let expected = sent.clone();
        let write = std::thread::spawn(move || from.write_all(&sent).unwrap());
        let mut received = Vec::new();
        reader.read_to_end(&mut received).unwrap();
        assert_eq!(received, expected);
        write.join().unwrap();
        copy.join().unwrap();
        assert!(reader_left.try_recv().is_err());
    }

    #[test]
    fn a_reader_that_leaves_is_told_and_holds_nobody_up() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let (fifo, mut from) = io::pipe().unwrap();
        let (left, mut reader_left) = oneshot::channel();
        let copy = std::thread::spawn(move || {
            copy_output(
                File::from(OwnedFd::from(fifo)),
                File::from(OwnedFd::from(writer)),
                left,
            );
        });
        // More than a pipe holds.
        from.write_all(&[7; 1 << 20]).unwrap();
        drop(from);
        copy.join().unwrap();
        assert_eq!(reader_left.try_recv(), Ok(()));
    }
}
