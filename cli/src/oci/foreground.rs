//! `exec` that waits: signals are passed on, and with a terminal the caller's is the program's.

use std::{
    fs::File,
    io::{self, Read, Write, stdin, stdout},
    os::fd::OwnedFd,
};

use rustix::process::{Pid, Signal, kill_process};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH},
    iterator::Signals,
};

use super::{console, handshake::Link};
use crate::{error::Error, terminal};

/// A terminal between the caller's and the one in the guest.
pub struct Terminal {
    master: OwnedFd,
    slave: File,
}

impl Terminal {
    /// A new one of the caller's size.
    ///
    /// # Errors
    /// There are none left.
    pub fn open() -> Result<Self, Error> {
        let (master, slave, _) = console::pair(terminal::size())?;
        Ok(Self { master, slave })
    }

    /// For the process that stands for the program.
    ///
    /// # Errors
    /// No descriptor left.
    pub fn slave(&self) -> Result<File, Error> {
        self.slave
            .try_clone()
            .map_err(Error::io("copy a descriptor"))
    }
}

/// Waits for the program's end; its exit code.
///
/// # Errors
/// Signals cannot be watched, or the caller's terminal cannot be set.
pub fn wait(link: Link, terminal: Option<Terminal>) -> Result<u8, Error> {
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH])
        .map_err(Error::io("watch for signals"))?;
    let pid = i32::try_from(link.pid).ok().and_then(Pid::from_raw);
    let copies = terminal.map(Copies::start).transpose()?;
    let master = copies
        .as_ref()
        .map(|copies| copies.master.try_clone())
        .transpose()
        .map_err(Error::io("copy a descriptor"))?;
    spawn(move || {
        for number in &mut signals {
            if number == SIGWINCH {
                if let (Some(master), Some(size)) = (&master, terminal::size()) {
                    let _ = console::resize(master, size);
                }
            } else if let (Some(pid), Some(signal)) = (pid, Signal::from_named_raw(number)) {
                // It may have ended at this moment.
                let _ = kill_process(pid, signal);
            }
        }
    })?;
    let code = link.wait()?;
    if let Some(copies) = copies {
        copies.finish();
    }
    Ok(code)
}

struct Copies {
    master: File,
    output: std::thread::JoinHandle<()>,
    raw: terminal::Raw,
}

impl Copies {
    fn start(terminal: Terminal) -> Result<Self, Error> {
        let master = File::from(terminal.master);
        let copy = || master.try_clone().map_err(Error::io("copy a descriptor"));
        let raw = terminal::Raw::enter()?;
        let (from, mut to) = (copy()?, copy()?);
        // The program's process holds its own: its end is the end of the output.
        drop(terminal.slave);
        let output = spawn(move || copy_output(from))?;
        spawn(move || {
            let _ = io::copy(&mut stdin().lock(), &mut to);
        })?;
        Ok(Self {
            master,
            output,
            raw,
        })
    }

    fn finish(self) {
        let _ = self.output.join();
        drop(self.raw);
    }
}

/// Until the slave's last holder has closed it, which reads as an error (EIO).
fn copy_output(mut from: File) {
    let mut buffer = vec![0; 32 * 1024];
    loop {
        match from.read(&mut buffer) {
            Ok(length @ 1..) => {
                let bytes = buffer.get(..length).unwrap_or_default();
                let mut out = stdout().lock();
                if out.write_all(bytes).and_then(|()| out.flush()).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            _ => return,
        }
    }
}

fn spawn(work: impl FnOnce() + Send + 'static) -> Result<std::thread::JoinHandle<()>, Error> {
    std::thread::Builder::new()
        .stack_size(128 << 10)
        .spawn(work)
        .map_err(Error::io("start a thread"))
}
