//! One queue pair whose frames the host's kernel moves: vhost-net (`linux/vhost.h`,
//! `drivers/vhost/net.c`).
//!
//! The kernel's thread finds the guest's buffers by the table of memory that it is given here and
//! checks every address against it.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{F_MRG_RXBUF, Mode, Net, tap::Tap};
use crate::{
    memory::GuestMemory,
    virtio::{
        Active, ActiveQueue, DeviceError, F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, event_fd,
    },
};

const GET_FEATURES: libc::Ioctl = 0x8008_af00;
const SET_FEATURES: libc::Ioctl = 0x4008_af00;
const SET_OWNER: libc::Ioctl = 0xaf01;
const SET_MEM_TABLE: libc::Ioctl = 0x4008_af03;
const SET_VRING_NUM: libc::Ioctl = 0x4008_af10;
const SET_VRING_ADDR: libc::Ioctl = 0x4028_af11;
const SET_VRING_BASE: libc::Ioctl = 0x4008_af12;
const GET_VRING_BASE: libc::Ioctl = 0xc008_af12;
const SET_VRING_KICK: libc::Ioctl = 0x4008_af20;
const SET_VRING_CALL: libc::Ioctl = 0x4008_af21;
const SET_VRING_ERR: libc::Ioctl = 0x4008_af22;
const NET_SET_BACKEND: libc::Ioctl = 0x4008_af30;

/// What it must know of what drivers are offered; the other features are the tap's.
const FEATURES: u64 = F_MRG_RXBUF | F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1;

/// How often it is asked whether the tap is still there, which nothing tells.
const TAP_CHECK: Timespec = Timespec {
    tv_sec: 1,
    tv_nsec: 0,
};

/// `struct vhost_vring_state`.
#[repr(C)]
struct RingNumber {
    index: u32,
    number: u32,
}

/// `struct vhost_vring_file`.
#[repr(C)]
struct RingFile {
    index: u32,
    fd: RawFd,
}

/// `struct vhost_vring_addr`: addresses in this process.
#[repr(C)]
struct RingPlaces {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// A queue pair in the kernel's hands.
#[derive(Debug)]
pub(super) struct Vhost {
    fd: OwnedFd,
    /// Readable when the driver has broken a queue.
    broken: EventFd,
    running: bool,
}

impl Vhost {
    /// Takes an open `/dev/vhost-net`, and starts its thread, which counts as one of this process.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let vhost = Self {
            fd,
            broken: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            running: false,
        };
        vhost.ioctl("VHOST_SET_OWNER", SET_OWNER, std::ptr::null_mut::<u8>())?;
        let mut features = 0u64;
        vhost.ioctl("VHOST_GET_FEATURES", GET_FEATURES, &raw mut features)?;
        match FEATURES & !features {
            0 => Ok(vhost),
            missing => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("the kernel's vhost-net lacks the features {missing:#x}"),
            )),
        }
    }

    /// Whether the kernel moves frames.
    pub(super) fn is_running(&self) -> bool {
        self.running
    }

    /// Readable when the driver has broken a queue.
    pub(super) fn broken(&self) -> &EventFd {
        &self.broken
    }

    /// Lets the kernel move frames between `tap` and the queues from where they are. It raises
    /// `call` by itself, so the interrupt must be [`crate::virtio::Interrupt::raised_elsewhere`].
    pub(super) fn start(
        &mut self,
        features: u64,
        memory: &GuestMemory,
        tap: &Tap,
        queues: [&ActiveQueue; 2],
        call: &EventFd,
    ) -> Result<(), DeviceError> {
        if let Err(error) = self.try_start(features, memory, tap, queues, call) {
            for index in 0..2 {
                // It may not have come as far as that.
                let _ = self.set_tap(index, -1);
            }
            return Err(DeviceError::io("vhost-net")(error));
        }
        self.running = true;
        for queue in queues {
            // It looks at the queue once: earlier kicks may be lost. A full counter is as good.
            let _ = queue.kick().write(1);
        }
        Ok(())
    }

    fn try_start(
        &self,
        features: u64,
        memory: &GuestMemory,
        tap: &Tap,
        queues: [&ActiveQueue; 2],
        call: &EventFd,
    ) -> io::Result<()> {
        let mut features = features & FEATURES;
        self.ioctl("VHOST_SET_FEATURES", SET_FEATURES, &raw mut features)?;
        let mut table = memory_table(memory);
        self.ioctl("VHOST_SET_MEM_TABLE", SET_MEM_TABLE, table.as_mut_ptr())?;
        for (index, queue) in (0..).zip(queues) {
            self.set_up(index, memory, queue, call)?;
        }
        for index in 0..2 {
            self.set_tap(index, tap.as_raw_fd())?;
        }
        Ok(())
    }

    fn set_up(
        &self,
        index: u32,
        memory: &GuestMemory,
        queue: &ActiveQueue,
        call: &EventFd,
    ) -> io::Result<()> {
        let number = |number: u16| RingNumber {
            index,
            number: number.into(),
        };
        let mut size = number(queue.size());
        self.ioctl("VHOST_SET_VRING_NUM", SET_VRING_NUM, &raw mut size)?;
        let mut base = number(queue.position().0);
        self.ioctl("VHOST_SET_VRING_BASE", SET_VRING_BASE, &raw mut base)?;
        // `ActiveQueue` has checked that each ring lies in one region, whole.
        let place = |address| {
            memory
                .get_host_address(GuestAddress(address))
                .map(|pointer| pointer as u64)
                .map_err(io::Error::other)
        };
        let rings = queue.rings();
        let mut places = RingPlaces {
            index,
            flags: 0,
            descriptors: place(rings.descriptors)?,
            used: place(rings.used)?,
            available: place(rings.available)?,
            log: 0,
        };
        self.ioctl("VHOST_SET_VRING_ADDR", SET_VRING_ADDR, &raw mut places)?;
        for (what, request, event) in [
            ("VHOST_SET_VRING_KICK", SET_VRING_KICK, queue.kick()),
            ("VHOST_SET_VRING_CALL", SET_VRING_CALL, call),
            ("VHOST_SET_VRING_ERR", SET_VRING_ERR, &self.broken),
        ] {
            let mut file = RingFile {
                index,
                fd: event.as_raw_fd(),
            };
            self.ioctl(what, request, &raw mut file)?;
        }
        Ok(())
    }

    /// Takes the queues back, with nothing in flight.
    pub(super) fn stop(&mut self, queues: [&mut ActiveQueue; 2]) -> Result<(), DeviceError> {
        self.running = false;
        for (index, queue) in (0..).zip(queues) {
            let position = self
                .take_back(index)
                .map_err(DeviceError::io("vhost-net"))?;
            queue.set_position(position, position);
        }
        Ok(())
    }

    /// The next available entry of a queue, all before which are used: vhost-net completes in
    /// order, and returns from this with what it had taken completed or put back.
    fn take_back(&self, index: u32) -> io::Result<u16> {
        self.set_tap(index, -1)?;
        let mut base = RingNumber { index, number: 0 };
        self.ioctl("VHOST_GET_VRING_BASE", GET_VRING_BASE, &raw mut base)?;
        // The number of a split ring's entry has 16 bits.
        Ok(base.number as u16)
    }

    fn set_tap(&self, index: u32, fd: RawFd) -> io::Result<()> {
        let mut file = RingFile { index, fd };
        self.ioctl("VHOST_NET_SET_BACKEND", NET_SET_BACKEND, &raw mut file)
    }

    fn ioctl<T>(&self, what: &str, request: libc::Ioctl, argument: *mut T) -> io::Result<()> {
        // SAFETY: the requests of this module take nothing, or a pointer to a structure that lives
        // over the call and is as large as the kernel's; SET_MEM_TABLE's tells its own length.
        // The addresses in them are those of guest memory, which nobody in this process holds
        // references to, and which is mapped until this device, and with it `fd`, has gone.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), request, argument) } {
            0.. => Ok(()),
            _ => {
                let error = io::Error::last_os_error();
                Err(io::Error::new(error.kind(), format!("{what}: {error}")))
            }
        }
    }
}

impl Net {
    /// As [`Net::serve`], while the kernel moves the frames.
    pub(super) fn attend(&mut self, active: &mut Active, mode: &Mode) -> Result<(), DeviceError> {
        active.interrupt.raised_elsewhere(true);
        let result = self.attend_until_stopped(active, mode);
        let stopped = self.run_vhosts(active, 0);
        active.interrupt.raised_elsewhere(false);
        // What the kernel raised at the last moment.
        active.interrupt.used();
        result.and(stopped)
    }

    fn attend_until_stopped(
        &mut self,
        active: &mut Active,
        mode: &Mode,
    ) -> Result<(), DeviceError> {
        self.attach_pairs()?;
        loop {
            let used = self.used_pairs;
            if self.answer_commands(active, mode)? {
                // Pairs that go, go before their taps are shut.
                self.run_vhosts(active, used.min(self.used_pairs))?;
                self.attach_pairs()?;
            }
            let link_up = self.is_link_up();
            self.run_vhosts(active, if link_up { self.used_pairs } else { 0 })?;
            if self.wait_for_others(active, mode, link_up)? {
                return Ok(());
            }
            if link_up && self.pairs.iter().any(|pair| pair.tap.is_gone()) {
                self.link_lost(active);
            }
        }
    }

    /// Lets the kernel move frames of the first `count` pairs, as far as the driver has enabled
    /// them, and of no others.
    fn run_vhosts(&mut self, active: &mut Active, count: u16) -> Result<(), DeviceError> {
        let parts = self.vhosts.iter_mut().zip(&self.pairs);
        for (index, (vhost, pair)) in parts.enumerate() {
            let wanted = index < usize::from(count);
            if wanted == vhost.is_running() {
                continue;
            }
            let queues = active.queues.get_mut(2 * index..2 * index + 2);
            let Some([Some(rx), Some(tx)]) = queues else {
                continue;
            };
            if wanted {
                let call = active.interrupt.irqfd();
                vhost.start(active.features, &active.memory, &pair.tap, [rx, tx], call)?;
            } else {
                vhost.stop([rx, tx])?;
            }
        }
        Ok(())
    }

    /// Waits for what the kernel does not do; true when the device has to stop.
    fn wait_for_others(
        &self,
        active: &Active,
        mode: &Mode,
        link_up: bool,
    ) -> Result<bool, DeviceError> {
        let poll_event = |event| PollFd::from_borrowed_fd(event_fd(event), PollFlags::IN);
        let control = mode
            .control
            .and_then(|index| active.queues.get(index)?.as_ref());
        let mut fds = vec![poll_event(&active.stop)];
        fds.extend(control.map(|queue| poll_event(queue.kick())));
        let first_broken = fds.len();
        fds.extend(self.vhosts.iter().map(|vhost| poll_event(vhost.broken())));
        match poll(&mut fds, link_up.then_some(&TAP_CHECK)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(DeviceError::io("poll")(error)),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        if let Some(queue) = control
            && ready[1]
        {
            // Nothing to read is as good.
            let _ = queue.kick().read();
        }
        for (vhost, broken) in self.vhosts.iter().zip(&ready[first_broken..]) {
            if *broken {
                let _ = vhost.broken().read();
                return Err(DeviceError::Backend(
                    "vhost-net: the driver broke a queue".into(),
                ));
            }
        }
        Ok(ready[0])
    }
}

/// `struct vhost_memory`: all of guest memory, as a driver may send from any of it.
fn memory_table(memory: &GuestMemory) -> Vec<u64> {
    // The number of regions in the low half of the first word, and padding.
    let mut table = vec![memory.num_regions() as u64];
    for region in memory.iter() {
        let here = region.as_ptr() as u64;
        table.extend([region.start_addr().0, region.len(), here, 0]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::memory;

    #[test]
    fn structures_are_the_kernels() {
        // Sizes are part of the requests.
        let size = |request: libc::Ioctl| ((request >> 16) & 0x3fff) as usize;
        assert_eq!(size(SET_VRING_NUM), size_of::<RingNumber>());
        assert_eq!(size(NET_SET_BACKEND), size_of::<RingFile>());
        assert_eq!(size(SET_VRING_ADDR), size_of::<RingPlaces>());
    }

    #[test]
    fn the_kernel_is_told_of_all_memory() {
        let memory = memory();
        let region = memory.iter().next().unwrap();
        let table = memory_table(&memory);
        assert_eq!(table[..3], [1, 0, region.len()]);
        assert_eq!(table[3..], [region.as_ptr() as u64, 0]);
    }

    #[test]
    fn what_is_no_vhost_is_refused() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let error = Vhost::new(reader.into()).unwrap_err().to_string();
        assert!(error.starts_with("VHOST_SET_OWNER: "), "{error}");
    }
}
