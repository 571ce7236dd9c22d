//! virtio-net (virtio 1.2 section 5.1) on a tap device that the parent opened.
//!
//! One thread serves all queue pairs; or it only attends to what the host's kernel does not, when
//! that moves the frames (vhost-net). Checksums and segmentation are left to
//! whoever can do them best: the header before each frame goes through as it
//! is, and the kernel checks it.
//!
//! System calls of the thread: poll, readv and writev (tap), read and write
//! (eventfds), ioctl (TUNGETIFF, TUNSETOFFLOAD, TUNSETQUEUE, vhost-net's), timerfd_settime,
//! write (log), and the allocator's and futex. Before the thread: ioctl (TUNSETVNETHDRSZ,
//! VHOST_SET_OWNER, VHOST_GET_FEATURES), fcntl, eventfd2, timerfd_create.

mod control;
mod pair;
mod tap;
#[cfg(test)]
mod tests;
mod vhost;

use std::{
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
};

use caisson_vmm_api::RateLimit;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use smallvec::{SmallVec, smallvec};

use crate::{
    rate_limit::RateLimiter,
    virtio::{Active, ActiveQueue, ConfigSpace, Device, DeviceError, DeviceState, event_fd},
};
use pair::{Direction, ETHERNET_BYTES, MAX_FRAME_BYTES, Pair, Waiting};
use tap::{HEADER_BYTES, OFFLOAD_CSUM, OFFLOAD_TSO4, OFFLOAD_TSO6, Tap};
use vhost::Vhost;

/// Device type.
const ID: u32 = 1;
const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_MTU: u64 = 1 << 3;
const F_MAC: u64 = 1 << 5;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_MRG_RXBUF: u64 = 1 << 15;
const F_STATUS: u64 = 1 << 16;
const F_CTRL_VQ: u64 = 1 << 17;
const F_MQ: u64 = 1 << 22;

const QUEUE_SIZE: u16 = 256;
const CONTROL_QUEUE_SIZE: u16 = 64;
const MAX_PAIRS: usize = 16;
/// Of as many a turn allocates nothing.
const INLINE_PAIRS: usize = 4;
/// Smallest MTU (IPv4's).
const MIN_MTU: u16 = 68;
const STATE_VERSION: u16 = 1;

/// Told once, with the reason, when the tap is gone.
pub type Report = Box<dyn Fn(String) + Send>;

/// A network interface.
pub struct Net {
    config: Arc<Config>,
    pairs: Vec<Pair>,
    /// One per pair, or none: then this process moves the frames.
    vhosts: Vec<Vhost>,
    queue_sizes: Vec<u16>,
    rx_limiter: Option<RateLimiter>,
    tx_limiter: Option<RateLimiter>,
    /// Pairs that the driver uses.
    used_pairs: u16,
    report: Report,
}

/// `struct virtio_net_config` up to `mtu`.
struct Config {
    mac: [u8; 6],
    mtu: u16,
    max_pairs: u16,
    link_up: AtomicBool,
    generation: AtomicU32,
}

impl ConfigSpace for Config {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut bytes = self.mac.to_vec();
        let status = u16::from(self.link_up.load(Ordering::Acquire));
        for half in [status, self.max_pairs, self.mtu] {
            bytes.extend(half.to_le_bytes());
        }
        bytes.read(offset, data);
    }

    fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    used_pairs: u16,
    max_pairs: u16,
    mac: [u8; 6],
    mtu: u16,
}

/// What the driver's features mean for frames.
struct Mode {
    merge: bool,
    /// Room for the longest frame to the guest, header included.
    needed: u64,
    offload: u32,
    /// Index of the control queue, if there is one.
    control: Option<usize>,
}

impl Net {
    /// A network interface on `taps`, one per queue pair. `vhosts` are as many open
    /// `/dev/vhost-net`s, by which the host's kernel moves the frames, or none.
    ///
    /// # Errors
    /// [`DeviceError::Backend`]: no taps or too many, another number of vhosts, a limit on frames
    /// that the kernel moves, a multicast address, an MTU below 68, or a descriptor that is no tap
    /// with IFF_NO_PI and IFF_VNET_HDR, or no vhost-net.
    pub fn new(
        taps: Vec<OwnedFd>,
        vhosts: Vec<OwnedFd>,
        mac: [u8; 6],
        mtu: u16,
        rx_limit: Option<&RateLimit>,
        tx_limit: Option<&RateLimit>,
        report: Report,
    ) -> Result<Self, DeviceError> {
        let count = taps.len();
        if !(1..=MAX_PAIRS).contains(&count) {
            return Err(DeviceError::Backend(format!(
                "{count} tap queues: 1 to {MAX_PAIRS} are possible"
            )));
        }
        if ![0, count].contains(&vhosts.len()) {
            return Err(DeviceError::Backend(format!(
                "{} vhost-nets for {count} tap queues",
                vhosts.len()
            )));
        }
        if !vhosts.is_empty() && (rx_limit.is_some() || tx_limit.is_some()) {
            return Err(DeviceError::Backend(
                "vhost-net knows no limits: an interface has either".into(),
            ));
        }
        if mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(DeviceError::Backend(format!(
                "{mac:02x?} is not the address of one interface"
            )));
        }
        if mtu < MIN_MTU {
            return Err(DeviceError::Backend(format!(
                "an MTU of {mtu}: at least {MIN_MTU} is needed"
            )));
        }
        let pairs = taps
            .into_iter()
            .enumerate()
            .map(|(index, fd)| {
                Tap::new(fd)
                    .map(Pair::new)
                    .map_err(|error| DeviceError::Backend(format!("tap queue {index}: {error}")))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let vhosts = vhosts
            .into_iter()
            .map(|fd| Vhost::new(fd).map_err(DeviceError::io("vhost-net")))
            .collect::<Result<Vec<_>, _>>()?;
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * count];
        if count > 1 {
            queue_sizes.push(CONTROL_QUEUE_SIZE);
        }
        let limiter = |limit: Option<&RateLimit>| match limit {
            None => Ok(None),
            Some(limit) => RateLimiter::new(limit).map_err(DeviceError::io("timerfd")),
        };
        Ok(Self {
            config: Arc::new(Config {
                mac,
                mtu,
                // At most MAX_PAIRS.
                max_pairs: count as u16,
                link_up: AtomicBool::new(true),
                generation: AtomicU32::new(0),
            }),
            pairs,
            vhosts,
            queue_sizes,
            rx_limiter: limiter(rx_limit)?,
            tx_limiter: limiter(tx_limit)?,
            used_pairs: 1,
            report,
        })
    }

    fn mode(&self, features: u64) -> Mode {
        let has = |bit| features & bit != 0;
        let mut offload = 0;
        for (bit, flag) in [
            (F_GUEST_CSUM, OFFLOAD_CSUM),
            (F_GUEST_TSO4, OFFLOAD_TSO4),
            (F_GUEST_TSO6, OFFLOAD_TSO6),
        ] {
            // Segmentation is for frames without checksums.
            if has(bit) && has(F_GUEST_CSUM) {
                offload |= flag;
            }
        }
        let frame = if offload & (OFFLOAD_TSO4 | OFFLOAD_TSO6) != 0 {
            MAX_FRAME_BYTES
        } else {
            u64::from(self.config.mtu) + ETHERNET_BYTES
        };
        // Without MQ the driver knows one pair only, and the control queue follows that.
        let last = if has(F_MQ) { self.pairs.len() } else { 1 };
        Mode {
            merge: has(F_MRG_RXBUF),
            needed: frame + HEADER_BYTES as u64,
            offload,
            control: has(F_CTRL_VQ).then_some(2 * last),
        }
    }

    /// Opens the taps of the used pairs for frames, and shuts the others.
    fn attach_pairs(&self) -> Result<(), DeviceError> {
        if self.pairs.len() > 1 {
            for (index, pair) in self.pairs.iter().enumerate() {
                let used = index < usize::from(self.used_pairs);
                pair.tap
                    .set_attached(used)
                    .map_err(DeviceError::io("TUNSETQUEUE"))?;
            }
        }
        Ok(())
    }

    fn is_link_up(&self) -> bool {
        self.config.link_up.load(Ordering::Relaxed)
    }

    fn link_lost(&self, active: &Active) {
        if self.config.link_up.swap(false, Ordering::AcqRel) {
            self.config.generation.fetch_add(1, Ordering::AcqRel);
            active.interrupt.config_changed();
            (self.report)("the tap device is gone; the guest's link is down".into());
        }
    }

    /// Answers the driver's commands; whether it has set the number of used pairs.
    fn answer_commands(&mut self, active: &mut Active, mode: &Mode) -> Result<bool, DeviceError> {
        let queue = mode
            .control
            .and_then(|index| active.queues.get_mut(index)?.as_mut());
        let Some(queue) = queue else {
            return Ok(false);
        };
        let max = self.config.max_pairs;
        let set = control::serve(queue, &active.memory, &active.interrupt, max)?;
        self.used_pairs = set.unwrap_or(self.used_pairs);
        Ok(set.is_some())
    }

    fn serve(&mut self, active: &mut Active, mode: &Mode) -> Result<(), DeviceError> {
        loop {
            if self.answer_commands(active, mode)? {
                self.attach_pairs()?;
            }
            let mut states = SmallVec::<[_; INLINE_PAIRS]>::new();
            for index in 0..usize::from(self.used_pairs) {
                let rx = self.receive(active, index, mode)?;
                let tx = self.transmit(active, index)?;
                if rx == Waiting::Gone || tx == Waiting::Gone {
                    self.link_lost(active);
                }
                states.push((rx, tx));
            }
            if self.wait(active, mode, &states)? {
                return Ok(());
            }
        }
    }

    fn receive(
        &mut self,
        active: &mut Active,
        index: usize,
        mode: &Mode,
    ) -> Result<Waiting, DeviceError> {
        let Some(queue) = active.queues.get_mut(2 * index).and_then(Option::as_mut) else {
            return Ok(Waiting::Driver);
        };
        if !self.is_link_up() {
            return Ok(Waiting::Gone);
        }
        let direction = Direction {
            memory: &active.memory,
            queue,
            limiter: self.rx_limiter.as_mut(),
        };
        let waiting = self.pairs[index].receive(direction, mode.needed, mode.merge)?;
        queue.signal(&active.memory, &active.interrupt)?;
        Ok(waiting)
    }

    fn transmit(&mut self, active: &mut Active, index: usize) -> Result<Waiting, DeviceError> {
        let Some(queue) = active
            .queues
            .get_mut(2 * index + 1)
            .and_then(Option::as_mut)
        else {
            return Ok(Waiting::Driver);
        };
        let direction = Direction {
            memory: &active.memory,
            queue,
            limiter: self.tx_limiter.as_mut(),
        };
        let waiting = self.pairs[index].transmit(direction)?;
        queue.signal(&active.memory, &active.interrupt)?;
        Ok(waiting)
    }

    /// Waits for what the directions wait for; true when the device has to stop.
    fn wait(
        &self,
        active: &Active,
        mode: &Mode,
        states: &[(Waiting, Waiting)],
    ) -> Result<bool, DeviceError> {
        let poll_event = |event| PollFd::from_borrowed_fd(event_fd(event), PollFlags::IN);
        let queue = |index: usize| active.queues.get(index).and_then(Option::as_ref);
        let mut fds: SmallVec<[_; 4 * INLINE_PAIRS]> = smallvec![poll_event(&active.stop)];
        let mut kicks: SmallVec<[&ActiveQueue; 2 * INLINE_PAIRS + 1]> =
            mode.control.and_then(queue).into_iter().collect();
        let mut busy = false;
        for (index, (rx, tx)) in states.iter().enumerate() {
            let mut tap = PollFlags::empty();
            if *rx == Waiting::Tap {
                tap |= PollFlags::IN;
            }
            if *tx == Waiting::Tap {
                tap |= PollFlags::OUT;
            }
            if !tap.is_empty() {
                let fd = self.pairs[index].tap.as_fd();
                fds.push(PollFd::from_borrowed_fd(fd, tap));
            }
            if *rx == Waiting::Driver {
                kicks.extend(queue(2 * index));
            }
            // Frames for a tap that is gone go nowhere, one turn at a time.
            if *tx == Waiting::Driver {
                kicks.extend(queue(2 * index + 1));
            }
            busy |= *rx == Waiting::No || matches!(tx, Waiting::No | Waiting::Gone);
            for (waiting, limiter) in [(rx, &self.rx_limiter), (tx, &self.tx_limiter)] {
                if *waiting == Waiting::Limit
                    && let Some(limiter) = limiter
                {
                    fds.push(PollFd::from_borrowed_fd(limiter.timer(), PollFlags::IN));
                }
            }
        }
        let first_kick = fds.len();
        fds.extend(kicks.iter().map(|queue| poll_event(queue.kick())));
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        match poll(&mut fds, busy.then_some(&at_once)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(DeviceError::io("poll")(error)),
        }
        let ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        for (queue, fd) in kicks.iter().zip(&fds[first_kick..]) {
            if ready(fd) {
                // Nothing to read is as good.
                let _ = queue.kick().read();
            }
        }
        Ok(ready(&fds[0]))
    }
}

impl Device for Net {
    fn id(&self) -> u32 {
        ID
    }

    fn name(&self) -> &'static str {
        "net"
    }

    fn features(&self) -> u64 {
        let multiqueue = if self.pairs.len() > 1 {
            F_MQ | F_CTRL_VQ
        } else {
            0
        };
        F_CSUM
            | F_GUEST_CSUM
            | F_MTU
            | F_MAC
            | F_GUEST_TSO4
            | F_GUEST_TSO6
            | F_HOST_TSO4
            | F_HOST_TSO6
            | F_MRG_RXBUF
            | F_STATUS
            | multiqueue
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        self.config.clone()
    }

    fn run(&mut self, active: &mut Active) -> Result<(), DeviceError> {
        let mode = self.mode(active.features);
        for pair in &self.pairs {
            match pair.tap.set_offload(mode.offload) {
                Ok(()) => {}
                // The tap is gone, which the first frame tells.
                Err(error) if error.raw_os_error() == Some(libc::EBADFD) => {}
                Err(error) => return Err(DeviceError::io("TUNSETOFFLOAD")(error)),
            }
        }
        if !self.vhosts.is_empty() {
            return self.attend(active, &mode);
        }
        self.attach_pairs()?;
        let result = self.serve(active, &mode);
        for (index, pair) in self.pairs.iter_mut().enumerate() {
            pair.put_back(active.queues.get_mut(2 * index).and_then(Option::as_mut));
        }
        result
    }

    fn reset(&mut self) {
        self.used_pairs = 1;
    }

    fn save(&self) -> Result<DeviceState, DeviceError> {
        let saved = Saved {
            used_pairs: self.used_pairs,
            max_pairs: self.config.max_pairs,
            mac: self.config.mac,
            mtu: self.config.mtu,
        };
        Ok(DeviceState {
            version: STATE_VERSION,
            data: serde_json::to_value(saved)
                .map_err(|error| DeviceError::State(error.to_string()))?,
        })
    }

    /// The address may be another one: a clone has its own, which the agent sets in the guest.
    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        state.expect_version(STATE_VERSION)?;
        let saved: Saved = serde_json::from_value(state.data.clone())
            .map_err(|error| DeviceError::State(error.to_string()))?;
        let same = saved.max_pairs == self.config.max_pairs && saved.mtu == self.config.mtu;
        if !same || !(1..=saved.max_pairs).contains(&saved.used_pairs) {
            return Err(DeviceError::State(format!(
                "the interface had {} queue pairs ({} of them used) and an MTU of {}; now it has {} and {}",
                saved.max_pairs,
                saved.used_pairs,
                saved.mtu,
                self.config.max_pairs,
                self.config.mtu
            )));
        }
        self.used_pairs = saved.used_pairs;
        Ok(())
    }
}
