//! A process's streams on the host: containerd's FIFOs and files on one side, connections to the
//! guest on the other.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use caisson_sandbox::Streams;
use tokio::{
    fs::File,
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{UnixStream, unix::pipe},
    sync::Notify,
    task::JoinSet,
};

use crate::error::Error;

/// Bytes copied at a time.
const CHUNK: usize = 32 * 1024;

/// Where containerd wants a process's streams.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Paths {
    /// One terminal; stderr is not used then.
    pub terminal: bool,
    /// A FIFO, or empty.
    pub stdin: String,
    /// A FIFO, `file:///path`, or empty.
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
            stderr: !self.stderr.is_empty(),
        }
    }
}

/// Ends of the host's side, opened before the process exists, so that a wrong path fails early.
pub struct Host {
    stdin: Option<pipe::Receiver>,
    stdout: Option<Sink>,
    stderr: Option<Sink>,
}

enum Sink {
    Fifo(pipe::Sender),
    File(File),
}

impl Host {
    /// Opens `paths`.
    ///
    /// # Errors
    /// A path that is not there, or a scheme that is not supported.
    pub async fn open(paths: &Paths) -> Result<Self, Error> {
        let stdin = match paths.stdin.as_str() {
            "" => None,
            path => {
                let path = local(path)?;
                // Does not wait for a writer; its absence is not the end of the stream.
                let opened = pipe::OpenOptions::new().open_receiver(&path);
                Some(opened.map_err(Error::file("open the FIFO", path))?)
            }
        };
        Ok(Self {
            stdin,
            stdout: sink(&paths.stdout).await?,
            stderr: if paths.terminal {
                None
            } else {
                sink(&paths.stderr).await?
            },
        })
    }
}

/// containerd writes a FIFO's path bare or as `fifo://`.
fn local(uri: &str) -> Result<PathBuf, Error> {
    match uri.split_once("://") {
        None => Ok(uri.into()),
        Some(("fifo" | "file", path)) => Ok(path.split('?').next().unwrap_or(path).into()),
        Some((scheme, _)) => Err(Error::Unsupported(format!(
            "standard streams by {scheme}:// are not supported ({uri})"
        ))),
    }
}

async fn sink(uri: &str) -> Result<Option<Sink>, Error> {
    if uri.is_empty() {
        return Ok(None);
    }
    let path = local(uri)?;
    if uri.starts_with("file://") {
        return append(&path).await.map(|file| Some(Sink::File(file)));
    }
    // Both ways: without a reader the process waits (as under runc) instead of dying of SIGPIPE.
    let opened = pipe::OpenOptions::new().read_write(true).open_sender(&path);
    Ok(Some(Sink::Fifo(
        opened.map_err(Error::file("open the FIFO", path))?,
    )))
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
    close_stdin: Arc<Notify>,
}

impl Pumps {
    /// Starts copying between `host` and `guest`.
    pub fn start(host: Host, guest: Streams) -> Self {
        let close_stdin = Arc::new(Notify::new());
        let (mut outputs, mut inputs) = (JoinSet::new(), JoinSet::new());
        if let Some(terminal) = guest.terminal {
            let (from_guest, to_guest) = terminal.into_split();
            if let Some(stdin) = host.stdin {
                let close = close_stdin.clone();
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
                let close = close_stdin.clone();
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
            close_stdin,
        }
    }

    /// Told to end the process's stdin once what is in the FIFO has been sent.
    pub fn stdin_closer(&self) -> Arc<Notify> {
        self.close_stdin.clone()
    }

    /// Waits until all output has been written, then stops reading input.
    pub async fn drained(&mut self) {
        while self.outputs.join_next().await.is_some() {}
        self.inputs.abort_all();
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
    while let Ok(length @ 1..) = from.try_read(&mut buffer) {
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
            Some(Sink::Fifo(fifo)) => copy(from, fifo).await,
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
        let host = Host::open(&paths).await.unwrap();
        let (guest_stdin, mut agent_stdin) = UnixStream::pair().unwrap();
        let (guest_stdout, mut agent_stdout) = UnixStream::pair().unwrap();
        let streams = Streams {
            stdin: Some(guest_stdin),
            stdout: Some(guest_stdout),
            ..Default::default()
        };
        let mut pumps = Pumps::start(host, streams);
        let mut reader = pipe::OpenOptions::new()
            .open_receiver(&paths.stdout)
            .unwrap();
        let mut writer = pipe::OpenOptions::new().open_sender(&paths.stdin).unwrap();
        writer.write_all(b"question").await.unwrap();
        let mut text = [0; 8];
        agent_stdin.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"question");
        pumps.stdin_closer().notify_one();
        assert_eq!(agent_stdin.read(&mut text).await.unwrap(), 0, "half-closed");
        agent_stdout.write_all(b"answer").await.unwrap();
        drop(agent_stdout);
        pumps.drained().await;
        let mut text = [0; 6];
        reader.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"answer");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_stdin_without_a_writer_is_not_at_its_end() {
        let directory = tempfile::tempdir().unwrap();
        let paths = Paths {
            stdin: fifo(directory.path(), "in"),
            ..Default::default()
        };
        let host = Host::open(&paths).await.unwrap();
        let (guest_stdin, mut agent_stdin) = UnixStream::pair().unwrap();
        let _pumps = Pumps::start(
            host,
            Streams {
                stdin: Some(guest_stdin),
                ..Default::default()
            },
        );
        let mut byte = [0; 1];
        let early =
            tokio::time::timeout(Duration::from_millis(50), agent_stdin.read(&mut byte)).await;
        assert!(early.is_err());
        let writer = std::fs::File::options()
            .write(true)
            .open(&paths.stdin)
            .unwrap();
        drop(writer);
        assert_eq!(agent_stdin.read(&mut byte).await.unwrap(), 0);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn unknown_schemes_are_refused() {
        let paths = Paths {
            stdout: "npipe:////./pipe/x".to_owned(),
            ..Default::default()
        };
        assert!(matches!(
            Host::open(&paths).await,
            Err(Error::Unsupported(_))
        ));
        let paths = Paths {
            stdout: "/nowhere/fifo".to_owned(),
            ..Default::default()
        };
        assert!(
            Host::open(&paths)
                .await
                .err()
                .unwrap()
                .to_string()
                .contains("/nowhere/fifo")
        );
    }
}
