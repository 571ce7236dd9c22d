//! The device's thread: takes requests, starts their operations, completes them.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::{
    event::epoll::{self, EventData, EventFlags},
    io::Errno,
};
use vm_memory::{Bytes, GuestAddress};

use super::{
    Block, ID_BYTES,
    disk::{Disk, Piece},
    engine::{self, Action, Engine, Operation},
    request::{self, Request, Status},
};
use crate::{
    memory::GuestMemory,
    rate_limit::RateLimiter,
    virtio::{Active, ActiveQueue, Chain, ChainError, DeviceError, Head, Interrupt, append_iovecs},
};

/// Requests taken before completions are looked at, and rounds before the stop event is.
const BATCH: usize = 64;
const ROUNDS: usize = 16;
/// How often an operation is started anew after a passing failure.
const MAX_RETRIES: u8 = 16;

const STOP: u64 = 0;
const WAKE: u64 = 1;
const TIMER: u64 = 2;

/// One operation of a request in flight.
struct Step {
    action: Action,
    file: u16,
    offset: u64,
    /// Bytes still to do.
    length: u64,
    /// Which of the request's iovecs are still to do.
    iovecs: (usize, usize),
    /// The range must read as zeros afterwards, whatever that takes.
    must_zero: bool,
    retries: u8,
}

impl Step {
    fn new(action: Action, file: u16, offset: u64, length: u64, iovecs: (usize, usize)) -> Self {
        Self {
            action,
            file,
            offset,
            length,
            iovecs,
            must_zero: false,
            retries: 0,
        }
    }

    /// Moves on behind `done` bytes, fewer than are left.
    fn consume(&mut self, iovecs: &mut [libc::iovec], done: u32) {
        self.offset += u64::from(done);
        self.length -= u64::from(done);
        let mut left = done as usize;
        while left > 0 && self.iovecs.0 < self.iovecs.1 {
            let iovec = &mut iovecs[self.iovecs.0];
            let count = left.min(iovec.iov_len);
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(count);
            iovec.iov_len -= count;
            left -= count;
            if iovec.iov_len == 0 {
                self.iovecs.0 += 1;
            }
        }
    }
}

/// A request in flight, at the index of its head.
#[derive(Default)]
struct Slot {
    head: Option<Head>,
    status_at: GuestAddress,
    status: Option<Status>,
    written: u32,
    /// Storage is kept from request to request. `iovecs` does not move while steps are in flight.
    steps: Vec<Step>,
    iovecs: Vec<libc::iovec>,
    in_flight: usize,
}

/// What [`Block`] runs with.
pub(super) struct Worker<'a> {
    serial: &'a str,
    read_only: bool,
    disk: &'a Disk,
    engine: &'a mut Engine,
    limiter: Option<&'a mut RateLimiter>,
    epoll: BorrowedFd<'a>,
    report: &'a dyn Fn(String),
    reported: &'a mut bool,
    memory: &'a GuestMemory,
    queue: &'a mut ActiveQueue,
    interrupt: &'a Interrupt,
    stop: BorrowedFd<'a>,
    slots: Vec<Slot>,
    in_flight: usize,
}

impl<'a> Worker<'a> {
    pub(super) fn new(block: &'a mut Block, active: &'a mut Active) -> Result<Self, DeviceError> {
        let queue = active
            .queues
            .first_mut()
            .and_then(Option::as_mut)
            .ok_or(DeviceError::QueueMissing(0))?;
        // SAFETY: `active` owns the event and outlives the worker.
        let stop = unsafe { BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(&active.stop)) };
        Ok(Self {
            serial: &block.serial,
            read_only: block.read_only,
            disk: &block.disk,
            engine: &mut block.engine,
            limiter: block.limiter.as_mut(),
            epoll: block.epoll.as_fd(),
            report: block.report.as_ref(),
            reported: &mut block.reported,
            memory: &active.memory,
            slots: (0..queue.size()).map(|_| Slot::default()).collect(),
            queue,
            interrupt: &active.interrupt,
            stop,
            in_flight: 0,
        })
    }

    /// Serves until told to stop; nothing is in flight afterwards, whatever happened.
    pub(super) fn run(mut self) -> Result<(), DeviceError> {
        let result = self.watch().and_then(|()| self.serve());
        let drained = self.drain();
        self.unwatch();
        result.and(drained)
    }

    /// Wakes: the stop event by level, the others by edge, so that no system call takes an event back.
    fn watched(&self) -> [Option<(BorrowedFd<'_>, u64, EventFlags)>; 4] {
        let edge = EventFlags::IN | EventFlags::ET;
        // SAFETY: the queue owns the event for as long as the worker borrows the queue.
        let kick =
            unsafe { BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(self.queue.kick())) };
        [
            Some((self.stop, STOP, EventFlags::IN)),
            Some((kick, WAKE, edge)),
            self.engine.readable().map(|fd| (fd, WAKE, edge)),
            self.limiter
                .as_ref()
                .map(|limiter| (limiter.timer(), TIMER, edge)),
        ]
    }

    fn watch(&self) -> Result<(), DeviceError> {
        for (fd, token, flags) in self.watched().into_iter().flatten() {
            epoll::add(self.epoll, fd, EventData::new_u64(token), flags)
                .map_err(DeviceError::io("epoll_ctl"))?;
        }
        Ok(())
    }

    fn unwatch(&self) {
        for (fd, ..) in self.watched().into_iter().flatten() {
            // What was never added cannot be removed, and need not be.
            let _ = epoll::delete(self.epoll, fd);
        }
    }

    fn serve(&mut self) -> Result<(), DeviceError> {
        let mut rounds = 0;
        loop {
            let taken = self.take()?;
            self.engine
                .submit(false)
                .map_err(DeviceError::io("io_uring_enter"))?;
            let finished = self.finish()?;
            self.queue.signal(self.memory, self.interrupt)?;
            let idle = !taken && !finished;
            rounds = if idle { ROUNDS } else { rounds + 1 };
            if rounds >= ROUNDS {
                rounds = 0;
                if self.wait(idle)? {
                    return Ok(());
                }
            }
        }
    }

    /// Waits for an event, or only looks. True: stop.
    fn wait(&self, block: bool) -> Result<bool, DeviceError> {
        let now = rustix::event::Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let mut events = [const { std::mem::MaybeUninit::uninit() }; 4];
        let timeout = if block { None } else { Some(&now) };
        let events = match epoll::wait(self.epoll, &mut events, timeout) {
            Ok((events, _)) => events,
            Err(Errno::INTR) => return Ok(false),
            Err(error) => return Err(DeviceError::io("epoll_wait")(error)),
        };
        Ok(events.iter().any(|event| event.data.u64() == STOP))
    }

    /// Starts waiting requests. True: there may be more.
    fn take(&mut self) -> Result<bool, DeviceError> {
        for _ in 0..BATCH {
            if let Some(limiter) = &mut self.limiter
                && !limiter
                    .admit()
                    .map_err(DeviceError::io("timerfd_settime"))?
            {
                return Ok(false);
            }
            let Some(chain) = self.queue.pop(self.memory)? else {
                return Ok(false);
            };
            let cost = self.begin(chain)?;
            if let Some(limiter) = &mut self.limiter {
                limiter.charge(cost);
            }
        }
        Ok(true)
    }

    /// Starts one request. Its cost in bytes.
    fn begin(&mut self, chain: Chain) -> Result<u64, DeviceError> {
        let Some(status_at) = request::status_address(&chain) else {
            // There is no way to tell the driver but that it got nothing.
            self.queue.complete(self.memory, chain.into_head(), 0)?;
            return Ok(0);
        };
        let index = usize::from(chain.index());
        let slot = &mut self.slots[index];
        slot.status_at = status_at;
        slot.status = None;
        // At most 2^30, the longest a chain can be.
        slot.written = chain.writable_bytes() as u32;
        slot.steps.clear();
        slot.iovecs.clear();
        let request = request::parse(&chain, self.memory, self.disk, self.read_only);
        let cost = request.as_ref().map_or(0, Request::cost);
        let planned = request.and_then(|request| self.plan(&chain, request));
        let slot = &mut self.slots[index];
        slot.head = Some(chain.into_head());
        if let Err(status) = planned {
            slot.status = Some(status);
            slot.steps.clear();
        }
        slot.in_flight = slot.steps.len();
        if slot.in_flight == 0 {
            self.complete(index)?;
            return Ok(cost);
        }
        self.in_flight += 1;
        for step in 0..self.slots[index].steps.len() {
            self.start(index, step)?;
        }
        Ok(cost)
    }

    /// Does what can be done at once and lists the other steps.
    fn plan(&mut self, chain: &Chain, request: Request) -> Result<(), Status> {
        let slot = &mut self.slots[usize::from(chain.index())];
        let (memory, disk) = (self.memory, self.disk);
        match request {
            Request::Read { start, length } => {
                plan_read(slot, memory, disk, chain, disk.pieces(start, length))
                    .map_err(|_| Status::IoError)?;
            }
            Request::Write { start, length } => {
                if length > 0 {
                    append_iovecs(memory, chain.readable(), 16, length, &mut slot.iovecs)
                        .map_err(|_| Status::IoError)?;
                    let iovecs = (0, slot.iovecs.len());
                    slot.steps
                        .push(Step::new(Action::Write, 0, start, length, iovecs));
                }
            }
            Request::Flush => {
                if !self.read_only {
                    slot.steps.push(Step::new(Action::Flush, 0, 0, 0, (0, 0)));
                }
            }
            Request::GetId => {
                let mut id = [0; ID_BYTES];
                id[..self.serial.len()].copy_from_slice(self.serial.as_bytes());
                let count = (chain.writable_bytes() - 1).min(ID_BYTES as u64) as usize;
                chain
                    .writer(memory)
                    .write(&id[..count])
                    .map_err(|_| Status::IoError)?;
            }
            Request::Discard { length: 0, .. } | Request::WriteZeroes { length: 0, .. } => {}
            Request::Discard { start, length } | Request::WriteZeroes { start, length, .. }
                if disk.is_block_device() =>
            {
                let discard = matches!(request, Request::Discard { .. });
                let file = disk.file(0).as_fd();
                if let Err(errno) = engine::block_device_range(file, discard, start, length) {
                    return Err(self.failure(Action::PunchHole, errno));
                }
            }
            Request::Discard { start, length } => {
                slot.steps
                    .push(Step::new(Action::PunchHole, 0, start, length, (0, 0)));
            }
            Request::WriteZeroes {
                start,
                length,
                unmap,
            } => {
                let action = if unmap {
                    Action::PunchHole
                } else {
                    Action::ZeroRange
                };
                let mut step = Step::new(action, 0, start, length, (0, 0));
                step.must_zero = true;
                slot.steps.push(step);
            }
        }
        Ok(())
    }

    fn start(&mut self, index: usize, step: usize) -> Result<(), DeviceError> {
        let slot = &self.slots[index];
        let current = &slot.steps[step];
        let operation = Operation {
            action: current.action,
            file: self.disk.file(current.file).as_fd(),
            offset: current.offset,
            length: current.length,
            buffers: &slot.iovecs[current.iovecs.0..current.iovecs.1],
        };
        let token = (index as u64) << 32 | step as u64;
        // SAFETY: the slot's iovecs are not touched before all its steps are done; the disk's files are open and guest
        // memory stays mapped as long as the worker borrows them, which does not end before everything is drained.
        // Guest memory is only ever reached through volatile accesses.
        unsafe { self.engine.start(token, &operation) }.map_err(DeviceError::io("io_uring_enter"))
    }

    /// Takes results. True: there were some.
    fn finish(&mut self) -> Result<bool, DeviceError> {
        let mut any = false;
        while let Some((token, result)) = self.engine.next_result() {
            any = true;
            let (index, step) = ((token >> 32) as usize, (token & 0xffff_ffff) as usize);
            if self.advance(index, step, result) {
                self.start(index, step)?;
                continue;
            }
            let slot = &mut self.slots[index];
            slot.in_flight -= 1;
            if slot.in_flight == 0 {
                self.in_flight -= 1;
                self.complete(index)?;
            }
        }
        Ok(any)
    }

    /// Notes what came of a step. True: it has to go on.
    fn advance(&mut self, index: usize, step: usize, result: Result<u32, Errno>) -> bool {
        let slot = &mut self.slots[index];
        let current = &mut slot.steps[step];
        let transfer = matches!(current.action, Action::Read | Action::Write);
        let errno = match result {
            Ok(_) if !transfer => return false,
            Ok(done) if u64::from(done) >= current.length => return false,
            // The file became shorter than it was: there is nothing to go on with.
            Ok(0) => Errno::IO,
            Ok(done) => {
                current.consume(&mut slot.iovecs, done);
                return true;
            }
            Err(Errno::INTR | Errno::AGAIN) if current.retries < MAX_RETRIES => {
                current.retries += 1;
                return true;
            }
            Err(Errno::OPNOTSUPP) if current.must_zero => {
                if current.action == Action::ZeroRange {
                    current.action = Action::PunchHole;
                    return true;
                }
                let (offset, length) = (current.offset, current.length);
                match engine::write_zeros(self.disk.file(0).as_fd(), offset, length) {
                    Ok(()) => return false,
                    Err(errno) => errno,
                }
            }
            Err(errno) => errno,
        };
        let action = current.action;
        let status = self.failure(action, errno);
        self.slots[index].status.get_or_insert(status);
        false
    }

    /// The status for a failed operation. The first one that is the back end's fault is reported.
    fn failure(&mut self, action: Action, errno: Errno) -> Status {
        let status = Status::from(errno);
        if status == Status::IoError && !*self.reported {
            *self.reported = true;
            (self.report)(format!(
                "block device {:?}: {action:?} failed: {errno}; the guest sees an I/O error",
                self.serial
            ));
        }
        status
    }

    fn complete(&mut self, index: usize) -> Result<(), DeviceError> {
        let slot = &mut self.slots[index];
        let Some(head) = slot.head.take() else {
            return Ok(());
        };
        let status = slot.status.unwrap_or(Status::Ok) as u8;
        self.memory
            .write_obj(status, slot.status_at)
            .map_err(|error| DeviceError::Chain(error.into()))?;
        self.queue.complete(self.memory, head, slot.written)?;
        Ok(())
    }

    fn drain(&mut self) -> Result<(), DeviceError> {
        while self.in_flight > 0 {
            self.engine
                .submit(true)
                .map_err(DeviceError::io("io_uring_enter"))?;
            self.finish()?;
        }
        Ok(self.queue.signal(self.memory, self.interrupt)?)
    }
}

/// Lists a read's file pieces as steps; what is in memory goes to the guest at once.
fn plan_read(
    slot: &mut Slot,
    memory: &GuestMemory,
    disk: &Disk,
    chain: &Chain,
    pieces: impl Iterator<Item = Piece>,
) -> Result<(), ChainError> {
    static ZEROS: [u8; 4096] = [0; 4096];
    let mut position = 0;
    for piece in pieces {
        let mut writer = chain.writer(memory);
        match piece {
            Piece::File {
                index,
                offset,
                length,
            } => {
                let first = slot.iovecs.len();
                append_iovecs(memory, chain.writable(), position, length, &mut slot.iovecs)?;
                let iovecs = (first, slot.iovecs.len());
                slot.steps
                    .push(Step::new(Action::Read, index, offset, length, iovecs));
            }
            Piece::Memory { offset, length } => {
                writer.split_off(position)?;
                writer.write(disk.memory(offset, length))?;
            }
            Piece::Zeros { length } => {
                writer.split_off(position)?;
                let mut left = length;
                while left > 0 {
                    let count = left.min(ZEROS.len() as u64);
                    writer.write(&ZEROS[..count as usize])?;
                    left -= count;
                }
            }
        }
        position += piece.length();
    }
    Ok(())
}
