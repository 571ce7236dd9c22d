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

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxAttributes, StatxFlags};
use tokio::io::unix::AsyncFd;

const TABLE: &str = "/proc/self/mountinfo";

/// Ids of the mounts that are seen below a directory, by their paths relative to it.
pub type Mounts = BTreeMap<PathBuf, u64>;

/// The mounts below the directory. Blocks.
///
/// # Errors
/// The directory cannot be found, the table not be read.
pub fn below(directory: &Path) -> io::Result<Mounts> {
    let directory = directory.canonicalize()?;
    let all = of_table(&directory, &fs::read(TABLE)?);
    Ok(all
        .into_iter()
        .filter_map(|(path, ids)| {
            // Only if it is one of those: another's path is not to be trusted, whoever may write to
            // the directory can have put a link there.
            let seen = root_at(&directory.join(&path)).filter(|id| ids.contains(id))?;
            Some((path, seen))
        })
        .collect())
}

/// Ids by path. There are several where mounts are on one another, or hidden below one that is on a
/// directory above, in whatever order.
fn of_table(directory: &Path, table: &[u8]) -> BTreeMap<PathBuf, Vec<u64>> {
    let mut all: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for mount in lines(table) {
        if let Ok(relative) = mount.point.strip_prefix(directory)
            && !relative.as_os_str().is_empty()
        {
            all.entry(relative.to_owned()).or_default().push(mount.id);
        }
    }
    all
}

/// Id of the mount whose root the path leads to.
fn root_at(path: &Path) -> Option<u64> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    let found = rustix::fs::statx(CWD, path, flags, StatxFlags::MNT_ID).ok()?;
    let is_root = found.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
    is_root.then_some(found.stx_mnt_id)
}

/// Where `path` is beneath the root of the file system with this device number, if that is mounted.
/// Blocks.
///
/// # Errors
/// The table cannot be read.
pub fn place(device: u64, path: &Path) -> io::Result<Option<PathBuf>> {
    let device = format!(
        "{}:{}",
        rustix::fs::major(device),
        rustix::fs::minor(device)
    );
    Ok(place_in(&fs::read(TABLE)?, &device, path))
}

fn place_in(table: &[u8], device: &str, path: &Path) -> Option<PathBuf> {
    let mounts = lines(table).filter(|mount| mount.device == device.as_bytes());
    let places = mounts.filter_map(|mount| {
        let below = path.strip_prefix(&mount.point).ok()?;
        Some((mount.point.as_os_str().len(), mount.root.join(below)))
    });
    // Of several on one point the last is on top.
    let (_, place) = places.max_by_key(|(length, _)| *length)?;
    Some(place.strip_prefix("/").ok()?.components().collect())
}

struct Line<'a> {
    id: u64,
    /// "major:minor".
    device: &'a [u8],
    /// What of the file system is mounted.
    root: PathBuf,
    /// Where.
    point: PathBuf,
}

fn lines(table: &[u8]) -> impl Iterator<Item = Line<'_>> {
    let lines = table.split(|byte| *byte == b'\n');
    lines.filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b' ');
        Some(Line {
            id: str::from_utf8(fields.next()?).ok()?.parse().ok()?,
            device: fields.nth(1)?,
            root: unescape(fields.next()?),
            point: unescape(fields.next()?),
        })
    })
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
            list.map(|(path, ids)| (path.display().to_string(), ids))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            found("/srv"),
            [
                ("a b/c".to_owned(), vec![23]),
                ("other".to_owned(), vec![24, 25])
            ]
        );
        assert_eq!(found("/srv/a b"), [("c".to_owned(), vec![23])]);
        for other in ["/srv/a b/c", "/srv/othe", "/srv/other", "/home"] {
            assert_eq!(found(other), [], "{other}");
        }
    }

    #[test]
    fn a_directory_has_its_place() {
        let table = b"22 1 8:1 / / rw - ext4 /dev/a rw\n\
            23 22 0:5 / /srv/a\\040b rw - hugetlbfs x rw\n\
            24 22 0:5 /in/side /srv/part rw - hugetlbfs x rw\n";
        let at = |path: &str| place_in(table, "0:5", Path::new(path));
        assert_eq!(at("/srv/a b").as_deref(), Some(Path::new("")));
        assert_eq!(at("/srv/a b/c/d").as_deref(), Some(Path::new("c/d")));
        assert_eq!(at("/srv/part").as_deref(), Some(Path::new("in/side")));
        assert_eq!(at("/srv/part/x").as_deref(), Some(Path::new("in/side/x")));
        assert_eq!(at("/srv"), None);
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
