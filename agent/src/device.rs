//! Devices that the VMM puts into empty virtio-mmio slots while the guest runs.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use caisson_protocol::{SHARE_TAG, agent::bind_device_request::Expect};

use crate::{
    boot,
    container::mounts,
    failure::{During, Failure, Kind, Result},
};

const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";

/// How long a device may take to appear after its driver was bound.
const LIMIT: Duration = Duration::from_secs(10);

fn slot_name(slot: u32) -> String {
    format!("virtio-mmio.{slot}")
}

/// Binds the driver to `slot` and waits for what it shall bring.
///
/// # Errors
/// No such slot, an empty slot, or a device that is not the expected one.
pub async fn bind(slot: u32, expect: Option<&Expect>) -> Result<String> {
    let name = slot_name(slot);
    let bound = Path::new(DRIVER).join(&name);
    if !bound.exists() {
        fs::write(Path::new(DRIVER).join("bind"), &name)
            .during(|| format!("bind the driver to {name}"))?;
    }
    let deadline = tokio::time::Instant::now() + LIMIT;
    loop {
        if let Some(device) = find(&bound, expect)? {
            return Ok(device);
        }
        if tokio::time::Instant::now() > deadline {
            return Err(Failure::new(
                Kind::DeadlineExceeded,
                format!(
                    "{name}: the expected device ({expect:?}) did not appear in {} s",
                    LIMIT.as_secs()
                ),
            ));
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Device numbers of what [`bind`] has found; zeros when it is no node.
///
/// # Errors
/// The node has gone.
pub fn numbers(device: &str) -> Result<(u32, u32)> {
    if !device.starts_with('/') {
        return Ok((0, 0));
    }
    let stat = rustix::fs::stat(device).during(|| format!("find {device}"))?;
    let (major, minor) = (
        rustix::fs::major(stat.st_rdev),
        rustix::fs::minor(stat.st_rdev),
    );
    Ok((major, minor))
}

/// Unbinds the driver of `slot`; a slot without one is as it should be.
///
/// # Errors
/// Those of the write.
pub fn unbind(slot: u32) -> Result<()> {
    let name = slot_name(slot);
    if !Path::new(DRIVER).join(&name).exists() {
        return Ok(());
    }
    fs::write(Path::new(DRIVER).join("unbind"), &name)
        .during(|| format!("unbind the driver from {name}"))
}

/// The name of the network interface whose device is in `slot`.
///
/// # Errors
/// There is none.
pub fn network_interface(slot: u32) -> Result<String> {
    let name = slot_name(slot);
    virtio_device(&Path::new(DRIVER).join(&name))
        .and_then(|device| child(&device.join("net")))
        .ok_or_else(|| Failure::invalid(format!("{name} is no network interface")))
}

/// Directory of the virtio device below a platform device.
fn virtio_device(bound: &Path) -> Option<PathBuf> {
    fs::read_dir(bound)
        .ok()?
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().starts_with("virtio"))
        .map(|entry| entry.path())
}

fn child(directory: &Path) -> Option<String> {
    let entry = fs::read_dir(directory).ok()?.flatten().next()?;
    Some(entry.file_name().to_string_lossy().into_owned())
}

fn find(bound: &Path, expect: Option<&Expect>) -> Result<Option<String>> {
    let Some(device) = virtio_device(bound) else {
        return Ok(None);
    };
    Ok(match expect {
        None | Some(Expect::Other(_)) => device.join("driver").exists().then(String::new),
        Some(Expect::BlockSerial(serial)) => match child(&device.join("block")) {
            Some(name) => {
                let found = read(&device.join("block").join(&name).join("serial"))?;
                if found != *serial {
                    return Err(Failure::internal(format!(
                        "{}: expected the disk \"{serial}\", found \"{found}\"",
                        bound.display()
                    )));
                }
                let node = format!("/dev/{name}");
                Path::new(&node).exists().then_some(node)
            }
            None => None,
        },
        Some(Expect::NetMac(mac)) => match child(&device.join("net")) {
            Some(name) => {
                let found = read(&device.join("net").join(&name).join("address"))?;
                if !found.eq_ignore_ascii_case(mac) {
                    return Err(Failure::internal(format!(
                        "{}: expected the address {mac}, found {found}",
                        bound.display()
                    )));
                }
                Some(name)
            }
            None => None,
        },
        Some(Expect::FsTag(tag)) => {
            if tag != SHARE_TAG {
                return Err(Failure::invalid(format!(
                    "unknown file system tag \"{tag}\""
                )));
            }
            if !device.join("driver").exists() {
                return Ok(None);
            }
            mount_share()?;
            Some(String::new())
        }
        Some(Expect::Pmem(_)) => fs::read_dir("/sys/block")
            .during(|| "list block devices".to_owned())?
            .flatten()
            .find(|entry| {
                fs::canonicalize(entry.path()).is_ok_and(|path| {
                    fs::canonicalize(&device).is_ok_and(|device| path.starts_with(device))
                })
            })
            .map(|entry| format!("/dev/{}", entry.file_name().to_string_lossy())),
        Some(_) => return Err(Failure::invalid("unknown kind of device")),
    })
}

fn read(path: &Path) -> Result<String> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error).during(|| format!("read {}", path.display())),
    }
}

/// Mounts the pod's share where only the agent's own mount namespace shows it.
fn mount_share() -> Result<()> {
    use std::os::fd::AsFd;
    let target = rustix::fs::open(
        boot::SHARE_DIR,
        rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .during(|| format!("open {}", boot::SHARE_DIR))?;
    let share = mounts::new_mount("virtiofs", Some(SHARE_TAG), &[], &[], 0)?;
    mounts::attach(share.as_fd(), target.as_fd()).during(|| format!("mount on {}", boot::SHARE_DIR))
}
