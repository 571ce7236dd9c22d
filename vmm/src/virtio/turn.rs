//! Requests that are answered one after the other, a few at a time.

use super::{ActiveQueue, Chain, DeviceError, Interrupt};
use crate::memory::GuestMemory;

/// Requests of one turn.
const TURN: usize = 64;
/// Bytes of one turn's requests, of which the last may exceed it.
const TURN_BYTES: u64 = 1 << 20;

impl ActiveQueue {
    /// Answers waiting requests, but only some: a driver that always has another must not keep the
    /// device from looking whether it has to stop. When there may be more, for which the driver
    /// does not kick, the queue's kick is readable afterwards.
    ///
    /// `answer` returns how many bytes it has written. The driver is told of each answer at once,
    /// as it may be waiting for that one.
    ///
    /// # Errors
    /// Those of `answer`, and [`DeviceError::Queue`].
    pub fn serve(
        &mut self,
        memory: &GuestMemory,
        interrupt: &Interrupt,
        mut answer: impl FnMut(&Chain) -> Result<u32, DeviceError>,
    ) -> Result<(), DeviceError> {
        let mut bytes = 0;
        for _ in 0..TURN {
            let Some(chain) = self.pop(memory)? else {
                return Ok(());
            };
            let written = answer(&chain)?;
            bytes += chain.readable_bytes() + chain.writable_bytes();
            self.complete(memory, chain.into_head(), written)?;
            self.signal(memory, interrupt)?;
            if bytes >= TURN_BYTES {
                break;
            }
        }
        // A counter that is full is readable as well.
        let _ = self.kick().write(1);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, atomic::AtomicU64};

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::virtio::testing::{TestQueue, memory};

    const SIZE: u16 = 256;

    /// A queue with `count` requests of `bytes` each, and the device's side of it.
    fn queue(memory: &GuestMemory, count: u16, bytes: u32) -> (TestQueue, ActiveQueue) {
        let mut driver = TestQueue::fresh(memory, 0, SIZE);
        for head in 0..count {
            driver.write_descriptor(head, 0x10_0000, bytes, 0, 0);
            driver.push_available(head);
        }
        let active = driver.activate(false, Arc::new(AtomicU64::new(0)));
        (driver, active.unwrap())
    }

    /// Requests of a turn, and whether the queue is kicked after it.
    fn turn(device: &mut ActiveQueue, memory: &GuestMemory) -> (u32, bool) {
        let interrupt = Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let mut seen = 0;
        let served = device.serve(memory, &interrupt, |_| {
            seen += 1;
            Ok(0)
        });
        served.unwrap();
        (seen, device.kick().read().is_ok())
    }

    #[test]
    fn a_full_queue_takes_several_turns_and_loses_nothing() {
        let memory = memory();
        let (mut driver, mut device) = queue(&memory, 150, 1);
        let turns = [(); 4].map(|()| turn(&mut device, &memory));
        assert_eq!(turns, [(64, true), (64, true), (22, false), (0, false)]);
        for head in 0..150 {
            assert_eq!(driver.pop_used(), Some((head, 0)));
        }
    }

    #[test]
    fn large_requests_end_a_turn_earlier() {
        let memory = memory();
        let (_driver, mut device) = queue(&memory, 5, 600 << 10);
        let turns = [(); 3].map(|()| turn(&mut device, &memory));
        assert_eq!(turns, [(2, true), (2, true), (1, false)]);
    }
}
