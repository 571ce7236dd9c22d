//! A tap device's queue, behind a descriptor that came from the parent
//! (`Documentation/networking/tuntap.rst`).

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
};

use rustix::fs::OFlags;

/// Bytes of `struct virtio_net_hdr_v1` before every frame, in both directions.
pub(super) const HEADER_BYTES: usize = 12;

const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
const TUNGETIFF: libc::Ioctl = 0x8004_54d2;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;
const TUNSETQUEUE: libc::Ioctl = 0x4004_54d9;

/// What the guest can receive (TUNSETOFFLOAD).
pub(super) const OFFLOAD_CSUM: u32 = 1;
pub(super) const OFFLOAD_TSO4: u32 = 2;
pub(super) const OFFLOAD_TSO6: u32 = 4;

/// One queue of a tap.
#[derive(Debug)]
pub(super) struct Tap(OwnedFd);

impl Tap {
    /// Makes the descriptor non-blocking and checks that it is a tap with a header before frames.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let tap = Self(fd);
        let mut request = interface_request();
        tap.ioctl(TUNGETIFF, &raw mut request)
            .map_err(|error| explain(error, "not a tap device (TUNGETIFF)"))?;
        // SAFETY: TUNGETIFF has stored the flags.
        let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if flags & wanted != wanted {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("tap flags {flags:#x}: IFF_TAP, IFF_NO_PI and IFF_VNET_HDR are needed"),
            ));
        }
        let mut bytes = HEADER_BYTES as libc::c_int;
        tap.ioctl(TUNSETVNETHDRSZ, &raw mut bytes)
            .map_err(|error| explain(error, "size of the header (TUNSETVNETHDRSZ)"))?;
        let flags = rustix::fs::fcntl_getfl(&tap.0)?;
        rustix::fs::fcntl_setfl(&tap.0, flags | OFlags::NONBLOCK)?;
        Ok(tap)
    }

    /// Says what frames the guest takes: without checksums, longer than the MTU.
    pub(super) fn set_offload(&self, flags: u32) -> io::Result<()> {
        let value = std::ptr::without_provenance_mut::<u8>(flags as usize);
        self.ioctl(TUNSETOFFLOAD, value)
    }

    /// Whether the interface has been removed under it.
    pub(super) fn is_gone(&self) -> bool {
        let mut request = interface_request();
        let asked = self.ioctl(TUNGETIFF, &raw mut request);
        asked.is_err_and(|error| error.raw_os_error() == Some(libc::EBADFD))
    }

    /// Lets frames come to this queue, or not. Only for taps of several queues.
    pub(super) fn set_attached(&self, attached: bool) -> io::Result<()> {
        const ATTACH: libc::c_short = 0x0200;
        const DETACH: libc::c_short = 0x0400;
        let mut request = interface_request();
        request.ifr_ifru.ifru_flags = if attached { ATTACH } else { DETACH };
        match self.ioctl(TUNSETQUEUE, &raw mut request) {
            // It is so already.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            other => other,
        }
    }

    /// Receives one frame into guest memory; the number of bytes.
    ///
    /// # Safety
    /// Every iovec must point into mapped guest memory, to which no references exist.
    pub(super) unsafe fn receive(&self, iovecs: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: the caller vouches for the iovecs; their number is bounded by that of a chain's
        // segments, below c_int's range.
        let count = unsafe {
            libc::readv(
                self.0.as_raw_fd(),
                iovecs.as_ptr(),
                iovecs.len() as libc::c_int,
            )
        };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    /// Sends one frame from guest memory.
    ///
    /// # Safety
    /// As [`Tap::receive`].
    pub(super) unsafe fn send(&self, iovecs: &[libc::iovec]) -> io::Result<usize> {
        // SAFETY: as in `receive`.
        let count = unsafe {
            libc::writev(
                self.0.as_raw_fd(),
                iovecs.as_ptr(),
                iovecs.len() as libc::c_int,
            )
        };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    fn ioctl<T>(&self, request: libc::Ioctl, argument: *mut T) -> io::Result<()> {
        // SAFETY: the requests of this module take a number, or a pointer to a structure that
        // lives over the call and is as large as the kernel's.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request, argument) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn explain(error: io::Error, what: &str) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

fn interface_request() -> libc::ifreq {
    // SAFETY: all-zero bytes are a valid ifreq: an empty name and a union of plain data.
    unsafe { std::mem::zeroed() }
}
