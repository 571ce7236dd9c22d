//! Between a container's monitor and the `run` that started it.
//!
//! Two socket pairs: one for what happens, a JSON document a line; one for
//! bytes, framed. They are apart so that the container's end is heard although
//! nobody reads its output.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    sync::{Arc, mpsc},
    time::Duration,
};

use caisson_sandbox::scaled;
use serde::{Deserialize, Serialize};

use crate::{
    drain::{Output, Progress},
    error::Error,
    terminal,
};

/// What the monitor says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum News {
    /// The container's program runs.
    Started,
    /// It could not be started.
    Failed {
        /// Exit code for `run`.
        code: u8,
        /// Why.
        message: String,
    },
    /// It has ended; all its output is in the stream.
    Ended {
        /// Its exit code.
        code: u8,
        /// When it ended before its time: why.
        message: String,
    },
}

/// What `run` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wish {
    /// Send a signal to the program.
    Signal(u32),
    /// The terminal has this size.
    Size(u16, u16),
}

/// Kinds of frames.
pub const STDIN: u8 = 0;
/// Kinds of frames.
pub const STDOUT: u8 = 1;
/// Kinds of frames.
pub const STDERR: u8 = 2;

/// Most bytes of one frame.
pub const MAX_FRAME: usize = 32 * 1024;

/// Head of a frame: kind and length.
pub fn head(kind: u8, length: usize) -> [u8; 5] {
    let length = u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
    [kind, length[0], length[1], length[2], length[3]]
}

/// Kind and length of a frame.
///
/// # Errors
/// Longer than [`MAX_FRAME`].
pub fn parse_head(head: [u8; 5]) -> io::Result<(u8, usize)> {
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if length > MAX_FRAME {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok((head[0], length))
}

/// `run`'s ends.
pub struct Client {
    /// News and wishes.
    pub control: UnixStream,
    /// Bytes.
    pub stream: UnixStream,
}

/// Signals that `run` passes on.
const PASSED: [i32; 6] = [
    signal_hook::consts::SIGHUP,
    signal_hook::consts::SIGINT,
    signal_hook::consts::SIGQUIT,
    signal_hook::consts::SIGTERM,
    signal_hook::consts::SIGUSR1,
    signal_hook::consts::SIGUSR2,
];

/// SIGKILL, when nobody reads the output any more.
const KILL: u32 = 9;

/// Signals that are kept from ending this process, for the container to get them.
pub struct Signals(signal_hook::iterator::Signals);

impl Signals {
    /// From here on signals wait. Called before anything is made, so that none finds a half-made
    /// container.
    ///
    /// # Errors
    /// No descriptor left.
    pub fn hold(tty: bool) -> Result<Self, Error> {
        let mut wanted = PASSED.to_vec();
        if tty {
            wanted.push(signal_hook::consts::SIGWINCH);
        }
        signal_hook::iterator::Signals::new(wanted)
            .map(Self)
            .map_err(Error::io("watch for signals"))
    }
}

impl Client {
    /// Waits until the container runs, or says why it does not.
    ///
    /// # Errors
    /// [`News::Failed`] as [`Error::Exit`]; the monitor died.
    pub fn wait_for_start(&self) -> Result<(), Error> {
        match self.next()? {
            News::Started => Ok(()),
            News::Failed { code, message } => Err(Error::Exit { code, message }),
            News::Ended { code, message } => Err(Error::Exit { code, message }),
        }
    }

    /// The next news, unbuffered, so that what follows stays for the next reader.
    fn next(&self) -> Result<News, Error> {
        let mut line = Vec::new();
        let mut byte = [0];
        loop {
            match (&self.control).read(&mut byte) {
                Ok(1) if byte[0] == b'\n' => break,
                Ok(1) => line.push(byte[0]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => return Err(died()),
            }
        }
        serde_json::from_slice(&line).map_err(|_| died())
    }

    /// Passes signals and, with a terminal, its size on, for as long as the container's monitor takes them.
    ///
    /// # Errors
    /// No thread.
    pub fn pass(&self, mut signals: Signals) -> Result<(), Error> {
        let control = self
            .control
            .try_clone()
            .map_err(Error::io("copy a socket"))?;
        spawn("signals", move || {
            for signal in &mut signals.0 {
                let wish = match (signal, terminal::size()) {
                    (signal_hook::consts::SIGWINCH, Some((rows, columns))) => {
                        Wish::Size(rows, columns)
                    }
                    (signal_hook::consts::SIGWINCH, None) => continue,
                    (other, _) => Wish::Signal(other.unsigned_abs()),
                };
                if !send(&control, wish) && signal != signal_hook::consts::SIGWINCH {
                    // The container has ended; what is left to do is this process's.
                    let _ = signal_hook::low_level::emulate_default_handler(signal);
                }
            }
        })
    }

    /// Copies until the container has ended; its exit code.
    ///
    /// # Errors
    /// The monitor died.
    pub fn attach(self, interactive: bool, tty: bool) -> Result<u8, Error> {
        let raw = tty.then(terminal::Raw::enter).transpose()?;
        if tty && let Some((rows, columns)) = terminal::size() {
            send(&self.control, Wish::Size(rows, columns));
        }
        if interactive {
            let stream = self
                .stream
                .try_clone()
                .map_err(Error::io("copy a socket"))?;
            spawn("stdin", move || copy_stdin(stream))?;
        }
        let (done, drained) = mpsc::channel();
        let stream = self
            .stream
            .try_clone()
            .map_err(Error::io("copy a socket"))?;
        let control = self
            .control
            .try_clone()
            .map_err(Error::io("copy a socket"))?;
        let progress = Arc::new(Progress::default());
        let output = Output::new(stream, &progress);
        spawn("output", move || {
            copy_output(output, &control);
            let _ = done.send(());
        })?;
        let news = self.next();
        progress.outlast(scaled(Duration::from_secs(1)), |limit| {
            drained.recv_timeout(limit) != Err(mpsc::RecvTimeoutError::Timeout)
        });
        drop(raw);
        match news? {
            News::Ended { code, message } | News::Failed { code, message } => {
                if !message.is_empty() {
                    eprintln!("caisson: {message}");
                }
                Ok(code)
            }
            News::Started => Err(died()),
        }
    }
}

fn died() -> Error {
    Error::State(
        "the container's monitor was killed; `caisson ps -a` tells what became of the container"
            .to_owned(),
    )
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    let thread = std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(128 << 10);
    thread
        .spawn(work)
        .map(drop)
        .map_err(Error::io("start a thread"))
}

/// False: the monitor has gone, which who waits for its news notices.
fn send(mut control: &UnixStream, wish: Wish) -> bool {
    let Ok(mut line) = serde_json::to_vec(&wish) else {
        return true;
    };
    line.push(b'\n');
    control.write_all(&line).is_ok()
}

fn copy_stdin(mut stream: UnixStream) {
    let mut buffer = vec![0; MAX_FRAME];
    let mut stdin = io::stdin().lock();
    loop {
        match stdin.read(&mut buffer) {
            Ok(length @ 1..) => {
                let sent = stream
                    .write_all(&head(STDIN, length))
                    .and_then(|()| stream.write_all(&buffer[..length]));
                if sent.is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            _ => {
                let _ = stream.shutdown(Shutdown::Write);
                return;
            }
        }
    }
}

fn copy_output(stream: Output<UnixStream>, control: &UnixStream) {
    let mut stream = BufReader::with_capacity(MAX_FRAME + 5, stream);
    let mut buffer = vec![0; MAX_FRAME];
    let mut readers = true;
    let mut first = [0; 5];
    while stream.read_exact(&mut first).is_ok() {
        let Ok((kind, length)) = parse_head(first) else {
            return;
        };
        let Some(bytes) = buffer.get_mut(..length) else {
            return;
        };
        if stream.read_exact(bytes).is_err() {
            return;
        }
        if readers && write_out(kind, bytes).is_err() {
            // As in a pipeline: who writes to a reader that has left ends.
            readers = false;
            send(control, Wish::Signal(KILL));
        }
    }
}

fn write_out(kind: u8, bytes: &[u8]) -> io::Result<()> {
    if kind == STDERR {
        return io::stderr().write_all(bytes);
    }
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush())
}

/// Lines of JSON, for the monitor's side.
pub fn wishes(control: UnixStream) -> impl Iterator<Item = Wish> {
    BufReader::new(control)
        .lines()
        .map_while(Result::ok)
        .filter_map(|line| serde_json::from_str(&line).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn news_and_wishes_cross() {
        let (control, monitors_control) = UnixStream::pair().unwrap();
        let (stream, _monitors_stream) = UnixStream::pair().unwrap();
        let client = Client { control, stream };
        let mut writer = &monitors_control;
        writer
            .write_all(b"\"Started\"\n{\"Ended\":{\"code\":7,\"message\":\"\"}}\n")
            .unwrap();
        client.wait_for_start().unwrap();
        send(&client.control, Wish::Size(1, 2));
        assert_eq!(
            wishes(monitors_control.try_clone().unwrap()).next(),
            Some(Wish::Size(1, 2))
        );
        assert_eq!(
            client.next().unwrap(),
            News::Ended {
                code: 7,
                message: String::new()
            }
        );
        drop(monitors_control);
    }

    #[test]
    fn frames() {
        assert_eq!(parse_head(head(STDERR, 300)).unwrap(), (STDERR, 300));
        assert!(parse_head(head(STDOUT, MAX_FRAME + 1)).is_err());
    }
}
