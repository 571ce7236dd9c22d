//! What the host has mounted where (proc_pid_mountinfo(5)).

use std::{
    collections::BTreeMap,
    fs, io,
    os::{
        fd::OwnedFd,
        unix::ffi::{OsStrExt, OsStringExt},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use tokio::io::unix::AsyncFd;

const TABLE: &str = "/proc/self/mountinfo";

/// Ids of the mounts below a directory by their paths relative to it; where several are on one
/// another, of the last.
pub type Mounts = BTreeMap<PathBuf, u64>;

/// The mounts below the directory. Blocks.
///
/// # Errors
/// The directory cannot be found, the table not be read.
pub fn below(directory: &Path) -> io::Result<Mounts> {
    let directory = directory.canonicalize()?;
    Ok(of_table(&directory, &fs::read(TABLE)?))
}

fn of_table(directory: &Path, table: &[u8]) -> Mounts {
    let lines = table.split(|byte| *byte == b'\n');
    lines
        .filter_map(|line| {
            let mut fields = line.split(|byte| *byte == b' ');
            let id = str::from_utf8(fields.next()?).ok()?.parse().ok()?;
            let point = unescape(fields.nth(3)?);
            let relative = Path::new(&point).strip_prefix(directory).ok()?;
            let below = !relative.as_os_str().is_empty();
            below.then(|| (relative.to_owned(), id))
        })
        .collect()
}

/// Space, tab, newline and backslash are octal numbers there.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let number = match tail {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] if *first == b'\\' => {
                Some((a - b'0') * 64 + (b - b'0') * 8 + (c - b'0'))
            }
            _ => None,
        };
        bytes.push(number.unwrap_or(*first));
        rest = if number.is_some() { &tail[3..] } else { tail };
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

/// Opens the root of the mount with this id; none if the path leads elsewhere (another one is over
/// it by now). Blocks.
///
/// # Errors
/// The path cannot be opened.
pub fn open(path: &Path, id: u64) -> io::Result<Option<OwnedFd>> {
    let opened = rustix::fs::open(
        path.as_os_str().as_bytes(),
        OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW,
        Mode::empty(),
    )?;
    let found = rustix::fs::statx(&opened, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
    Ok((found.stx_mnt_id == id).then_some(opened))
}

/// Tells when something was mounted or unmounted anywhere.
pub struct Changes(AsyncFd<OwnedFd>);

impl Changes {
    /// From now on.
    ///
    /// # Errors
    /// The table cannot be opened.
    pub fn watch() -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let table = rustix::fs::open(TABLE, flags, Mode::empty())?;
        // SAFETY: an OwnedFd names one open descriptor, the same one, until it is dropped, and the
        // AsyncFd that owns it takes it out of epoll before that.
        let watched = unsafe { AsyncFd::register(table) };
        Ok(Self(watched.map_err(io::Error::from)?))
    }

    /// Comes back after a change, however many there were, and once more than there are.
    ///
    /// # Errors
    /// The event loop ends.
    pub async fn next(&mut self) -> io::Result<()> {
        // The file can be read at any time: what counts is that the kernel says so anew.
        self.0.readable().await?.clear_ready();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_below_and_not_beside() {
        let table = b"22 1 8:1 / / rw - ext4 /dev/a rw\n\
            23 22 0:5 / /srv/a\\040b/c rw - tmpfs x rw\n\
            24 22 0:6 / /srv/other rw - tmpfs x rw\n\
            25 24 0:7 / /srv/other rw - tmpfs over rw\n";
        let found = |path: &str| {
            let mounts = of_table(Path::new(path), table);
            let list = mounts.into_iter();
            list.map(|(path, id)| (path.display().to_string(), id))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            found("/srv"),
            [("a b/c".to_owned(), 23), ("other".to_owned(), 25)]
        );
        assert_eq!(found("/srv/a b"), [("c".to_owned(), 23)]);
        for other in ["/srv/a b/c", "/srv/othe", "/srv/other", "/home"] {
            assert_eq!(found(other), [], "{other}");
        }
    }

    #[test]
    fn the_mount_that_is_meant_is_opened() {
        let id = rustix::fs::statx(
            rustix::fs::CWD,
            "/proc",
            AtFlags::empty(),
            StatxFlags::MNT_ID,
        );
        let id = id.unwrap().stx_mnt_id;
        assert!(open(Path::new("/proc"), id).unwrap().is_some());
        assert!(open(Path::new("/proc"), id + 1).unwrap().is_none());
        assert!(open(Path::new("/nowhere"), id).is_err());
        assert!(
            below(Path::new("/"))
                .unwrap()
                .contains_key(Path::new("proc"))
        );
    }
}
