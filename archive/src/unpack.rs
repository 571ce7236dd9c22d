//! From a stream to files. Whoever made the stream is not trusted: no entry leaves the
//! destination, by its name or through a symbolic link.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::{AsFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path, PathBuf},
};

use rustix::{
    fs::{AtFlags, Dev, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use tar::{Archive, Entry, EntryType, Header};

use crate::{CONTENTS, Error};

/// Where a stream goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Destination {
    /// By the rules of `cp`: the stream has one root, which goes into the directory at the path, or
    /// else becomes what is at the path.
    Path(PathBuf),
    /// Every entry goes into this directory, which must be there.
    Directory(PathBuf),
}

/// What files get besides their data. Times and permissions are always the stream's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    /// Owner and group of the stream; else those of the process.
    pub owners: bool,
    /// Set-user-ID and set-group-ID bits.
    pub set_id: bool,
    /// Character and block devices; else they are refused.
    pub devices: bool,
}

/// Makes the files of a stream.
///
/// # Errors
/// The destination does not fit, the stream is broken, an entry would leave the destination, or
/// the kernel's. What was made before stays.
pub fn unpack(
    input: impl Read,
    destination: &Destination,
    attributes: Attributes,
) -> Result<(), Error> {
    let mut archive = Archive::new(input);
    let mut unpacker: Option<Unpacker> = None;
    for entry in archive.entries().map_err(Error::Stream)? {
        let mut entry = entry.map_err(Error::Stream)?;
        let path = entry.path().map_err(Error::Stream)?.into_owned();
        let kind = entry.header().entry_type();
        if kind.is_pax_global_extensions() {
            continue;
        }
        let unpacker = match &mut unpacker {
            Some(unpacker) => unpacker,
            none => none.insert(Unpacker {
                base: Base::find(destination, &path, kind.is_dir())?,
                attributes,
                directories: Vec::new(),
            }),
        };
        unpacker.add(&mut entry, &path, kind)?;
    }
    match unpacker {
        Some(unpacker) => unpacker.finish(),
        None => Err(Error::Stream(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            "it has no entries",
        ))),
    }
}

/// The directory that all entries stay in, and how the names in the stream become names in it.
struct Base {
    directory: OwnedFd,
    /// For messages.
    path: PathBuf,
    /// What the stream's first component becomes: nothing, or a name.
    root: Option<Root>,
}

struct Root {
    was: PathBuf,
    becomes: PathBuf,
}

impl Base {
    fn find(destination: &Destination, first: &Path, directory: bool) -> Result<Self, Error> {
        match destination {
            Destination::Directory(path) => match is_directory(path)? {
                Some(true) => Self::open(path, None),
                Some(false) => Err(Error::destination(path, "not a directory")),
                None => Err(Error::destination(path, "no such directory")),
            },
            Destination::Path(path) => Self::of_path(path, first, directory),
        }
    }

    fn of_path(path: &Path, first: &Path, directory: bool) -> Result<Self, Error> {
        let was = first
            .components()
            .next()
            .map_or_else(PathBuf::new, |component| component.as_os_str().into());
        let contents = was == Path::new(CONTENTS);
        if !contents && first.components().count() != 1 {
            return Err(Error::entry(first, "it is not the root of what is copied"));
        }
        // The names of what is in it do not begin with a ".".
        let was = if contents { PathBuf::new() } else { was };
        let slash = path.as_os_str().as_bytes().ends_with(b"/");
        match (is_directory(path)?, directory) {
            (Some(true), _) if contents => Self::open(path, Some((was, CONTENTS.into()))),
            (Some(true), _) => Self::open(path, Some((was.clone(), was))),
            (Some(false), true) => Err(Error::destination(
                path,
                "a directory cannot be copied over a file",
            )),
            (None, false) if slash => Err(Error::destination(path, "no such directory")),
            (Some(false), false) if slash => Err(Error::destination(path, "not a directory")),
            // As cp does, a file is written through a link.
            (Some(false), false) => {
                let path = fs::canonicalize(path).map_err(Error::file("find", path))?;
                Self::at(&path, was)
            }
            (None, _) => Self::at(path, was),
        }
    }

    /// The root becomes `path`.
    fn at(path: &Path, was: PathBuf) -> Result<Self, Error> {
        let name = path
            .file_name()
            .ok_or_else(|| Error::destination(path, "no such directory"))?;
        let parent = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        if is_directory(parent)?.is_none() {
            return Err(Error::destination(parent, "no such directory"));
        }
        Self::open(parent, Some((was, name.into())))
    }

    fn open(path: &Path, root: Option<(PathBuf, PathBuf)>) -> Result<Self, Error> {
        let directory =
            rustix::fs::open(path, DIRECTORY, Mode::empty()).map_err(Error::file("open", path))?;
        Ok(Self {
            directory,
            path: path.to_owned(),
            root: root.map(|(was, becomes)| Root { was, becomes }),
        })
    }

    /// The name in the base of a name in the stream, without "." and "..".
    fn name(&self, path: &Path) -> Result<PathBuf, Error> {
        let (start, rest) = match &self.root {
            None => (PathBuf::new(), path),
            Some(root) => {
                let rest = path
                    .strip_prefix(&root.was)
                    .map_err(|_| Error::entry(path, "it is not below the first entry"))?;
                (root.becomes.clone(), rest)
            }
        };
        let mut name = PathBuf::new();
        for component in start.join(rest).components() {
            match component {
                Component::Normal(part) => name.push(part),
                Component::CurDir => {}
                _ => return Err(Error::entry(path, "it would leave the destination")),
            }
        }
        Ok(name)
    }
}

const DIRECTORY: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// `None`: nothing is there.
fn is_directory(path: &Path) -> Result<Option<bool>, Error> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(Some(metadata.is_dir())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        // "file/": what is meant is the file.
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => Ok(Some(false)),
        Err(error) => Err(Error::file("find", path)(error)),
    }
}

struct Unpacker {
    base: Base,
    attributes: Attributes,
    /// Their modes and times are set when nothing is made in them any more.
    directories: Vec<(PathBuf, Header)>,
}

impl Unpacker {
    fn add<R: Read>(
        &mut self,
        entry: &mut Entry<'_, R>,
        path: &Path,
        kind: EntryType,
    ) -> Result<(), Error> {
        let name = self.base.name(path)?;
        let shown = self.base.path.join(&name);
        let Some(last) = name.file_name() else {
            // The base itself, which is there and stays as it is.
            return if kind.is_dir() {
                Ok(())
            } else {
                Err(Error::entry(path, "it has no name"))
            };
        };
        let parent = self.parent(name.parent().unwrap_or(Path::new("")), &shown)?;
        if kind.is_dir() {
            make_directory(&parent, Path::new(last), &shown)?;
            self.directories.push((name, entry.header().clone()));
            return Ok(());
        }
        remove_old(&parent, Path::new(last), &shown)?;
        match kind {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let flags = OFlags::WRONLY
                    | OFlags::CREATE
                    | OFlags::EXCL
                    | OFlags::NOFOLLOW
                    | OFlags::CLOEXEC;
                let file = rustix::fs::openat(&parent, last, flags, Mode::RUSR | Mode::WUSR)
                    .map_err(Error::file("create", &shown))?;
                write(entry, File::from(file), &shown)?;
            }
            EntryType::Symlink => {
                let target = link_target(entry, path)?;
                rustix::fs::symlinkat(&target, &parent, last)
                    .map_err(Error::file("create", &shown))?;
            }
            EntryType::Link => {
                // Its attributes are those of the file.
                return self.hard_link(
                    &link_target(entry, path)?,
                    &parent,
                    Path::new(last),
                    &shown,
                );
            }
            EntryType::Fifo | EntryType::Char | EntryType::Block => {
                self.special(entry.header(), kind, &parent, Path::new(last), &shown)?;
            }
            _ => return Err(Error::entry(path, "its kind is unknown")),
        }
        self.set_attributes(&parent, Path::new(last), entry.header(), &shown)
    }

    /// The directory `name` of the base, which is reached without following links.
    fn parent(&self, name: &Path, shown: &Path) -> Result<OwnedFd, Error> {
        let name = if name == Path::new("") {
            Path::new(".")
        } else {
            name
        };
        let beneath =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(
            &self.base.directory,
            name,
            DIRECTORY,
            Mode::empty(),
            beneath,
        )
        .map_err(|error| match error {
            Errno::LOOP => {
                Error::destination(shown, "a symbolic link is on the way to it; not followed")
            }
            error => Error::file("reach", shown)(error),
        })
    }

    fn hard_link(
        &self,
        target: &Path,
        parent: &OwnedFd,
        last: &Path,
        shown: &Path,
    ) -> Result<(), Error> {
        let name = self.base.name(target)?;
        let file = name
            .file_name()
            .ok_or_else(|| Error::entry(target, "a link to it has no sense"))?;
        let directory = self.parent(name.parent().unwrap_or(Path::new("")), shown)?;
        rustix::fs::linkat(&directory, file, parent, last, AtFlags::empty())
            .map_err(Error::file("link", shown))
    }

    fn special(
        &self,
        header: &Header,
        kind: EntryType,
        parent: &OwnedFd,
        last: &Path,
        shown: &Path,
    ) -> Result<(), Error> {
        let number = |part: io::Result<Option<u32>>| {
            part.map(Option::unwrap_or_default).map_err(Error::Stream)
        };
        let (file_type, device): (FileType, Dev) = match kind {
            EntryType::Fifo => (FileType::Fifo, 0),
            _ if !self.attributes.devices => {
                return Err(Error::entry(
                    shown,
                    "devices of a container are not made here",
                ));
            }
            _ => {
                let (major, minor) = (header.device_major(), header.device_minor());
                let device = rustix::fs::makedev(number(major)?, number(minor)?);
                let character = kind == EntryType::Char;
                let file_type = if character {
                    FileType::CharacterDevice
                } else {
                    FileType::BlockDevice
                };
                (file_type, device)
            }
        };
        rustix::fs::mknodat(parent, last, file_type, Mode::RUSR | Mode::WUSR, device)
            .map_err(Error::file("create", shown))
    }

    fn set_attributes(
        &self,
        parent: &OwnedFd,
        last: &Path,
        header: &Header,
        shown: &Path,
    ) -> Result<(), Error> {
        if self.attributes.owners {
            let number = |part: io::Result<u64>| {
                part.ok()
                    .and_then(|number| u32::try_from(number).ok())
                    .filter(|number| *number != u32::MAX)
                    .ok_or_else(|| Error::entry(shown, "its owner is no number"))
            };
            let (uid, gid) = (number(header.uid())?, number(header.gid())?);
            let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
            rustix::fs::chownat(
                parent,
                last,
                Some(uid),
                Some(gid),
                AtFlags::SYMLINK_NOFOLLOW,
            )
            .map_err(Error::file("change the owner of", shown))?;
        }
        if header.entry_type() != EntryType::Symlink {
            let kept = if self.attributes.set_id {
                0o7777
            } else {
                0o1777
            };
            let mode = Mode::from_raw_mode(header.mode().map_err(Error::Stream)? & kept);
            // Just made, and no link.
            rustix::fs::chmodat(parent, last, mode, AtFlags::empty())
                .map_err(Error::file("change the mode of", shown))?;
        }
        let seconds = header.mtime().unwrap_or(0);
        let time = Timespec {
            tv_sec: i64::try_from(seconds).unwrap_or(0),
            tv_nsec: 0,
        };
        let times = Timestamps {
            last_access: time,
            last_modification: time,
        };
        rustix::fs::utimensat(parent, last, &times, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(Error::file("set the times of", shown))
    }

    fn finish(self) -> Result<(), Error> {
        for (name, header) in self.directories.iter().rev() {
            let shown = self.base.path.join(name);
            let parent = self.parent(name.parent().unwrap_or(Path::new("")), &shown)?;
            if let Some(last) = name.file_name() {
                self.set_attributes(&parent, Path::new(last), header, &shown)?;
            }
        }
        Ok(())
    }
}

fn link_target<R: Read>(entry: &Entry<'_, R>, path: &Path) -> Result<PathBuf, Error> {
    entry
        .link_name()
        .map_err(Error::Stream)?
        .map(|target| target.into_owned())
        .ok_or_else(|| Error::entry(path, "it is a link to nothing"))
}

fn make_directory(parent: &OwnedFd, last: &Path, shown: &Path) -> Result<(), Error> {
    let private = Mode::RUSR | Mode::WUSR | Mode::XUSR;
    match rustix::fs::mkdirat(parent, last, private) {
        Err(Errno::EXIST) => {
            let stat = rustix::fs::statat(parent, last, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(Error::file("find", shown))?;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                Ok(())
            } else {
                Err(Error::destination(
                    shown,
                    "a directory cannot be copied over a file",
                ))
            }
        }
        made => made.map_err(Error::file("create", shown)),
    }
}

/// A file that is copied replaces the one that is there, also one that nobody may write.
fn remove_old(parent: &OwnedFd, last: &Path, shown: &Path) -> Result<(), Error> {
    match rustix::fs::unlinkat(parent.as_fd(), last, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR) => Err(Error::destination(
            shown,
            "a file cannot be copied over a directory",
        )),
        Err(error) => Err(Error::file("replace", shown)(error)),
    }
}

fn write<R: Read>(entry: &mut Entry<'_, R>, mut file: File, shown: &Path) -> Result<(), Error> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match entry.read(&mut buffer).map_err(Error::Stream)? {
            0 => return Ok(()),
            length => io::Write::write_all(&mut file, &buffer[..length])
                .map_err(Error::file("write", shown))?,
        }
    }
}
