//! Taps (`Documentation/networking/tuntap.rst`).

use std::{
    fs::{self, File},
    io,
    os::fd::{AsRawFd, OwnedFd},
};

use rtnetlink::{Handle, LinkUnspec};

use super::redirect::failed;
use crate::error::Error;

const TUNSETIFF: libc::Ioctl = 0x4004_54ca;

/// The name of the tap beside the interface with this index.
pub fn name_beside(index: u32) -> String {
    format!("caisson{index}")
}

/// Whether the name is one of ours.
pub fn is_ours(name: &str) -> bool {
    name.strip_prefix("caisson")
        .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Makes a tap in the calling thread's namespace; it lives as long as its descriptors. Also tells
/// its index.
///
/// # Errors
/// `ResourceBusy` when there is one of that name; others of the kernel's.
pub fn create(name: &str, queues: u8) -> io::Result<(Vec<OwnedFd>, u32)> {
    let several = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
    // Without EXCL the kernel would add a queue to a tap that another sandbox has made.
    let taps = (0..queues.max(1))
        .map(|index| {
            let first = if index == 0 { libc::IFF_TUN_EXCL } else { 0 };
            queue(name, libc::IFF_VNET_HDR | several | first)
        })
        .collect::<io::Result<Vec<_>>>()?;
    Ok((taps, quiet(name)?))
}

/// As [`create`], with one queue, whose frames are as on a wire: no headers of virtio before them.
pub fn create_plain(name: &str) -> io::Result<(OwnedFd, u32)> {
    let tap = queue(name, libc::IFF_TUN_EXCL)?;
    Ok((tap, quiet(name)?))
}

/// Keeps the namespace's own stack from speaking on an interface, and tells its index.
fn quiet(name: &str) -> io::Result<u32> {
    // Kernels without IPv6 have no such file.
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
    index_of(name)
}

/// The index of the interface of that name in the calling thread's namespace.
///
/// # Errors
/// There is none.
pub fn index_of(name: &str) -> io::Result<u32> {
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::UNIX,
        rustix::net::SocketType::DGRAM,
        None,
    )?;
    Ok(rustix::net::netdevice::name_to_index(socket, name)?)
}

fn queue(name: &str, more: libc::c_int) -> io::Result<OwnedFd> {
    let tap = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .map_err(|error| io::Error::new(error.kind(), format!("/dev/net/tun: {error}")))?;
    // SAFETY: all-zeros is a value of this C structure of numbers and bytes.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | more;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which `request` is.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF, &raw mut request) };
    if result == 0 {
        Ok(tap.into())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Sets the MTU and brings it up.
pub async fn bring_up(handle: &Handle, index: u32, name: &str, mtu: u32) -> Result<(), Error> {
    let message = LinkUnspec::new_with_index(index).mtu(mtu).up().build();
    handle
        .link()
        .change(message)
        .execute()
        .await
        .map_err(failed(format!("bring up {name} with an MTU of {mtu}")))
}
