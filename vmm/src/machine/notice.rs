//! What happens by itself, on its way from the threads to the API.

use std::{
    collections::{BTreeMap, VecDeque},
    os::fd::{AsRawFd, RawFd},
    sync::{Mutex, MutexGuard, PoisonError},
};

use caisson_vmm_api::ExitReason;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Failures of one slot that are told. A device fails at most once until its driver resets it, but
/// a guest can repeat that for ever, and somebody writes down what is told.
const TOLD_FAILURES: u32 = 8;

/// Something that happened.
#[derive(Debug)]
pub enum Notice {
    /// The guest is over.
    Ended(ExitReason),
    /// A device stopped.
    DeviceFailed {
        /// Its slot.
        slot: u32,
        /// Why.
        message: String,
    },
}

/// A queue of notices that can be polled.
pub struct Notices {
    state: Mutex<State>,
    event: EventFd,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Notice>,
    /// Failures of each slot's device, told or not; a reset of the device clears nothing.
    failures: BTreeMap<u32, u32>,
}

impl Notices {
    /// An empty queue.
    ///
    /// # Errors
    /// Those of eventfd(2).
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            state: Mutex::default(),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Appends a notice. Of a device that goes on failing the last one told says so, and the rest
    /// is dropped.
    pub fn push(&self, mut notice: Notice) {
        let mut state = self.lock();
        if let Notice::DeviceFailed { slot, message } = &mut notice {
            let failures = state.failures.entry(*slot).or_default();
            *failures = failures.saturating_add(1);
            if *failures > TOLD_FAILURES + 1 {
                return;
            }
            if *failures > TOLD_FAILURES {
                message.push_str("; it fails again and again: no more is told of this slot");
            }
        }
        state.queue.push_back(notice);
        drop(state);
        // A counter that is full is readable as well.
        let _ = self.event.write(1);
    }

    /// Takes all notices.
    pub fn take(&self) -> VecDeque<Notice> {
        let _ = self.event.read();
        std::mem::take(&mut self.lock().queue)
    }

    /// The slot is filled anew: what its last device did counts no more.
    pub(super) fn forget(&self, slot: u32) {
        self.lock().failures.remove(&slot);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsRawFd for Notices {
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fail(notices: &Notices, slot: u32) {
        notices.push(Notice::DeviceFailed {
            slot,
            message: "broken queue".into(),
        });
    }

    fn told(notices: &Notices) -> Vec<String> {
        let taken = notices.take().into_iter();
        taken
            .map(|notice| match notice {
                Notice::DeviceFailed { slot, message } => format!("{slot}: {message}"),
                Notice::Ended(reason) => format!("{reason:?}"),
            })
            .collect()
    }

    #[test]
    fn a_device_that_fails_for_ever_is_told_of_a_few_times() {
        let notices = Notices::new().unwrap();
        for _ in 0..1000 {
            fail(&notices, 3);
        }
        fail(&notices, 4);
        notices.push(Notice::Ended(ExitReason::GuestShutdown));
        let lines = told(&notices);
        assert_eq!(lines.len(), 11);
        assert!(lines[..8].iter().all(|line| line == "3: broken queue"));
        assert!(lines[8].ends_with("no more is told of this slot"));
        assert_eq!(lines[9..], ["4: broken queue", "GuestShutdown"]);
        // Nor later, until another device is there.
        fail(&notices, 3);
        assert!(told(&notices).is_empty());
        notices.forget(3);
        fail(&notices, 3);
        assert_eq!(told(&notices), ["3: broken queue"]);
    }
}
