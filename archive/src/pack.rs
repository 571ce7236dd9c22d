//! From files to a stream.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs::{self, File, Metadata},
    io::{self, Read, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt},
    },
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags};
use tar::{Builder, EntryType, Header};

use crate::{CONTENTS, Error};

/// Writes what is at `source` to `output`, and flushes it. The entries' names begin with the
/// source's own, or with [`CONTENTS`] when `source` ends in "/." or is the root. Sockets are left out,
/// as nobody can make them; symbolic links below the source stay links.
///
/// # Errors
/// A file cannot be read, or nobody reads the stream.
pub fn pack(source: &Path, follow: bool, output: impl Write) -> Result<(), Error> {
    let name = root_name(source);
    // "dir/." is the directory also when it is a link.
    let follow = follow || is_contents(source);
    let metadata = if follow {
        fs::metadata(source)
    } else {
        fs::symlink_metadata(source)
    }
    .map_err(Error::file("find", source))?;
    let mut packer = Packer {
        builder: Builder::new(output),
        links: HashMap::new(),
    };
    packer.add(source, &name, &metadata)?;
    packer
        .builder
        .into_inner()
        .and_then(|mut output| output.flush())
        .map_err(Error::Output)
}

/// Whether the path ends in "/." or is ".".
fn is_contents(path: &Path) -> bool {
    let bytes = path.as_os_str().as_bytes();
    bytes == b"." || bytes.ends_with(b"/.") || bytes.ends_with(b"/./")
}

fn root_name(source: &Path) -> PathBuf {
    match source.file_name() {
        Some(name) if !is_contents(source) => PathBuf::from(name),
        _ => PathBuf::from(CONTENTS),
    }
}

struct Packer<W: Write> {
    builder: Builder<W>,
    /// First name of each file that has several.
    links: HashMap<(u64, u64), PathBuf>,
}

impl<W: Write> Packer<W> {
    fn add(&mut self, path: &Path, name: &Path, metadata: &Metadata) -> Result<(), Error> {
        let kind = metadata.file_type();
        if kind.is_socket() {
            return Ok(());
        }
        if !kind.is_dir() && metadata.nlink() > 1 {
            let identity = (metadata.dev(), metadata.ino());
            if let Some(first) = self.links.get(&identity) {
                let mut header = header(metadata, EntryType::Link);
                let first = first.clone();
                return self
                    .builder
                    .append_link(&mut header, name, first)
                    .map_err(Error::Output);
            }
            self.links.insert(identity, name.to_owned());
        }
        if kind.is_dir() {
            self.add_directory(path, name, metadata)
        } else if kind.is_symlink() {
            let target = fs::read_link(path).map_err(Error::file("read the link", path))?;
            let mut header = header(metadata, EntryType::Symlink);
            self.builder
                .append_link(&mut header, name, target)
                .map_err(Error::Output)
        } else if kind.is_file() {
            self.add_file(path, name)
        } else {
            self.add_special(name, metadata)
        }
    }

    fn add_directory(
        &mut self,
        path: &Path,
        name: &Path,
        metadata: &Metadata,
    ) -> Result<(), Error> {
        let mut header = header(metadata, EntryType::Directory);
        self.append(&mut header, &with_slash(name), io::empty())?;
        let entries = fs::read_dir(path).map_err(Error::file("list", path))?;
        let mut names = entries
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(Error::file("list", path))?;
        names.sort_unstable();
        for entry in names {
            let below = path.join(&entry);
            match fs::symlink_metadata(&below) {
                Ok(metadata) => self.add(&below, &name.join(&entry), &metadata)?,
                // Files come and go while they are copied.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(Error::file("find", &below)(error)),
            }
        }
        Ok(())
    }

    fn add_file(&mut self, path: &Path, name: &Path) -> Result<(), Error> {
        // It may have become a pipe since it was looked at.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file =
            rustix::fs::open(path, flags, Mode::empty()).map_err(Error::file("open", path))?;
        let file = File::from(file);
        let metadata = file.metadata().map_err(Error::file("find", path))?;
        let mut header = header(&metadata, EntryType::Regular);
        header.set_size(metadata.len());
        // A stream has as many bytes as it says, whatever becomes of the file meanwhile.
        let mut reading = Reading { file, failed: None };
        let padded = (&mut reading).chain(io::repeat(0)).take(metadata.len());
        let appended = self.append(&mut header, name, padded);
        match reading.failed {
            Some(error) => Err(Error::file("read", path)(error)),
            None => appended,
        }
    }

    fn add_special(&mut self, name: &Path, metadata: &Metadata) -> Result<(), Error> {
        let kind = metadata.file_type();
        let entry = if kind.is_fifo() {
            EntryType::Fifo
        } else if kind.is_char_device() {
            EntryType::Char
        } else {
            EntryType::Block
        };
        let mut header = header(metadata, entry);
        if !kind.is_fifo() {
            let device = metadata.rdev();
            header
                .set_device_major(rustix::fs::major(device))
                .and_then(|()| header.set_device_minor(rustix::fs::minor(device)))
                .map_err(Error::Output)?;
        }
        self.append(&mut header, name, io::empty())
    }

    fn append(&mut self, header: &mut Header, name: &Path, data: impl Read) -> Result<(), Error> {
        self.builder
            .append_data(header, name, data)
            .map_err(Error::Output)
    }
}

/// Remembers that it was reading that failed, not writing.
struct Reading {
    file: File,
    failed: Option<io::Error>,
}

impl Read for Reading {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read(buffer).map_err(|error| {
            let again = io::Error::from(error.kind());
            self.failed = Some(error);
            again
        })
    }
}

fn with_slash(name: &Path) -> PathBuf {
    let mut name = name.as_os_str().to_owned();
    name.push(OsStr::new("/"));
    name.into()
}

fn header(metadata: &Metadata, kind: EntryType) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_size(0);
    header.set_mode(metadata.mode() & 0o7777);
    header.set_uid(metadata.uid().into());
    header.set_gid(metadata.gid().into());
    header.set_mtime(u64::try_from(metadata.mtime()).unwrap_or(0));
    header
}
