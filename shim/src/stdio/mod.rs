//! A process's streams on the host: containerd's FIFOs and files on one side, connections to the
//! guest on the other.

mod binary;
mod uri;

use std::{io, path::Path, sync::Arc};

use caisson_sandbox::Streams;
use tokio::{
    fs::File,
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{UnixStream, unix::pipe},
    sync::Notify,
    task::JoinSet,
};

use crate::error::Error;

use binary::Logger;
use uri::Target;

/// Bytes copied at a time.
const CHUNK: usize = 32 * 1024;

/// Where containerd wants a process's streams.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Paths {
    /// One terminal; stderr is not used then.
    pub terminal: bool,
    /// A FIFO, or empty.
    pub stdin: String,
    /// A FIFO, `file:///path`, `binary:///program?key=value`, or empty.
    pub stdout: String,
    /// As stdout.
    pub stderr: String,
}

impl Paths {
    /// What the sandbox shall connect.
    pub fn wanted(&self, size: (u32, u32)) -> caisson_sandbox::Stdio {
        caisson_sandbox::Stdio {
            terminal: self.terminal,
            size,
            stdin: !self.stdin.is_empty(),
            // Without a reader the process gets /dev/null, which never blocks it.
            stdout: !self.stdout.is_empty(),
            stderr: !self.stderr().is_empty(),
        }
    }

    /// A file or a program that takes stdout takes stderr too (containerd looks at stdout's name
    /// alone then).
    fn stderr(&self) -> &str {
        match Target::parse(&self.stdout) {
            Ok(Some(Target::File(_) | Target::Binary { .. })) => &self.stdout,
            _ => &self.stderr,
        }
    }
}

/// Ends of the host's side, opened before the process exists, so that a wrong path fails early.
pub struct Host {
    stdin: Option<pipe::Receiver>,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
    logger: Option<Logger>,
}

enum Sink {
    Pipe(pipe::Sender),
    File(File),
}

impl Host {
    /// Opens `paths` for a container, given by containerd's namespace and its id.
    ///
    /// # Errors
    /// A path that is not there, a program that does not start, or a scheme that is not supported.
    pub async fn open(paths: &Paths, container: (&str, &str)) -> Result<Self, Error> {
        let stdin = match Target::parse(&paths.stdin)? {
            None => None,
            Some(Target::Fifo(path)) => {
                // Both ways: the stream ends by `CloseIO` alone, as under runc. One writer leaves
                // (`ctr run -d`, `kubectl attach`), and another may come.
                let opened = pipe::OpenOptions::new()
                    .read_write(true)
                    .open_receiver(&path);
                Some(opened.map_err(Error::file("open the FIFO", path))?)
            }
            Some(_) => {
                return Err(Error::Unsupported(format!(
                    "standard input comes from a FIFO only, not from {}",
                    paths.stdin
                )));
            }
        };
        if let Some(Target::Binary {
            program,
            arguments,
            must_answer,
        }) = Target::parse(&paths.stdout)?
        {
            let (logger, (stdout, stderr)) =
                Logger::start(&program, &arguments, must_answer, container).await?;
            return Ok(Self {
                stdin,
                stdout: Some(Sink::Pipe(stdout)),
                stderr: Some(Sink::Pipe(stderr)).filter(|_| !paths.terminal),
                logger: Some(logger),
            });
        }
        Ok(Self {
            stdin,
            stdout: sink(&paths.stdout).await?,
            stderr: if paths.terminal {
                None
            } else {
                sink(paths.stderr()).await?
            },
            logger: None,
        })
    }
}

async fn sink(name: &str) -> Result<Option<Sink>, Error> {
    Ok(match Target::parse(name)? {
        None => None,
        Some(Target::File(path)) => Some(Sink::File(append(&path).await?)),
        Some(Target::Fifo(path)) => {
            // Both ways: without a reader the process waits (as under runc) instead of dying of
            // SIGPIPE.
            let opened = pipe::OpenOptions::new().read_write(true).open_sender(&path);
            Some(Sink::Pipe(
                opened.map_err(Error::file("open the FIFO", path))?,
            ))
        }
        Some(Target::Binary { .. }) => {
            return Err(Error::Unsupported(format!(
                "a program takes stdout and stderr, not stderr alone ({name})"
            )));
        }
    })
}

async fn append(path: &Path) -> Result<File, Error> {
    if let Some(parent) = path.parent() {
        tokio::fs::create_dir_all(parent)
            .await
            .map_err(Error::file("create", parent))?;
    }
    let opened = File::options().create(true).append(true).open(path).await;
    opened.map_err(Error::file("open", path))
}

/// Copying tasks of one process.
pub struct Pumps {
    /// Ends once all output has been written.
    outputs: JoinSet<()>,
    inputs: JoinSet<()>,
    logger: Option<Logger>,
}

impl Pumps {
    /// Starts copying between `host` and `guest`. Told by `close_stdin`, which may have been
    /// before, it ends the process's stdin once what is in the FIFO has been sent.
    pub fn start(host: Host, guest: Streams, close_stdin: Arc<Notify>) -> Self {
        let (mut outputs, mut inputs) = (JoinSet::new(), JoinSet::new());
        if let Some(terminal) = guest.terminal {
            let (from_guest, to_guest) = terminal.into_split();
            if let Some(stdin) = host.stdin {
                let close = close_stdin;
                // The writing half stays open: a terminal has no end of its own.
                inputs.spawn(async move {
                    let mut to_guest = to_guest;
                    feed(stdin, &mut to_guest, &close).await;
                    std::future::pending::<()>().await;
                });
            } else {
                inputs.spawn(async move {
                    let _open = to_guest;
                    std::future::pending::<()>().await;
                });
            }
            spawn_output(&mut outputs, from_guest, host.stdout);
        } else {
            if let (Some(stdin), Some(mut to_guest)) = (host.stdin, guest.stdin) {
                let close = close_stdin;
                inputs.spawn(async move {
                    feed(stdin, &mut to_guest, &close).await;
                    hang_up(to_guest).await;
                });
            }
            if let Some(stdout) = guest.stdout {
                spawn_output(&mut outputs, stdout, host.stdout);
            }
            if let Some(stderr) = guest.stderr {
                spawn_output(&mut outputs, stderr, host.stderr);
            }
        }
        Self {
            outputs,
            inputs,
            logger: host.logger,
        }
    }

    /// Waits until all output has been written, then stops reading input.
    pub async fn drained(&mut self) {
        while self.outputs.join_next().await.is_some() {}
        self.inputs.abort_all();
    }

    /// Waits for the end of all output and of the program that takes it.
    pub async fn finish(mut self) {
        self.drained().await;
        if let Some(logger) = self.logger.take() {
            logger.finish().await;
        }
    }

    /// Whether a program takes the output.
    pub fn has_logger(&self) -> bool {
        self.logger.is_some()
    }
}

/// Half-closes: the process reads the end of its stdin, the connection stays until it has ended.
async fn hang_up(mut to_guest: UnixStream) {
    if to_guest.shutdown().await.is_ok() {
        let mut nothing = [0; 16];
        // The agent closes it when the process's end of the pipe is gone.
        while matches!(to_guest.read(&mut nothing).await, Ok(1..)) {}
    }
}

async fn feed<W: AsyncWrite + Unpin>(mut from: pipe::Receiver, to: &mut W, close: &Notify) {
    let mut buffer = vec![0; CHUNK];
    loop {
        tokio::select! {
            read = from.read(&mut buffer) => match read {
                Ok(length @ 1..) if to.write_all(&buffer[..length]).await.is_ok() => {}
                _ => return,
            },
            () = close.notified() => break,
        }
    }
    // By the descriptor: the runtime may not have heard yet that there is something to read, and
    // would say that there is nothing.
    while let Ok(length @ 1..) = rustix::io::read(&from, &mut buffer) {
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}

fn spawn_output<R: AsyncRead + Unpin + Send + 'static>(
    tasks: &mut JoinSet<()>,
    from: R,
    sink: Option<Sink>,
) {
    tasks.spawn(async move {
        let result = match sink {
            Some(Sink::Pipe(fifo)) => copy(from, fifo).await,
            Some(Sink::File(file)) => copy(from, file).await,
            None => copy(from, tokio::io::sink()).await,
        };
        if let Err(error) = result {
            log::warn!("a process's output is lost: {error}");
        }
    });
}

async fn copy<R: AsyncRead + Unpin, W: AsyncWrite + Unpin>(
    mut from: R,
    mut to: W,
) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let length = match from.read(&mut buffer).await {
            Ok(0) => return to.flush().await,
            Ok(length) => length,
            // The machine is gone, and the stream with it.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                return to.flush().await;
            }
            Err(error) => return Err(error),
        };
        to.write_all(&buffer[..length]).await?;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn fifo(directory: &Path, name: &str) -> String {
        let path = directory.join(name);
        rustix::fs::mkfifoat(
            rustix::fs::CWD,
            &path,
            rustix::fs::Mode::from_raw_mode(0o600),
        )
        .unwrap();
        path.to_str().unwrap().to_owned()
    }

    #[tokio::test(flavor = "current_thread")]
    async fn fifos_to_the_guest_and_back() {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths {
            terminal: false,
            stdin: fifo(directory.path(), "in"),
            stdout: fifo(directory.path(), "out"),
            stderr: String::new(),
        };
        let host = Host::open(&paths, ("n", "c")).await.unwrap();
        let (guest_stdin, mut agent_stdin) = UnixStream::pair().unwrap();
        let (guest_stdout, mut agent_stdout) = UnixStream::pair().unwrap();
        let streams = Streams {
            stdin: Some(guest_stdin),
            stdout: Some(guest_stdout),
            ..Default::default()
        };
        let close = Arc::new(Notify::new());
        let mut pumps = Pumps::start(host, streams, close.clone());
        let mut reader = pipe::OpenOptions::new()
            .open_receiver(&paths.stdout)
            .unwrap();
        let mut writer = pipe::OpenOptions::new().open_sender(&paths.stdin).unwrap();
        writer.write_all(b"question").await.unwrap();
        let mut text = [0; 8];
        agent_stdin.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"question");
        close.notify_one();
        assert_eq!(agent_stdin.read(&mut text).await.unwrap(), 0, "half-closed");
        agent_stdout.write_all(b"answer").await.unwrap();
        drop(agent_stdout);
        pumps.drained().await;
        let mut text = [0; 6];
        reader.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"answer");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_stdin_ends_when_it_is_closed_and_not_when_its_writer_leaves() {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths {
            stdin: fifo(directory.path(), "in"),
            ..Default::default()
        };
        let host = Host::open(&paths, ("n", "c")).await.unwrap();
        let (guest_stdin, mut agent_stdin) = UnixStream::pair().unwrap();
        let close = Arc::new(Notify::new());
        let streams = Streams {
            stdin: Some(guest_stdin),
            ..Default::default()
        };
        let _pumps = Pumps::start(host, streams, close.clone());
        let mut byte = [0; 1];
        for text in [b"1", b"2"] {
            let mut writer = std::fs::File::options()
                .write(true)
                .open(&paths.stdin)
                .unwrap();
            std::io::Write::write_all(&mut writer, text).unwrap();
            drop(writer);
            agent_stdin.read_exact(&mut byte).await.unwrap();
            assert_eq!(&byte, text);
            let more = agent_stdin.read(&mut byte);
            let early = tokio::time::timeout(Duration::from_millis(50), more).await;
            assert!(early.is_err(), "ended when its writer left");
        }
        close.notify_one();
        assert_eq!(agent_stdin.read(&mut byte).await.unwrap(), 0);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn what_was_written_before_stdin_was_closed_arrives() {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths {
            stdin: fifo(directory.path(), "in"),
            ..Default::default()
        };
        let host = Host::open(&paths, ("n", "c")).await.unwrap();
        // The runtime has had no turn to hear of the bytes before it hears of the end.
        std::fs::write(&paths.stdin, "typed").unwrap();
        let close = Arc::new(Notify::new());
        close.notify_one();
        let (guest_stdin, mut agent_stdin) = UnixStream::pair().unwrap();
        let streams = Streams {
            stdin: Some(guest_stdin),
            ..Default::default()
        };
        let _pumps = Pumps::start(host, streams, close);
        let mut text = String::new();
        agent_stdin.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "typed");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_file_takes_both_streams() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("new/log");
        let paths = Paths {
            stdout: format!("file://{}", log.display()),
            ..Default::default()
        };
        assert!(paths.wanted((0, 0)).stderr);
        let host = Host::open(&paths, ("n", "c")).await.unwrap();
        let (guest_stdout, mut agent_stdout) = UnixStream::pair().unwrap();
        let (guest_stderr, mut agent_stderr) = UnixStream::pair().unwrap();
        agent_stdout.write_all(b"out").await.unwrap();
        agent_stderr.write_all(b"err").await.unwrap();
        drop((agent_stdout, agent_stderr));
        let streams = Streams {
            stdout: Some(guest_stdout),
            stderr: Some(guest_stderr),
            ..Default::default()
        };
        Pumps::start(host, streams, Arc::default()).finish().await;
        let text = std::fs::read_to_string(log).unwrap();
        assert!(text == "outerr" || text == "errout", "{text}");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn unknown_schemes_are_refused() {
        let paths = Paths {
            stdout: "npipe:////./pipe/x".to_owned(),
            ..Default::default()
        };
        assert!(matches!(
            Host::open(&paths, ("n", "c")).await,
            Err(Error::Unsupported(_))
        ));
        let paths = Paths {
            stdout: "/nowhere/fifo".to_owned(),
            ..Default::default()
        };
        assert!(
            Host::open(&paths, ("n", "c"))
                .await
                .err()
                .unwrap()
                .to_string()
                .contains("/nowhere/fifo")
        );
    }
}
