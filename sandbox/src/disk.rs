//! Writable layers: sparse ext4 disks without a name, copied from a formatted template.
//!
//! No journal: what it would protect from, a crash of the guest, is the end of
//! the disk anyway.

use std::{
    fs::{self, File},
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    process::Command,
};

use rustix::fs::{Mode, OFlags, SeekFrom};

use crate::error::Error;

/// Part of the template's name: changes when what mkfs.ext4 is told changes.
const VERSION: u32 = 1;

/// A fresh ext4 disk of `mib` MiB in `directory`; it goes when the descriptor does.
///
/// # Errors
/// mkfs.ext4 is missing or fails; no space.
pub fn fresh(directory: &Path, mib: u32) -> Result<OwnedFd, Error> {
    fs::create_dir_all(directory).map_err(Error::io(format!("create {}", directory.display())))?;
    let template = template(directory, mib)?;
    let disk = unnamed(directory)?;
    copy_sparsely(&template, &disk).map_err(Error::io(format!(
        "copy the file system template in {}",
        directory.display()
    )))?;
    Ok(disk)
}

fn unnamed(directory: &Path) -> Result<OwnedFd, Error> {
    rustix::fs::open(
        directory,
        OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC,
        Mode::from_raw_mode(0o600),
    )
    .map_err(Error::io(format!(
        "create a disk in {}",
        directory.display()
    )))
}

fn template(directory: &Path, mib: u32) -> Result<File, Error> {
    let path = directory.join(format!("ext4-{mib}m-v{VERSION}"));
    match File::open(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        result => return result.map_err(Error::io(format!("open {}", path.display()))),
    }
    let made = directory.join(format!(
        ".ext4-{mib}m.{}.{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    let result = format(&made, mib).and_then(|()| {
        // Whoever comes second replaces the same by the same.
        fs::rename(&made, &path).map_err(Error::io(format!("create {}", path.display())))
    });
    if result.is_err() {
        let _ = fs::remove_file(&made);
    }
    result?;
    File::open(&path).map_err(Error::io(format!("open {}", path.display())))
}

fn format(path: &PathBuf, mib: u32) -> Result<(), Error> {
    let output = Command::new("mkfs.ext4")
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .args(["-q", "-F", "-m", "0", "-O", "^has_journal,^resize_inode"])
        .args(["-E", "lazy_itable_init=1,root_owner=0:0,nodiscard"])
        .arg(path)
        .arg(format!("{mib}M"))
        .output()
        .map_err(Error::io("run mkfs.ext4 (package e2fsprogs)"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Io {
        what: format!("format {}", path.display()),
        source: io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
    })
}

/// A reflink where the file system can, else the pieces that hold data.
fn copy_sparsely(from: &File, to: &OwnedFd) -> rustix::io::Result<()> {
    if rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let length = rustix::fs::fstat(from)?.st_size.unsigned_abs();
    rustix::fs::ftruncate(to, length)?;
    let mut at = 0;
    while at < length {
        let start = match rustix::fs::seek(from, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(rustix::io::Errno::NXIO) => break,
            Err(error) => return Err(error),
        };
        let end = rustix::fs::seek(from, SeekFrom::Hole(start))?;
        copy_range(from, to, start, end)?;
        at = end;
    }
    Ok(())
}

fn copy_range(from: &File, to: &OwnedFd, start: u64, end: u64) -> rustix::io::Result<()> {
    let (mut source, mut target) = (start, start);
    while source < end {
        let length = usize::try_from(end - source).unwrap_or(usize::MAX);
        let copied = rustix::fs::copy_file_range(
            from.as_fd(),
            Some(&mut source),
            to,
            Some(&mut target),
            length,
        )?;
        if copied == 0 {
            return Err(rustix::io::Errno::IO);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_formatted_sparse_disk_without_a_name() {
        let directory = tempfile::tempdir().unwrap();
        let disk = fresh(directory.path(), 64).unwrap();
        let stat = rustix::fs::fstat(&disk).unwrap();
        assert_eq!((stat.st_size, stat.st_nlink), (64 << 20, 0));
        assert!(
            stat.st_blocks * 512 < 16 << 20,
            "{} bytes",
            stat.st_blocks * 512
        );
        let mut magic = [0; 2];
        rustix::io::pread(&disk, &mut magic, 1024 + 56).unwrap();
        assert_eq!(u16::from_le_bytes(magic), 0xEF53);
        let _again = fresh(directory.path(), 64).unwrap();
        assert_eq!(
            fs::read_dir(directory.path()).unwrap().count(),
            1,
            "only the template has a name"
        );
    }
}
