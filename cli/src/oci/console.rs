//! A terminal on the host for a process in a guest.
//!
//! The caller gets the master; the process that stands for the one in the guest holds the slave
//! and copies between it and the guest's terminal, which does all a line discipline does. So the
//! slave is raw.

use std::{
    ffi::CString,
    fs::File,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{Mode, OFlags},
    process::ioctl_tiocsctty,
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{OptionalActions, Winsize, tcgetattr, tcgetwinsize, tcsetattr, tcsetwinsize},
};

use super::handshake::send_terminal;
use crate::error::Error;

/// A new terminal: master, raw slave, the slave's name.
///
/// # Errors
/// There are no terminals left.
pub fn pair(size: Option<(u16, u16)>) -> Result<(OwnedFd, File, CString), Error> {
    let failed = || Error::io::<rustix::io::Errno>("make a terminal");
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).map_err(failed())?;
    grantpt(&master).map_err(failed())?;
    unlockpt(&master).map_err(failed())?;
    let name = ptsname(&master, Vec::new()).map_err(failed())?;
    let slave = rustix::fs::open(
        name.as_c_str(),
        OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(failed())?;
    let mut settings = tcgetattr(&slave).map_err(failed())?;
    settings.make_raw();
    tcsetattr(&slave, OptionalActions::Now, &settings).map_err(failed())?;
    if let Some(size) = size {
        resize(&master, size)?;
    }
    Ok((master, slave.into(), name))
}

/// Sets rows and columns.
///
/// # Errors
/// It is no terminal.
pub fn resize(terminal: impl AsFd, (rows, columns): (u16, u16)) -> Result<(), Error> {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size).map_err(Error::io("set the terminal's size"))
}

/// Makes a terminal, hands its master to whoever listens at `socket`, and returns the slave.
///
/// # Errors
/// Nobody listens; there are no terminals left.
pub fn make(socket: &Path, size: Option<(u16, u16)>) -> Result<File, Error> {
    let (master, slave, name) = pair(size)?;
    send_terminal(socket, master.as_fd(), name.as_bytes())?;
    Ok(slave)
}

/// Makes the slave the terminal of this process, which leads a session: it is told of new sizes by
/// SIGWINCH.
///
/// # Errors
/// It is another session's.
pub fn adopt(slave: &File) -> Result<(), Error> {
    ioctl_tiocsctty(slave).map_err(Error::io("take the terminal"))
}

/// Rows and columns, if they are set.
pub fn size(terminal: &File) -> Option<(u16, u16)> {
    let size = tcgetwinsize(terminal).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        mem::MaybeUninit,
        os::unix::net::UnixListener,
    };

    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

    use super::*;

    #[test]
    fn the_master_goes_to_the_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let mut slave = make(&path, Some((7, 9))).unwrap();
        assert_eq!(size(&slave), Some((7, 9)));
        let (stream, _) = listener.accept().unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut name = [0; 64];
        recvmsg(
            &stream,
            &mut [std::io::IoSliceMut::new(&mut name)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )
        .unwrap();
        assert!(name.starts_with(b"/dev/pts/"));
        let mut master = ancillary
            .drain()
            .find_map(|message| match message {
                RecvAncillaryMessage::ScmRights(mut descriptors) => {
                    descriptors.next().map(File::from)
                }
                _ => None,
            })
            .unwrap();
        // Raw: nothing is echoed, and a control character is a byte like others.
        master.write_all(b"\x03\n").unwrap();
        let mut bytes = [0; 2];
        slave.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"\x03\n");
        slave.write_all(b"a\n").unwrap();
        master.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"a\n");
        assert!(make(&directory.path().join("nobody"), None).is_err());
    }
}
