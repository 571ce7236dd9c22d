//! Host directories whose contents are replaced all at once by swapping the link `..data`, as kubelet
//! does for configMaps, secrets, tokens and downward API: read as a whole, and watched for the next
//! swap. The guest gets copies of them, since through a share its watches would see no change.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::OwnedFd,
    path::Path,
    time::Duration,
};

use caisson_protocol::{
    agent::{PublishedEntry, published_entry::Kind},
    limits::{MAX_PUBLISHED, PUBLISHED_ENTRY},
};
use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags},
    io::Errno,
};

use crate::{
    deadline::scaled,
    watches::{Watch, Watches},
};

/// The link that is swapped.
const DATA: &str = "..data";

/// How often a directory that is swapped while it is read is read again.
const ATTEMPTS: usize = 10;

/// Between two looks at a directory that cannot be watched: the host has only so many watches
/// (inotify(7), `fs.inotify`). kubelet itself looks once a minute.
const INTERVAL: Duration = Duration::from_secs(2);

/// All that a published directory holds: those before what is in them, itself first.
pub type Contents = Vec<PublishedEntry>;

/// Whether the directory may be one: cheap, and nothing to rely on.
pub fn has_link(directory: &Path) -> bool {
    directory.join(DATA).is_symlink()
}

/// Reads the directory. None: it is not one that is published by a swap, or holds what a copy cannot
/// (more than [`MAX_PUBLISHED`], devices, names that are not UTF-8). Blocks.
///
/// # Errors
/// It cannot be read.
pub fn read(directory: &Path) -> io::Result<Option<Contents>> {
    let root = rustix::fs::open(directory, flags(OFlags::DIRECTORY), Mode::empty())?;
    for _ in 0..ATTEMPTS {
        let Some(version) = version_of(&root) else {
            return Ok(None);
        };
        let mut reading = Reading::default();
        let result = reading.read(&root, &version);
        // Else it was swapped meanwhile, and what was read is of both or has gone.
        if version_of(&root).as_ref() == Some(&version) {
            return match result {
                Ok(()) => Ok(Some(reading.entries)),
                Err(Unread::Unfit) => Ok(None),
                Err(Unread::Failed(error)) => Err(error.into()),
            };
        }
    }
    Err(io::Error::other("it changes faster than it can be read"))
}

/// Where the link leads: a directory beside it whose name begins with two dots.
fn version_of(root: &OwnedFd) -> Option<String> {
    let target = rustix::fs::readlinkat(root, DATA, Vec::new()).ok()?;
    let target = target.into_string().ok()?;
    let beside = target.starts_with("..") && target != ".." && !target.contains('/');
    beside.then_some(target)
}

fn flags(more: OFlags) -> OFlags {
    OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | more
}

enum Unread {
    Unfit,
    Failed(Errno),
}

impl From<Errno> for Unread {
    fn from(error: Errno) -> Self {
        Self::Failed(error)
    }
}

#[derive(Default)]
struct Reading {
    entries: Contents,
    size: usize,
}

impl Reading {
    fn read(&mut self, root: &OwnedFd, version: &str) -> Result<(), Unread> {
        self.add(String::new(), root, Kind::Directory(true), 0)?;
        // Other versions are about to come or to go.
        self.read_below(root, "", |name| {
            !name.starts_with("..") || name == DATA || name == version
        })
    }

    fn read_below(
        &mut self,
        directory: &OwnedFd,
        path: &str,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<(), Unread> {
        for child in Dir::read_from(directory)? {
            let child = child?;
            let Ok(name) = child.file_name().to_str() else {
                return Err(Unread::Unfit);
            };
            if name == "." || name == ".." || !wanted(name) {
                continue;
            }
            let path = match path {
                "" => name.to_owned(),
                above => format!("{above}/{name}"),
            };
            self.read_child(directory, name, path)?;
        }
        Ok(())
    }

    fn read_child(&mut self, parent: &OwnedFd, name: &str, path: String) -> Result<(), Unread> {
        let found = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
        match FileType::from_raw_mode(found.st_mode) {
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(parent, name, Vec::new())?;
                let target = target.into_string().map_err(|_| Unread::Unfit)?;
                let length = target.len();
                self.add_found(path, &found, Kind::Link(target), length)
            }
            FileType::Directory => {
                let opened =
                    rustix::fs::openat(parent, name, flags(OFlags::DIRECTORY), Mode::empty())?;
                self.add(path.clone(), &opened, Kind::Directory(true), 0)?;
                self.read_below(&opened, &path, |_| true)
            }
            FileType::RegularFile => {
                let opened =
                    rustix::fs::openat(parent, name, flags(OFlags::empty()), Mode::empty())?;
                let contents = self.contents_of(&opened)?;
                let length = contents.len();
                self.add(path, &opened, Kind::File(contents), length)
            }
            _ => Err(Unread::Unfit),
        }
    }

    /// At most what there is still room for, and a byte more to tell that it is more.
    fn contents_of(&self, file: &OwnedFd) -> Result<Vec<u8>, Unread> {
        let room = u64::try_from(MAX_PUBLISHED - self.size).unwrap_or(0);
        let file = File::from(file.try_clone().map_err(|_| Errno::MFILE)?);
        let mut contents = Vec::new();
        file.take(room + 1)
            .read_to_end(&mut contents)
            .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        Ok(contents)
    }

    fn add(
        &mut self,
        path: String,
        opened: &OwnedFd,
        kind: Kind,
        length: usize,
    ) -> Result<(), Unread> {
        let found = rustix::fs::fstat(opened)?;
        self.add_found(path, &found, kind, length)
    }

    fn add_found(
        &mut self,
        path: String,
        found: &rustix::fs::Stat,
        kind: Kind,
        length: usize,
    ) -> Result<(), Unread> {
        self.size += PUBLISHED_ENTRY + path.len() + length;
        if self.size > MAX_PUBLISHED {
            return Err(Unread::Unfit);
        }
        self.entries.push(PublishedEntry {
            path,
            mode: found.st_mode & 0o7777,
            uid: found.st_uid,
            gid: found.st_gid,
            kind: Some(kind),
            ..Default::default()
        });
        Ok(())
    }
}

/// Tells when a directory may have changed.
pub enum Changes {
    /// By the kernel.
    Told(Watch),
    /// Nobody tells: look from time to time.
    Unknown,
}

impl Changes {
    /// Of the directory, from now on.
    pub fn of(directory: &Path, watches: &Watches) -> Self {
        watches.watch(directory).map_or_else(
            |error| {
                log::warn!(
                    "{} cannot be watched ({error}; see fs.inotify in sysctl): it is looked at every {} s",
                    directory.display(),
                    INTERVAL.as_secs()
                );
                Self::Unknown
            },
            Self::Told,
        )
    }

    /// Comes back after a change, however many there were; false when the directory has gone.
    pub async fn next(&mut self) -> bool {
        match self {
            Self::Told(watch) => watch.next().await,
            Self::Unknown => {
                tokio::time::sleep(scaled(INTERVAL)).await;
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{PermissionsExt, symlink},
    };

    use super::*;

    fn publish(directory: &Path, version: &str) {
        let place = directory.join(version);
        fs::create_dir_all(place.join("nested")).unwrap();
        fs::write(place.join("key"), version).unwrap();
        fs::set_permissions(place.join("key"), PermissionsExt::from_mode(0o640)).unwrap();
        fs::write(place.join("nested/other"), version).unwrap();
        symlink(version, directory.join("..data_tmp")).unwrap();
        fs::rename(directory.join("..data_tmp"), directory.join(DATA)).unwrap();
    }

    fn paths(contents: &Contents) -> Vec<&str> {
        let mut paths: Vec<_> = contents.iter().map(|entry| entry.path.as_str()).collect();
        paths.sort_unstable();
        paths
    }

    #[test]
    fn the_published_version_is_read_and_no_other() {
        let place = tempfile::tempdir().unwrap();
        publish(place.path(), "..1");
        symlink("..data/key", place.path().join("key")).unwrap();
        publish(place.path(), "..2");
        let contents = read(place.path()).unwrap().unwrap();
        assert_eq!(
            paths(&contents),
            [
                "",
                "..2",
                "..2/key",
                "..2/nested",
                "..2/nested/other",
                "..data",
                "key"
            ]
        );
        let file = contents
            .iter()
            .find(|entry| entry.path == "..2/key")
            .unwrap();
        assert_eq!(file.mode, 0o640);
        assert_eq!(file.kind, Some(Kind::File(b"..2".to_vec())));
        let position = |path: &str| contents.iter().position(|entry| entry.path == path);
        assert!(position("..2/nested") < position("..2/nested/other"));
    }

    #[test]
    fn other_directories_are_left_to_the_share() {
        let place = tempfile::tempdir().unwrap();
        assert!(read(place.path()).unwrap().is_none(), "no link");
        for target in ["/etc", "..", "a", "../x", "..a/b"] {
            let link = place.path().join(DATA);
            let _ = fs::remove_file(&link);
            symlink(target, link).unwrap();
            assert!(read(place.path()).unwrap().is_none(), "{target}");
        }
        fs::remove_file(place.path().join(DATA)).unwrap();
        publish(place.path(), "..1");
        let large = File::create(place.path().join("..1/large")).unwrap();
        assert!(read(place.path()).unwrap().is_some());
        large.set_len(MAX_PUBLISHED as u64).unwrap();
        assert!(read(place.path()).unwrap().is_none(), "too large");
        assert!(read(&place.path().join("nowhere")).is_err());
    }

    #[tokio::test]
    async fn a_swap_is_told_and_the_end_too() {
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().join("volume");
        fs::create_dir(&directory).unwrap();
        let mut changes = Changes::of(&directory, &Watches::default());
        publish(&directory, "..1");
        assert!(changes.next().await);
        fs::remove_dir_all(&directory).unwrap();
        while changes.next().await {}
    }
}
