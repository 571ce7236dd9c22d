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
            let (file, read_only) = open(&disk)?;
            let contents = BlockContents::File(Fd(0));
            let attached = self
                .attach_disk("volume", contents, read_only, &[file.as_fd()], holdings)
                .await?;
            disks.push((disk, (attached.major.into(), attached.minor.into())));
        }
        spec::use_disks(spec, &disks);
        Ok(())
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
