//! Running a program with a deadline and keeping everything it says.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::deadline::{seconds, until};

/// How long a command may take unless it says otherwise, in bare-metal seconds.
const DEFAULT_LIMIT: f64 = 30.0;

/// A command about to be run.
pub struct Command {
    words: Vec<OsString>,
    stdin: Vec<u8>,
    limit: Duration,
    environment: Vec<(OsString, OsString)>,
}

impl Command {
    /// A command of the words given; the first is the program.
    pub fn new<I, S>(words: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        Self {
            words: words.into_iter().map(|w| w.as_ref().to_owned()).collect(),
            stdin: Vec::new(),
            limit: seconds(DEFAULT_LIMIT),
            environment: Vec::new(),
        }
    }

    /// What it reads from its standard input (nothing when this is not called).
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Its deadline in bare-metal seconds.
    #[must_use]
    pub fn within(mut self, limit: f64) -> Self {
        self.limit = seconds(limit);
        self
    }

    /// Adds a variable to its environment.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.environment
            .push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Starts it in a process group of its own.
    ///
    /// # Panics
    /// If the program cannot be started.
    pub fn start(self) -> Running {
        let title = self
            .words
            .iter()
            .map(|w| w.to_string_lossy())
            .collect::<Vec<_>>()
            .join(" ");
        let mut child = std::process::Command::new(&self.words[0])
            .args(&self.words[1..])
            .envs(self.environment)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start {title}: {error}"));
        let mut stdin = child.stdin.take().expect("stdin was piped");
        let bytes = self.stdin;
        // Not joined: a program that never reads would hold it, and its pipe closes with the program.
        std::thread::spawn(move || {
            let _ = stdin.write_all(&bytes);
        });
        let stdout = Capture::of(child.stdout.take().expect("stdout was piped"));
        let stderr = Capture::of(child.stderr.take().expect("stderr was piped"));
        Running {
            title,
            child,
            stdout,
            stderr,
            limit: self.limit,
            started: Instant::now(),
            finished: false,
        }
    }

    /// Runs it to its end.
    ///
    /// # Panics
    /// If it cannot be started or has not ended at its deadline (it is then killed).
    pub fn run(self) -> Finished {
        self.start().finish()
    }
}

/// A command that runs; killed when this is dropped.
pub struct Running {
    title: String,
    child: Child,
    stdout: Capture,
    stderr: Capture,
    limit: Duration,
    started: Instant,
    finished: bool,
}

impl Running {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal to the process alone, as `kill` does.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).unwrap_or_else(|e| panic!("cannot signal {}: {e}", self.title));
    }

    /// Sends a signal to its process group, as a terminal does for Ctrl-C.
    pub fn signal_group(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process_group(pid, signal)
            .unwrap_or_else(|e| panic!("cannot signal {}: {e}", self.title));
    }

    /// Waits until its standard output holds `text`.
    ///
    /// # Panics
    /// If it ends first or the text does not come before the deadline.
    pub fn wait_for_stdout(&mut self, text: &str) {
        let seen = until(self.limit, || {
            let ended = matches!(self.child.try_wait(), Ok(Some(_)));
            let found = contains(&self.stdout.so_far(), text.as_bytes());
            (found || ended).then_some(found)
        });
        // The last bytes may have arrived between the two questions.
        if seen != Some(true) && !contains(&self.stdout.so_far(), text.as_bytes()) {
            panic!(
                "{}: {text:?} was not printed\nstdout: {}\nstderr: {}",
                self.title,
                lossy(&self.stdout.so_far()),
                lossy(&self.stderr.so_far())
            );
        }
    }

    /// Whether it is still running.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// What its standard output has been so far.
    pub fn stdout_so_far(&self) -> String {
        lossy(&self.stdout.so_far())
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If it has not ended at its deadline (it is then killed).
    pub fn finish(mut self) -> Finished {
        let left = self.limit.saturating_sub(self.started.elapsed());
        let status = until(left, || self.child.try_wait().ok().flatten());
        let Some(status) = status else {
            let (out, err) = (self.stdout.so_far(), self.stderr.so_far());
            panic!(
                "{} has not ended within {:?}\nstdout: {}\nstderr: {}",
                self.title,
                self.limit,
                lossy(&out),
                lossy(&err)
            );
        };
        self.finished = true;
        Finished {
            title: self.title.clone(),
            status,
            elapsed: self.started.elapsed(),
            stdout: self.stdout.drain(),
            stderr: self.stderr.drain(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.finished {
            let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
            let _ = self.child.wait();
        }
    }
}

/// A pipe being read to its end by a thread, so that its writer never blocks on us.
struct Capture {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl Capture {
    fn of(mut pipe: impl Read + Send + 'static) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&bytes);
        let reader = std::thread::spawn(move || {
            let mut chunk = vec![0; 64 * 1024];
            while let Ok(n @ 1..) = pipe.read(&mut chunk) {
                sink.lock().unwrap().extend_from_slice(&chunk[..n]);
            }
        });
        Self {
            bytes,
            reader: Some(reader),
        }
    }

    fn so_far(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    /// All there was. A process left behind that holds the pipe open must not hold us: after a
    /// short wait we take what there is, and the leak check finds the process.
    fn drain(&mut self) -> Vec<u8> {
        if let Some(reader) = self.reader.take() {
            until(seconds(2.0), || reader.is_finished().then_some(()));
        }
        self.so_far()
    }
}

/// A command that has ended, and all that it said.
pub struct Finished {
    title: String,
    /// How it ended.
    pub status: ExitStatus,
    /// How long it ran.
    pub elapsed: Duration,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Finished {
    /// Its exit code; 128 + N when signal N ended it, as a shell says.
    pub fn code(&self) -> i32 {
        self.status
            .code()
            .or_else(|| self.status.signal().map(|n| 128 + n))
            .unwrap_or(-1)
    }

    /// Its standard output as text.
    pub fn stdout(&self) -> String {
        lossy(&self.stdout)
    }

    /// Its standard output as it was.
    pub fn stdout_bytes(&self) -> &[u8] {
        &self.stdout
    }

    /// Its standard error as text.
    pub fn stderr(&self) -> String {
        lossy(&self.stderr)
    }

    /// Its standard output without the white space around it.
    pub fn line(&self) -> String {
        self.stdout().trim().to_owned()
    }

    /// Its standard output as JSON.
    ///
    /// # Panics
    /// If it is not JSON.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.stdout)
            .unwrap_or_else(|error| panic!("not JSON ({error})\n{self}"))
    }

    /// Fails the test unless the exit code is `code`.
    ///
    /// # Panics
    /// If it is another.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert!(self.code() == code, "expected exit code {code}\n{self}");
        self
    }

    /// Fails the test unless the exit code is 0.
    ///
    /// # Panics
    /// If it is another.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.expect_code(0)
    }

    /// Fails the test unless it ended with exit code 0 and exactly this output.
    ///
    /// # Panics
    /// If it did not.
    #[track_caller]
    pub fn expect_stdout(self, text: &str) -> Self {
        assert!(
            self.code() == 0 && self.stdout() == text,
            "expected exit code 0 and output {text:?}\n{self}"
        );
        self
    }

    /// Fails the test unless standard output holds `text`.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn expect_in_stdout(self, text: &str) -> Self {
        assert!(
            self.stdout().contains(text),
            "expected {text:?} in the output\n{self}"
        );
        self
    }

    /// Fails the test unless it failed with an error that a person can act on: a code other than
    /// 0, and a message that holds each of `words` (without regard to case), is not a panic, and
    /// is short.
    ///
    /// # Panics
    /// If it did not.
    #[track_caller]
    pub fn expect_error(self, words: &[&str]) -> Self {
        let message = self.stderr();
        let lower = message.to_lowercase();
        assert!(self.code() != 0, "expected a failure\n{self}");
        for word in words {
            assert!(
                lower.contains(&word.to_lowercase()),
                "expected {word:?} in the error\n{self}"
            );
        }
        assert!(
            !lower.contains("panicked at") && !message.trim().is_empty(),
            "expected a clear error\n{self}"
        );
        assert!(
            message.lines().count() <= 60,
            "expected a short error\n{self}"
        );
        self
    }
}

impl fmt::Display for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  command: {}", self.title)?;
        writeln!(f, "  exit code: {} after {:?}", self.code(), self.elapsed)?;
        writeln!(f, "  stdout: {}", shortened(&self.stdout()))?;
        write!(f, "  stderr: {}", shortened(&self.stderr()))
    }
}

/// The path of a program in the directories of `PATH`.
pub fn find_program(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|directory| directory.join(name))
        .find(|candidate: &std::path::PathBuf| Path::is_file(candidate))
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    needle.is_empty()
        || haystack
            .windows(needle.len())
            .any(|window| window == needle)
}

fn shortened(text: &str) -> String {
    const MOST: usize = 4000;
    if text.chars().count() <= MOST {
        return text.to_owned();
    }
    let end: String = text.chars().skip(text.chars().count() - MOST).collect();
    format!("[{} bytes] ...{end}", text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_input_and_code_are_kept() {
        let finished = Command::new(["sh", "-c", "cat; echo err >&2; exit 3"])
            .stdin("in")
            .run();
        assert_eq!(finished.code(), 3);
        assert_eq!(finished.stdout(), "in");
        assert_eq!(finished.stderr(), "err\n");
    }

    #[test]
    fn death_by_signal_is_128_and_the_number() {
        assert_eq!(Command::new(["sh", "-c", "kill -9 $$"]).run().code(), 137);
    }

    #[test]
    #[should_panic(expected = "has not ended within")]
    fn a_deadline_ends_it() {
        Command::new(["sleep", "100"]).within(0.1).run();
    }

    #[test]
    #[should_panic(expected = "expected exit code 0")]
    fn a_wrong_code_fails() {
        Command::new(["false"]).run().ok();
    }

    #[test]
    fn output_can_be_awaited() {
        let mut running = Command::new(["sh", "-c", "echo ready; exec sleep 100"]).start();
        running.wait_for_stdout("ready");
        assert!(running.is_running());
        running.signal(Signal::TERM);
        assert_eq!(running.finish().code(), 143);
    }
}
