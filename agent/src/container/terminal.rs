//! The pseudo-terminal of a container's process, of the container's own devpts.

use std::os::fd::{AsFd, OwnedFd};

use rustix::{
    fs::{Mode, OFlags, openat},
    pty::{grantpt, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

use super::init::Sync;
use crate::failure::{During, Result};

/// Opens a pseudo-terminal, sends its master to the agent and returns the slave.
///
/// `devpts` is the container's /dev/pts when the process is not in its root yet.
///
/// # Errors
/// No devpts, or no pseudo-terminal left.
pub fn open(sync: &Sync, (rows, columns): (u16, u16), devpts: Option<&OwnedFd>) -> Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master = match devpts {
        Some(devpts) => openat(devpts, "ptmx", flags, Mode::empty()),
        None => openat(rustix::fs::CWD, "/dev/pts/ptmx", flags, Mode::empty()),
    }
    .during(|| "open the container's /dev/pts/ptmx".to_owned())?;
    grantpt(&master).during(|| "grant the terminal".to_owned())?;
    unlockpt(&master).during(|| "unlock the terminal".to_owned())?;
    let slave = rustix::pty::ioctl_tiocgptpeer(
        &master,
        rustix::pty::OpenptFlags::RDWR
            | rustix::pty::OpenptFlags::NOCTTY
            | rustix::pty::OpenptFlags::CLOEXEC,
    )
    .during(|| "open the terminal's slave".to_owned())?;
    if rows > 0 && columns > 0 {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&slave, size).during(|| "set the terminal's size".to_owned())?;
    }
    sync.terminal(master.as_fd())?;
    Ok(slave)
}

/// Makes `slave` the controlling terminal and the three standard streams.
///
/// # Errors
/// Those of setsid(2) and TIOCSCTTY.
pub fn adopt(slave: &OwnedFd) -> Result<()> {
    rustix::process::ioctl_tiocsctty(slave)
        .during(|| "take the controlling terminal".to_owned())?;
    rustix::stdio::dup2_stdin(slave)
        .and_then(|()| rustix::stdio::dup2_stdout(slave))
        .and_then(|()| rustix::stdio::dup2_stderr(slave))
        .during(|| "connect the terminal".to_owned())
}
