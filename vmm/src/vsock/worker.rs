//! The device's thread: moves packets between the queues and the connections.

use std::{
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd},
    time::Instant,
};

use rustix::{
    event::{
        Timespec,
        epoll::{self, EventData, EventFlags},
    },
    io::Errno,
};

use super::{connection::Guest, muxer::Muxer};
use crate::{
    memory::GuestMemory,
    virtio::{Active, ActiveQueue, Chain, DeviceError, Interrupt, event_fd},
};

/// Packets per direction before the others get their turn, and events taken at once.
const BATCH: usize = 64;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

// Tokens of events; connections' are below.
const STOP: u64 = u64::MAX;
const KICK: u64 = u64::MAX - 1;
const LISTENER: u64 = u64::MAX - 2;

/// The announcement that all connections are gone (5.10.6.7). New ones must not start before the guest has dealt with
/// it, or it would take them for old ones.
#[derive(Default)]
pub(super) enum Announcement {
    /// Nothing to announce.
    #[default]
    None,
    /// Waits for a buffer of the event queue.
    Due,
    /// Made. All other buffers of the event queue are held, so that the next one is the one the guest gives back.
    Made {
        held: Vec<Chain>,
        /// A guest that gives none back by then never will.
        until: Instant,
    },
}

/// What the device runs with.
pub(super) struct Worker<'a> {
    muxer: &'a mut Muxer,
    announcement: &'a mut Announcement,
    memory: &'a GuestMemory,
    guest: Guest<'a>,
    rx: &'a mut ActiveQueue,
    tx: &'a mut ActiveQueue,
    events: Option<&'a mut ActiveQueue>,
    interrupt: &'a Interrupt,
    stop: BorrowedFd<'a>,
    /// Host programs may be taken and the guest sent to.
    open: bool,
}

impl<'a> Worker<'a> {
    pub(super) fn new(
        muxer: &'a mut Muxer,
        announcement: &'a mut Announcement,
        active: &'a mut Active,
    ) -> Result<Self, DeviceError> {
        let mut queues = active.queues.iter_mut();
        let mut next = || queues.next().and_then(Option::as_mut);
        let rx = next().ok_or(DeviceError::QueueMissing(0))?;
        let tx = next().ok_or(DeviceError::QueueMissing(1))?;
        Ok(Self {
            muxer,
            announcement,
            memory: &active.memory,
            guest: Guest {
                memory: &active.memory,
                iovecs: Vec::new(),
            },
            rx,
            tx,
            events: next(),
            interrupt: &active.interrupt,
            stop: event_fd(&active.stop),
            open: false,
        })
    }

    /// Serves until told to stop; no request is in flight afterwards, whatever happened. Connections stay.
    pub(super) fn run(mut self) -> Result<(), DeviceError> {
        let result = self.watch().and_then(|()| self.serve());
        self.release();
        self.unwatch();
        result
    }

    fn watched(&self) -> [Option<(BorrowedFd<'_>, u64, EventFlags)>; 5] {
        let edge = EventFlags::IN | EventFlags::ET;
        [
            Some((self.stop, STOP, EventFlags::IN)),
            Some((event_fd(self.rx.kick()), KICK, edge)),
            Some((event_fd(self.tx.kick()), KICK, edge)),
            self.events
                .as_ref()
                .map(|queue| (event_fd(queue.kick()), KICK, edge)),
            Some((self.muxer.listener().as_fd(), LISTENER, edge)),
        ]
    }

    fn watch(&self) -> Result<(), DeviceError> {
        for (fd, token, flags) in self.watched().into_iter().flatten() {
            epoll::add(self.muxer.epoll(), fd, EventData::new_u64(token), flags)
                .map_err(DeviceError::io("epoll_ctl"))?;
        }
        Ok(())
    }

    fn unwatch(&self) {
        for (fd, ..) in self.watched().into_iter().flatten() {
            // What was never added cannot be removed, and need not be.
            let _ = epoll::delete(self.muxer.epoll(), fd);
        }
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        let mut now = Instant::now();
        loop {
            if !self.open && self.announced(now)? {
                self.open = true;
                self.muxer.accept(now);
            }
            let busy = self.transmit()? | self.receive(now)?;
            self.tx.signal(self.memory, self.interrupt)?;
            self.rx.signal(self.memory, self.interrupt)?;
            if self.wait(busy, &mut now)? {
                return Ok(());
            }
            self.muxer.expire(now);
        }
    }

    /// Handles events, after waiting for one unless there is work. True: stop.
    fn wait(&mut self, busy: bool, now: &mut Instant) -> Result<bool, DeviceError> {
        let timeout = if busy {
            Some(Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            })
        } else {
            self.timeout()
        };
        let mut events = [const { MaybeUninit::uninit() }; BATCH];
        let events = match epoll::wait(self.muxer.epoll(), &mut events, timeout.as_ref()) {
            Ok((events, _)) => events,
            Err(Errno::INTR) => &mut [][..],
            Err(error) => return Err(DeviceError::io("epoll_wait")(error)),
        };
        *now = Instant::now();
        let mut stop = false;
        for event in events {
            match event.data.u64() {
                STOP => stop = true,
                KICK => {}
                LISTENER if self.open => self.muxer.accept(*now),
                // Looked at when it opens.
                LISTENER => {}
                token => self.muxer.event(token, event.flags, *now),
            }
        }
        Ok(stop)
    }

    fn timeout(&self) -> Option<Timespec> {
        let announcement = match &*self.announcement {
            Announcement::Made { until, .. } => Some(*until),
            _ => None,
        };
        let next = [announcement, self.muxer.next_deadline()]
            .into_iter()
            .flatten()
            .min()?;
        let wait = next.saturating_duration_since(Instant::now());
        // A millisecond more: epoll counts in those, and would come too early and again.
        Some(Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(wait.subsec_millis() + 1).min(999) * 1_000_000,
        })
    }

    /// From the guest. True: there may be more.
    fn transmit(&mut self) -> Result<bool, DeviceError> {
        for _ in 0..BATCH {
            if !self.muxer.takes_packets() {
                return Ok(false);
            }
            let Some(chain) = self.tx.pop(self.memory)? else {
                return Ok(false);
            };
            self.muxer.packet(&chain, &mut self.guest);
            self.tx.complete(self.memory, chain.into_head(), 0)?;
        }
        Ok(true)
    }

    /// To the guest. True: there may be more, or the guest's own packets can be taken again.
    fn receive(&mut self, now: Instant) -> Result<bool, DeviceError> {
        if !self.open {
            return Ok(false);
        }
        let stalled = !self.muxer.takes_packets();
        for _ in 0..BATCH {
            if !self.muxer.wants_to_send() {
                break;
            }
            let Some(chain) = self.rx.pop(self.memory)? else {
                return Ok(stalled && self.muxer.takes_packets());
            };
            match self.muxer.fill(&chain, &mut self.guest, now)? {
                Some(written) => self.rx.complete(self.memory, chain.into_head(), written)?,
                None => self.rx.undo_pop(chain),
            }
        }
        Ok(self.muxer.wants_to_send() || stalled && self.muxer.takes_packets())
    }

    /// Makes the announcement that is due. True: none is under way any more.
    fn announced(&mut self, now: Instant) -> Result<bool, DeviceError> {
        let Some(queue) = self.events.as_deref_mut() else {
            *self.announcement = Announcement::None;
            return Ok(true);
        };
        match self.announcement {
            Announcement::None => Ok(true),
            Announcement::Due => {
                let Some(chain) = queue.pop(self.memory)? else {
                    return Ok(false);
                };
                chain.writer(self.memory).write(&TRANSPORT_RESET)?;
                let mut held = Vec::new();
                while let Some(other) = queue.pop(self.memory)? {
                    held.push(other);
                }
                let length = TRANSPORT_RESET.len() as u32;
                queue.complete(self.memory, chain.into_head(), length)?;
                queue.signal(self.memory, self.interrupt)?;
                let until = now + self.muxer.patience();
                *self.announcement = Announcement::Made { held, until };
                Ok(false)
            }
            Announcement::Made { held, until } => {
                let returned = queue.pop(self.memory)?;
                if returned.is_none() && now < *until {
                    return Ok(false);
                }
                held.extend(returned);
                self.release();
                Ok(true)
            }
        }
    }

    /// Gives back what was held of the event queue.
    fn release(&mut self) {
        if let Announcement::Made { held, .. } = &mut *self.announcement {
            if let Some(queue) = self.events.as_deref_mut() {
                while let Some(chain) = held.pop() {
                    queue.undo_pop(chain);
                }
            }
            *self.announcement = Announcement::None;
        }
    }
}
