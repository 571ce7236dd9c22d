//! Gives the host back the space of files that containers have removed from their writable layers,
//! which are sparse files there.
//!
//! In batches, as fstrim(8) does, and not by ext4's option `discard`: with that every unlink waits for
//! the disk.

use std::{
    collections::HashMap,
    fs,
    os::fd::{AsRawFd, OwnedFd},
    path::Path,
    sync::Arc,
    time::Duration,
};

use rustix::fs::{Mode, OFlags};

use super::{Manager, mounts::new_mount, table::State};
use crate::failure::{During, Failure, Result};

/// Between two looks at what has become free.
const INTERVAL: Duration = Duration::from_secs(30);

/// Less is not worth the walk through the free space, in bytes.
const WORTH: u64 = 16 << 20;

/// Shorter gaps stay: each would be an extent more of the host's file, in bytes.
const SHORTEST: u64 = 64 << 10;

/// A sector of `/sys/block/…/stat`, in bytes, whatever the disk's are.
const SECTOR: u64 = 512;

/// What a disk was like at the last trim, or since.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Mark {
    /// The least that was free since then, in bytes.
    free: u64,
    /// Written until then, in bytes.
    written: u64,
}

impl Mark {
    /// Of a disk that nothing was written to yet.
    const NEW: Self = Self {
        free: u64::MAX,
        written: 0,
    };

    /// Whether the host may by now hold so much for nothing that a trim pays. What was written and
    /// removed between two looks shows in what was written only.
    fn is_worth(&mut self, now: Self) -> bool {
        self.free = self.free.min(now.free);
        now.free - self.free >= WORTH || now.written.saturating_sub(self.written) >= WORTH
    }
}

/// Looks at the writable layers from time to time, for ever.
pub async fn run(manager: Arc<Manager>) {
    let mut marks = HashMap::new();
    loop {
        tokio::time::sleep(INTERVAL).await;
        let devices = manager.writable_layers();
        // A device of that name is another container's then.
        marks.retain(|device, _| devices.contains(device));
        for device in devices {
            let mark = marks.get(&device).copied().unwrap_or(Mark::NEW);
            let look = {
                let device = device.clone();
                tokio::task::spawn_blocking(move || look_at(&device, mark))
            };
            match look.await {
                Ok(Ok(mark)) => {
                    marks.insert(device, mark);
                }
                // Its container has ended meanwhile, or the disk fails, which the host says.
                Ok(Err(failure)) => log::debug!("{failure}"),
                Err(error) => log::warn!("cannot look at {device}: {error}"),
            }
        }
    }
}

impl Manager {
    /// Devices of those containers that run: of another nothing is mounted.
    fn writable_layers(&self) -> Vec<String> {
        let table = self.table();
        let running = table
            .containers
            .values()
            .filter(|container| !matches!(container.init.state, State::Stopped(_)));
        running
            .filter_map(|container| container.writable_layer.clone())
            .collect()
    }
}

/// Trims the disk if that pays; its mark from now on. Blocks.
fn look_at(device: &str, mut mark: Mark) -> Result<Mark> {
    let during = || format!("look at {device}");
    // One more of what is mounted already, for as long as this takes.
    let mount = new_mount("ext4", Some(device), &[], &[], 0)?;
    let now = || -> Result<Mark> {
        let found = rustix::fs::fstatvfs(&mount).during(during)?;
        Ok(Mark {
            free: found.f_bfree * found.f_frsize,
            written: written(device)?,
        })
    };
    let found = now()?;
    if !mark.is_worth(found) {
        return Ok(mark);
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(&mount, ".", flags, Mode::empty()).during(during)?;
    trim(&root).during(|| format!("trim {device}"))?;
    now()
}

/// Bytes that were written to the disk so far (Linux: block/stat.rst, field 7).
fn written(device: &str) -> Result<u64> {
    let name = Path::new(device).file_name().unwrap_or_default();
    let path = Path::new("/sys/block").join(name).join("stat");
    let text = fs::read_to_string(&path).during(|| format!("read {}", path.display()))?;
    let sectors = text.split_whitespace().nth(6);
    sectors
        .and_then(|sectors| sectors.parse::<u64>().ok())
        .map(|sectors| sectors * SECTOR)
        .ok_or_else(|| Failure::internal(format!("{} holds no numbers: {text:?}", path.display())))
}

/// Discards what is free of the file system (linux/fs.h, `FITRIM`).
fn trim(root: &OwnedFd) -> std::io::Result<()> {
    /// `struct fstrim_range`, in bytes.
    #[repr(C)]
    struct Range {
        start: u64,
        length: u64,
        shortest: u64,
    }
    const FITRIM: libc::Ioctl = 0xc018_5879_u32 as libc::Ioctl;
    let mut range = Range {
        start: 0,
        length: u64::MAX,
        shortest: SHORTEST,
    };
    // SAFETY: FITRIM reads a struct fstrim_range and writes back its length; `range` is one, which
    // lives until the call returns.
    let result = unsafe { libc::ioctl(root.as_raw_fd(), FITRIM, &raw mut range) };
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_trim_pays_when_enough_was_removed() {
        let at = |free: u64, written: u64| Mark {
            free: free * MIB,
            written: written * MIB,
        };
        let mut mark = at(1000, 0);
        assert!(!mark.is_worth(at(1000, 0)), "nothing happened");
        assert!(!mark.is_worth(at(990, 10)), "written");
        assert!(!mark.is_worth(at(1000, 11)), "little was removed");
        assert!(mark.is_worth(at(1006, 11)), "removed since the fullest");
        assert!(!{ Mark::NEW }.is_worth(at(1000, 15)));
        assert!(
            { Mark::NEW }.is_worth(at(1000, 16)),
            "before the first look"
        );
        let mut mark = at(1000, 50);
        assert!(mark.is_worth(at(1000, 66)), "written and removed unseen");
        assert!(mark.is_worth(at(900, 150)), "perhaps both");
    }

    #[test]
    fn what_was_written_is_found() {
        let disks = fs::read_dir("/sys/block").unwrap();
        let names = disks.map(|disk| disk.unwrap().file_name().into_string().unwrap());
        for name in names {
            written(&format!("/dev/{name}")).unwrap();
        }
        assert!(written("/dev/none").is_err());
    }
}
