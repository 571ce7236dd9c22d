//! Where images are loaded from: an OCI layout directory, or an archive (OCI or docker, maybe compressed).

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::work::WorkDir;
use crate::error::{Error, Result};
use crate::layer::decompress::{Compression, Decoder};
use crate::limits::Limits;
use crate::tar::{self, EntryKind};

/// What to load images from.
pub enum Source<'a> {
    /// An OCI image layout directory, or an OCI or docker archive (plain, gzip or zstd).
    Path(&'a Path),
    /// An archive as a stream, such as standard input; `name` is for messages only.
    Stream {
        /// The bytes of the archive.
        reader: &'a mut dyn Read,
        /// How messages call it.
        name: &'a str,
    },
}

impl fmt::Debug for Source<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Source::Path(path) => f.debug_tuple("Path").field(path).finish(),
            Source::Stream { name, .. } => f.debug_tuple("Stream").field(name).finish(),
        }
    }
}

/// An opened source: a set of named members that can be read in any order.
#[derive(Debug)]
pub(super) struct Members {
    /// How messages call the source.
    pub(super) name: PathBuf,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Directory(File),
    Archive {
        file: File,
        index: HashMap<Vec<u8>, Member>,
    },
}

#[derive(Debug)]
enum Member {
    /// Offset and length in the archive, in bytes.
    File(u64, u64),
    /// The other member that docker archives of old refer to instead of repeating a layer.
    Alias(Vec<u8>),
}

/// Symbolic links followed from one member to another; docker makes one.
const MAX_ALIASES: usize = 8;

impl Members {
    /// Opens a source. A compressed archive, or one that cannot be sought in, is unpacked into `work` first.
    pub(super) fn open(source: Source<'_>, work: &WorkDir, limits: &Limits) -> Result<Members> {
        match source {
            Source::Path(path) => {
                // Not blocking: a named pipe in place of an archive is an error and no hang.
                let file = rustix::fs::open(
                    path,
                    OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
                    Mode::empty(),
                )
                .map_err(|errno| Error::io("open", path, errno.into()))?;
                let file = File::from(file);
                let metadata = file.metadata().map_err(Error::on("read", path))?;
                if metadata.is_dir() {
                    Ok(Members {
                        name: path.to_owned(),
                        kind: Kind::Directory(file),
                    })
                } else if metadata.is_file() {
                    Members::open_archive(path.to_owned(), file, work, limits)
                } else {
                    Err(Error::NotAnImage {
                        source_name: path.to_owned(),
                        reason: "it is neither a file nor a directory".to_owned(),
                    })
                }
            }
            Source::Stream { reader, name } => {
                let name = PathBuf::from(name);
                let file = unpack(reader, &name, work, limits)?;
                Members::open_archive(name, file, work, limits)
            }
        }
    }

    fn open_archive(
        name: PathBuf,
        mut file: File,
        work: &WorkDir,
        limits: &Limits,
    ) -> Result<Members> {
        let mut magic = [0; 6];
        let known = read_at_most(&file, &mut magic).map_err(Error::on("read", &name))?;
        match Compression::of(&magic[..known]) {
            Ok(Compression::None) => {}
            Ok(_) => file = unpack(&mut file, &name, work, limits)?,
            Err(error) => {
                return Err(Error::NotAnImage {
                    source_name: name,
                    reason: error.to_string(),
                });
            }
        }
        file.seek(SeekFrom::Start(0))
            .map_err(Error::on("read", &name))?;
        let index = index(&file, &name, limits)?;
        Ok(Members {
            name,
            kind: Kind::Archive { file, index },
        })
    }

    /// Opens a member and says how long it is; `None` when there is none of that name.
    pub(super) fn member(&self, path: &str) -> Result<Option<(Box<dyn Read + '_>, u64)>> {
        match &self.kind {
            Kind::Directory(dir) => self.directory_member(dir, path),
            Kind::Archive { file, index } => {
                let mut name = path.as_bytes();
                for _ in 0..=MAX_ALIASES {
                    match index.get(name) {
                        None => return Ok(None),
                        Some(Member::Alias(target)) => name = target,
                        Some(&Member::File(offset, length)) => {
                            let section = Section {
                                file,
                                offset,
                                end: offset + length,
                            };
                            return Ok(Some((Box::new(section), length)));
                        }
                    }
                }
                Err(self.invalid(format!("member {path:?} is a loop of symbolic links")))
            }
        }
    }

    fn directory_member(
        &self,
        dir: &File,
        path: &str,
    ) -> Result<Option<(Box<dyn Read + '_>, u64)>> {
        let full = self.name.join(path);
        // A layout is input like any other: nothing outside of it is read, and a pipe does not block.
        let opened = rustix::fs::openat2(
            dir,
            path,
            OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS,
        );
        let file = match opened {
            Ok(file) => File::from(file),
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(None),
            Err(errno) => return Err(Error::io("open", &full, errno.into())),
        };
        let metadata = file.metadata().map_err(Error::on("read", &full))?;
        if !metadata.is_file() {
            return Err(self.invalid(format!("{path:?} is not a regular file")));
        }
        Ok(Some((Box::new(file), metadata.len())))
    }

    /// The whole of a small member; `None` when there is none of that name.
    pub(super) fn read(&self, path: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let Some((reader, length)) = self.member(path)? else {
            return Ok(None);
        };
        if length > limit {
            return Err(Error::Limit {
                what: format!("size of {path} ({length} bytes)"),
                limit,
            });
        }
        let mut bytes = Vec::new();
        reader
            .take(limit)
            .read_to_end(&mut bytes)
            .map_err(Error::on("read", &self.name.join(path)))?;
        if bytes.len() as u64 != length {
            return Err(self.invalid(format!(
                "{path:?} is cut off after {} of {length} bytes",
                bytes.len()
            )));
        }
        Ok(Some(bytes))
    }

    /// Whether the members are files of that work directory.
    pub(super) fn is_in(&self, work: &WorkDir) -> bool {
        matches!(self.kind, Kind::Directory(_)) && self.name == work.path()
    }

    pub(super) fn invalid(&self, reason: String) -> Error {
        Error::InvalidImage {
            source_name: self.name.clone(),
            reason,
        }
    }

    /// The name that an image gets when its layout has only tags: the directory's or file's name without its ending.
    pub(super) fn base_name(&self) -> Option<String> {
        let name = match self.kind {
            Kind::Directory(_) => self.name.file_name(),
            Kind::Archive { .. } => self.name.file_stem(),
        };
        name?.to_str().map(|name| {
            name.strip_suffix(".tar")
                .unwrap_or(name)
                .to_ascii_lowercase()
        })
    }
}

/// A part of an archive.
struct Section<'a> {
    file: &'a File,
    offset: u64,
    end: u64,
}

impl Read for Section<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end.saturating_sub(self.offset)).unwrap_or(usize::MAX);
        let length = buf.len().min(left);
        let n = self.file.read_at(&mut buf[..length], self.offset)?;
        if n == 0 && length != 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the archive became shorter",
            ));
        }
        self.offset += n as u64;
        Ok(n)
    }
}

fn read_at_most(file: &File, buf: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], done as u64)? {
            0 => break,
            n => done += n,
        }
    }
    Ok(done)
}

/// Writes a stream, decompressed if it is compressed, to an unnamed file in the work directory.
fn unpack(reader: &mut dyn Read, name: &Path, work: &WorkDir, limits: &Limits) -> Result<File> {
    let mut file =
        tempfile::tempfile_in(work.path()).map_err(Error::on("create a file in", work.path()))?;
    let not_an_image = |error: &dyn fmt::Display| Error::NotAnImage {
        source_name: name.to_owned(),
        reason: error.to_string(),
    };
    let mut decoder = Decoder::detect(reader).map_err(|error| not_an_image(&error))?;
    let mut buffer = vec![0; 256 << 10];
    let mut total = 0;
    loop {
        let n = match decoder.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(not_an_image(&format!("it cannot be read: {error}"))),
        };
        total += n as u64;
        if total > limits.archive_bytes {
            return Err(Error::Limit {
                what: format!("decompressed size of {} in bytes", name.display()),
                limit: limits.archive_bytes,
            });
        }
        file.write_all(&buffer[..n])
            .map_err(Error::on("write", work.path()))?;
    }
    Ok(file)
}

/// Finds the members of a plain tar archive without reading their content.
fn index(file: &File, name: &Path, limits: &Limits) -> Result<HashMap<Vec<u8>, Member>> {
    let not_a_tar = |error: tar::TarError| Error::NotAnImage {
        source_name: name.to_owned(),
        reason: error.to_string(),
    };
    let mut index = HashMap::new();
    let mut reader = tar::Reader::new(tar::Seekable::new(file), tar::Bounds::from(limits));
    let mut count = 0;
    while let Some(entry) = reader.next_entry().map_err(not_a_tar)? {
        count += 1;
        if count > limits.archive_members {
            return Err(Error::Limit {
                what: format!("number of members of {}", name.display()),
                limit: limits.archive_members as u64,
            });
        }
        let path = clean(&entry.path);
        match entry.kind {
            EntryKind::File => {
                // Offsets into the archive are only right for members that are stored as they are.
                if entry.sparse.is_some() {
                    return Err(Error::NotAnImage {
                        source_name: name.to_owned(),
                        reason: format!(
                            "member {:?} is stored sparse",
                            String::from_utf8_lossy(&path)
                        ),
                    });
                }
                index.insert(path, Member::File(reader.position(), entry.size));
            }
            EntryKind::Symlink => {
                let mut target = path.clone();
                target.truncate(
                    path.iter()
                        .rposition(|&byte| byte == b'/')
                        .map_or(0, |slash| slash + 1),
                );
                target.extend_from_slice(&entry.link);
                index.insert(path, Member::Alias(clean(&target)));
            }
            EntryKind::HardLink => {
                index.insert(path, Member::Alias(clean(&entry.link)));
            }
            _ => {}
        }
    }
    // A member beyond the end of the file would only be found out when it is read.
    let length = file.metadata().map_err(Error::on("read", name))?.len();
    for member in index.values() {
        if let Member::File(offset, size) = member
            && offset.checked_add(*size).is_none_or(|end| end > length)
        {
            return Err(Error::NotAnImage {
                source_name: name.to_owned(),
                reason: "it is cut off".to_owned(),
            });
        }
    }
    Ok(index)
}

/// A member's path without `.`, `..` and empty components. It is only ever a key of the index.
fn clean(path: &[u8]) -> Vec<u8> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join(&b'/')
}
