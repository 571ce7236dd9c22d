//! Copies of published volumes: host directories whose contents are replaced all at once by
//! swapping the link `..data`, as kubelet does for configMaps, secrets, tokens and downward API.
//!
//! They are copies in the guest's memory, not shares, because FUSE has no message by which the host
//! could tell a guest's watches (inotify) of a change. A new state is made in kubelet's own order:
//! new files, the link over, links to new keys, and away with what is old.

use std::{
    collections::HashSet,
    fs,
    io::{Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use caisson_protocol::agent::{PublishedEntry, PublishedVolume, published_entry::Kind};
use rustix::{
    fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Uid},
    io::Errno,
};

use super::paths;
use crate::{
    boot,
    failure::{During, Failure, Result},
};

/// Brings a volume's copy to this state, and makes it if there is none.
///
/// # Errors
/// A path that leads out of the volume, no memory left.
pub fn publish(volume: &PublishedVolume) -> Result<()> {
    let directory = directory_of(volume.number);
    fs::create_dir_all(&directory).during(|| format!("make {}", directory.display()))?;
    let root = rustix::fs::open(
        &directory,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .during(|| format!("open {}", directory.display()))?;
    Copy { root: root.as_fd() }
        .bring_to(&volume.entries)
        .map_err(|failure| {
            Failure::new(
                failure.kind,
                format!("published volume {}: {}", volume.number, failure.message),
            )
        })
}

/// Removes a volume's copy; none is as good.
///
/// # Errors
/// It cannot be removed.
pub fn withdraw(number: u32) -> Result<()> {
    let directory = directory_of(number);
    match fs::remove_dir_all(&directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).during(|| format!("remove {}", directory.display()))
        }
        _ => Ok(()),
    }
}

fn directory_of(number: u32) -> PathBuf {
    Path::new(boot::PUBLISHED_DIR).join(number.to_string())
}

/// A container may write to its copy where its mount allows that: every name in it is found
/// without leaving it ([`paths`]).
struct Copy<'a> {
    root: BorrowedFd<'a>,
}

impl Copy<'_> {
    fn bring_to(&self, entries: &[PublishedEntry]) -> Result<()> {
        let mut links = Vec::new();
        for entry in entries {
            match &entry.kind {
                Some(Kind::Directory(_)) => self.put_directory(entry)?,
                Some(Kind::File(contents)) => self.put_file(entry, contents)?,
                Some(Kind::Link(target)) => links.push((entry, target)),
                _ => return Err(Failure::invalid(format!("{:?} is of no kind", entry.path))),
            }
        }
        // Those that are there and change before those that need the change.
        let (there, new): (Vec<_>, Vec<_>) = links
            .into_iter()
            .partition(|(entry, _)| self.target_of(&entry.path).is_some());
        for (entry, target) in there.into_iter().chain(new) {
            self.put_link(entry, target)?;
        }
        let wanted = entries.iter().map(|entry| entry.path.as_str()).collect();
        self.keep_only("", &wanted)
    }

    fn put_directory(&self, entry: &PublishedEntry) -> Result<()> {
        if !entry.path.is_empty() {
            let (parent, name) = self.place(&entry.path)?;
            match rustix::fs::mkdirat(&parent, name, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(error).during(|| format!("make {}", entry.path)),
            }
        }
        let directory = self
            .open(&entry.path, OFlags::RDONLY | OFlags::DIRECTORY)
            .during(|| format!("open {}", entry.path))?;
        own(&directory, entry)
    }

    fn put_file(&self, entry: &PublishedEntry, contents: &[u8]) -> Result<()> {
        let doing = || format!("write {}", entry.path);
        let (parent, name) = self.place(&entry.path)?;
        let there = self.contents_of(&entry.path);
        if there.as_deref() == Some(contents) {
            return self
                .open(&entry.path, OFlags::RDONLY)
                .during(doing)
                .and_then(|file| own(&file, entry));
        }
        // Whoever reads it meanwhile has all of the old one.
        let made = &self.beside(&parent, name, there.is_some());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let file =
            rustix::fs::openat(&parent, made, flags | OFlags::CLOEXEC, Mode::RUSR).during(doing)?;
        let mut file = fs::File::from(file);
        file.write_all(contents).during(doing)?;
        own(&file, entry)?;
        if there.is_some() {
            rustix::fs::renameat(&parent, made, &parent, name).during(doing)?;
        }
        Ok(())
    }

    fn put_link(&self, entry: &PublishedEntry, target: &str) -> Result<()> {
        let doing = || format!("make the link {}", entry.path);
        let (parent, name) = self.place(&entry.path)?;
        let there = self.target_of(&entry.path);
        if there.as_deref() != Some(target.as_bytes()) {
            let made = &self.beside(&parent, name, there.is_some());
            rustix::fs::symlinkat(target, &parent, made).during(doing)?;
            if there.is_some() {
                rustix::fs::renameat(&parent, made, &parent, name).during(doing)?;
            }
        }
        let owner = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
        rustix::fs::chownat(
            &parent,
            name,
            Some(owner.0),
            Some(owner.1),
            AtFlags::SYMLINK_NOFOLLOW,
        )
        .during(doing)
    }

    /// Removes all below `directory` that is not wanted; true files of a directory go before it.
    fn keep_only(&self, directory: &str, wanted: &HashSet<&str>) -> Result<()> {
        let doing = || format!("tidy up {directory:?}");
        let opened = self
            .open(directory, OFlags::RDONLY | OFlags::DIRECTORY)
            .during(doing)?;
        for child in Dir::read_from(&opened).during(doing)? {
            let child = child.during(doing)?;
            let name = child.file_name().to_string_lossy().into_owned();
            if name == "." || name == ".." {
                continue;
            }
            let path = match directory {
                "" => name,
                above => format!("{above}/{name}"),
            };
            let is_directory = child.file_type() == FileType::Directory;
            if is_directory {
                self.keep_only(&path, wanted)?;
            }
            if !wanted.contains(path.as_str()) {
                let flags = if is_directory {
                    AtFlags::REMOVEDIR
                } else {
                    AtFlags::empty()
                };
                rustix::fs::unlinkat(&opened, child.file_name(), flags)
                    .during(|| format!("remove {path}"))?;
            }
        }
        Ok(())
    }

    /// The directory that holds `path`, and the last name of it.
    fn place<'b>(&self, path: &'b str) -> Result<(OwnedFd, &'b str)> {
        let (above, name) = path.rsplit_once('/').unwrap_or(("", path));
        if matches!(name, "" | "." | "..") || above.split('/').any(|part| part == "..") {
            return Err(Failure::invalid(format!("{path:?} is no path in a volume")));
        }
        let directory = self
            .open(above, OFlags::PATH | OFlags::DIRECTORY)
            .during(|| format!("open {above}"))?;
        Ok((directory, name))
    }

    fn open(&self, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        paths::open(self.root, Path::new(path), flags | OFlags::NOFOLLOW)
    }

    /// The name to make something by: another one, free to use, where it is to replace `name` by a
    /// rename. For `..data` that is kubelet's own.
    fn beside(&self, parent: &OwnedFd, name: &str, replaces: bool) -> String {
        if !replaces {
            return name.to_owned();
        }
        let other = format!("{name}_tmp");
        // Of an attempt that failed.
        let _ = rustix::fs::unlinkat(parent, &other, AtFlags::empty());
        other
    }

    fn contents_of(&self, path: &str) -> Option<Vec<u8>> {
        let file = self.open(path, OFlags::RDONLY | OFlags::NONBLOCK).ok()?;
        let mut contents = Vec::new();
        fs::File::from(file).read_to_end(&mut contents).ok()?;
        Some(contents)
    }

    fn target_of(&self, path: &str) -> Option<Vec<u8>> {
        let (parent, name) = self.place(path).ok()?;
        let target = rustix::fs::readlinkat(&parent, name, Vec::new()).ok()?;
        Some(target.into_bytes())
    }
}

fn own(file: impl AsFd, entry: &PublishedEntry) -> Result<()> {
    let owner = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
    rustix::fs::fchown(&file, Some(owner.0), Some(owner.1))
        .and_then(|()| rustix::fs::fchmod(&file, Mode::from_raw_mode(entry.mode)))
        .during(|| format!("set owner and mode of {}", entry.path))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    fn entry(path: &str, kind: Kind) -> PublishedEntry {
        PublishedEntry {
            path: path.to_owned(),
            mode: 0o750,
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            kind: Some(kind),
            ..Default::default()
        }
    }

    fn state(version: &str, keys: &[&str]) -> Vec<PublishedEntry> {
        let mut entries = vec![
            entry("", Kind::Directory(true)),
            entry(version, Kind::Directory(true)),
            entry("..data", Kind::Link(version.to_owned())),
        ];
        for key in keys {
            let file = format!("{version}/{key}");
            entries.push(entry(&file, Kind::File(version.into())));
            entries.push(entry(key, Kind::Link(format!("..data/{key}"))));
        }
        entries
    }

    fn bring(directory: &Path, entries: &[PublishedEntry]) -> Result<()> {
        let root = fs::File::open(directory).unwrap();
        Copy { root: root.as_fd() }.bring_to(entries)
    }

    fn names(directory: &Path) -> Vec<String> {
        let entries = fs::read_dir(directory).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_new_state_replaces_the_old_one() {
        let place = tempfile::tempdir().unwrap();
        bring(place.path(), &state("..1", &["a", "b"])).unwrap();
        assert_eq!(names(place.path()), ["..1", "..data", "a", "b"]);
        bring(place.path(), &state("..2", &["b", "c"])).unwrap();
        assert_eq!(names(place.path()), ["..2", "..data", "b", "c"]);
        assert_eq!(fs::read_to_string(place.path().join("c")).unwrap(), "..2");
        let mode = fs::metadata(place.path().join("c")).unwrap().mode();
        assert_eq!(mode & 0o7777, 0o750);
    }

    #[test]
    fn what_stays_the_same_is_not_touched_and_what_changes_is_replaced() {
        let place = tempfile::tempdir().unwrap();
        let mut entries = state("..1", &["a", "b"]);
        bring(place.path(), &entries).unwrap();
        let inode = |name: &str| fs::metadata(place.path().join(name)).unwrap().ino();
        let before = (inode("a"), inode("b"));
        for entry in &mut entries {
            if entry.path == "..1/b" {
                entry.kind = Some(Kind::File(b"other".to_vec()));
            }
        }
        bring(place.path(), &entries).unwrap();
        assert_eq!(inode("a"), before.0);
        assert_ne!(inode("b"), before.1);
        assert_eq!(fs::read_to_string(place.path().join("b")).unwrap(), "other");
    }

    #[test]
    fn no_path_leads_out() {
        let place = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        for path in ["../x", "a/../../x", "..", "a/", "/"] {
            let entries = [entry(path, Kind::File(b"x".to_vec()))];
            assert!(bring(place.path(), &entries).is_err(), "{path}");
        }
        // The rest of an attempt that failed is no hindrance.
        bring(place.path(), &state("..0", &[])).unwrap();
        fs::write(place.path().join("..data_tmp"), "").unwrap();
        bring(place.path(), &state("..2", &[])).unwrap();
        // Somebody in the guest has put a link where a directory was.
        symlink(outside.path(), place.path().join("..1")).unwrap();
        assert!(bring(place.path(), &state("..1", &["a"])).is_err());
        assert_eq!(names(outside.path()), [""; 0]);
    }
}
