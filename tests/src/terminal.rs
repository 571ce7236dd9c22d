//! A person at a terminal: a pseudo-terminal with a program on it, keys and a screen.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::deadline::{seconds, until};

/// A program that has a terminal of its own as its controlling terminal.
pub struct Terminal {
    master: File,
    child: Child,
    screen: Arc<Mutex<Vec<u8>>>,
    /// How much of the screen [`Terminal::expect`] has consumed.
    seen: usize,
    limit: Duration,
}

impl Terminal {
    /// Starts a program on a new terminal of 24 rows and 80 columns.
    ///
    /// # Panics
    /// If the terminal or the program cannot be started.
    pub fn start<I, S>(words: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
            .expect("a new pseudo-terminal");
        grantpt(&master).expect("grantpt");
        unlockpt(&master).expect("unlockpt");
        let name = ptsname(&master, Vec::new()).expect("ptsname");
        let slave = OpenOptions::new()
            .read(true)
            .write(true)
            .open(name.to_str().expect("a terminal's name is ASCII"))
            .expect("the terminal's other end");
        let side = || Stdio::from(slave.try_clone().expect("duplicate the terminal"));
        // setsid makes the terminal on its standard input the controlling one.
        let child = std::process::Command::new("setsid")
            .arg("--ctty")
            .args(words)
            .env("TERM", "xterm")
            .stdin(side())
            .stdout(side())
            .stderr(side())
            .spawn()
            .expect("start setsid (util-linux)");
        let master = File::from(master);
        let screen = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&screen);
        let mut reader = master.try_clone().expect("duplicate the terminal");
        std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            // Reading fails with EIO once nobody holds the other end.
            while let Ok(n @ 1..) = reader.read(&mut chunk) {
                sink.lock().unwrap().extend_from_slice(&chunk[..n]);
            }
        });
        let terminal = Self {
            master,
            child,
            screen,
            seen: 0,
            limit: seconds(30.0),
        };
        terminal.resize(24, 80);
        terminal
    }

    /// Changes its size; the program gets SIGWINCH.
    pub fn resize(&self, rows: u16, columns: u16) {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&self.master, size).expect("resize the terminal");
    }

    /// Types.
    pub fn send(&mut self, keys: impl AsRef<[u8]>) {
        self.master.write_all(keys.as_ref()).expect("type");
    }

    /// Waits for `text` after what was expected before, and gives what came up to its end.
    ///
    /// # Panics
    /// If it does not come before the deadline.
    #[track_caller]
    pub fn expect(&mut self, text: &str) -> String {
        let needle = text.as_bytes();
        let found = until(self.limit, || {
            let screen = self.screen.lock().unwrap();
            let rest = &screen[self.seen..];
            rest.windows(needle.len())
                .position(|window| window == needle)
                .map(|at| at + needle.len())
        });
        let Some(length) = found else {
            panic!("{text:?} did not appear on the terminal:\n{}", self.all());
        };
        let screen = self.screen.lock().unwrap();
        let part = String::from_utf8_lossy(&screen[self.seen..self.seen + length]).into_owned();
        self.seen += length;
        part
    }

    /// Everything that has appeared so far.
    pub fn all(&self) -> String {
        String::from_utf8_lossy(&self.screen.lock().unwrap()).into_owned()
    }

    /// Waits for the program's end and gives its exit code (128 + N for signal N).
    ///
    /// # Panics
    /// If it has not ended at the deadline.
    #[track_caller]
    pub fn finish(mut self) -> i32 {
        use std::os::unix::process::ExitStatusExt;
        let status = until(self.limit, || self.child.try_wait().ok().flatten());
        match status {
            Some(status) => status
                .code()
                .or_else(|| status.signal().map(|n| 128 + n))
                .unwrap_or(-1),
            None => panic!(
                "the program has not ended; its terminal shows:\n{}",
                self.all()
            ),
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_gets_a_controlling_terminal_with_a_size() {
        let mut terminal = Terminal::start([
            "sh",
            "-c",
            "stty size </dev/tty; read line; echo got $line; stty size; exit 4",
        ]);
        terminal.expect("24 80");
        terminal.resize(30, 100);
        terminal.send("keys\r");
        terminal.expect("got keys");
        terminal.expect("30 100");
        assert_eq!(terminal.finish(), 4);
    }

    #[test]
    fn control_c_is_a_signal() {
        let mut terminal = Terminal::start(["sh", "-c", "echo ready; exec sleep 100"]);
        terminal.expect("ready");
        // The shell has to become `sleep` before the key arrives only for a tidy exit code.
        terminal.send([3]);
        assert_eq!(terminal.finish(), 130);
    }
}
