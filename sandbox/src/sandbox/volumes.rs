//! Block devices of the host that a container's specification names (Kubernetes' volumes of the
//! mode `Block`, docker's `--device`): each becomes a disk of the guest.

use std::{
    fs::{self, File},
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::PathBuf,
};

use caisson_vmm_api::{BlockContents, Fd};
use oci_spec::runtime::Spec;

use super::{Holdings, Sandbox};
use crate::{
    error::Error,
    spec::{self, HostDisk},
};

/// A block device of the host, as containers may use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Volume {
    /// Major and minor number.
    numbers: (i64, i64),
    read_only: bool,
}

/// A block device of the host in the guest. Containers of a pod with the same rights have one disk,
/// and so one page cache: what one writes another reads, as on the host.
#[derive(Debug)]
pub(super) struct Attached {
    /// The one where it is.
    slots: Vec<u32>,
    /// Major and minor number there.
    in_guest: (i64, i64),
    /// Containers that have it.
    users: usize,
}

impl Sandbox {
    /// Gives the guest the disks that the container names, and the specification the guest's numbers
    /// of them.
    pub(super) async fn attach_volumes(
        &self,
        spec: &mut Spec,
        holdings: &mut Holdings,
    ) -> Result<(), Error> {
        let mut disks = Vec::new();
        for disk in spec::host_disks(spec) {
            let in_guest = self.attach_volume(&disk, holdings).await?;
            disks.push((disk, in_guest));
        }
        spec::use_disks(spec, &disks);
        Ok(())
    }

    /// The disk's numbers in the guest, which gets it if it has it not.
    async fn attach_volume(
        &self,
        disk: &HostDisk,
        holdings: &mut Holdings,
    ) -> Result<(i64, i64), Error> {
        let (file, read_only) = open(disk)?;
        let volume = Volume {
            numbers: disk.numbers,
            read_only,
        };
        // Kept while it is attached: another container that wants it has to wait.
        let mut volumes = self.volumes.lock().await;
        if let Some(attached) = volumes.get_mut(&volume) {
            attached.users += 1;
            holdings.volumes.push(volume);
            return Ok(attached.in_guest);
        }
        let serial = format!("volume-{}-{}", volume.numbers.0, volume.numbers.1);
        let mut slots = Vec::new();
        let attached = self
            .attach_disk(
                &serial,
                BlockContents::File(Fd(0)),
                read_only,
                &[file.as_fd()],
                &mut slots,
            )
            .await;
        let found = match attached {
            Ok(found) => found,
            Err(error) => {
                self.detach(&slots).await;
                return Err(error);
            }
        };
        let in_guest = (found.major.into(), found.minor.into());
        let attached = Attached {
            slots,
            in_guest,
            users: 1,
        };
        volumes.insert(volume, attached);
        holdings.volumes.push(volume);
        Ok(in_guest)
    }

    /// Takes those away that nobody else has.
    pub(super) async fn release_volumes(&self, released: &[Volume]) {
        let mut volumes = self.volumes.lock().await;
        for volume in released {
            let Some(attached) = volumes.get_mut(volume) else {
                continue;
            };
            attached.users -= 1;
            if attached.users == 0 {
                self.detach(&attached.slots).await;
                volumes.remove(volume);
            }
        }
    }
}

/// Opens the device by its numbers, as its path in the container says nothing of the host. True: it
/// is not to be written.
fn open(disk: &HostDisk) -> Result<(File, bool), Error> {
    let (major, minor) = disk.numbers;
    let numbers = format!("{major}:{minor}");
    let sys = PathBuf::from("/sys/dev/block").join(&numbers);
    let of_container = disk.path.display();
    let event = fs::read_to_string(sys.join("uevent")).map_err(Error::io(format!(
        "find the block device {numbers}, which the container wants as {of_container}"
    )))?;
    let name = event
        .lines()
        .find_map(|line| line.strip_prefix("DEVNAME="))
        .ok_or_else(|| Error::Invalid(format!("the block device {numbers} has no name")))?;
    let read_only =
        !disk.writable || fs::read_to_string(sys.join("ro")).is_ok_and(|text| text.trim() == "1");
    let path = PathBuf::from("/dev").join(name);
    let shown = path.display().to_string();
    let file = File::options()
        .read(true)
        .write(!read_only)
        .open(path)
        .map_err(Error::io(format!(
            "open {shown}, which the container wants as {of_container}"
        )))?;
    let device = file
        .metadata()
        .map_err(Error::io(format!("stat {shown}")))?
        .rdev();
    let is_it = i64::from(rustix::fs::major(device)) == major
        && i64::from(rustix::fs::minor(device)) == minor;
    if !is_it {
        return Err(Error::Invalid(format!(
            "{shown} is not the block device {numbers}, which the container wants as {of_container}"
        )));
    }
    Ok((file, read_only))
}
