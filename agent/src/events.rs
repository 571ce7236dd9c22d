//! Events for the host: numbered, kept until it has acknowledged them.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use caisson_protocol::agent::{Event, Exited, OutOfMemory, ProcessExit, event::Kind};
use tokio::sync::Notify;

/// Most events kept for a host that does not fetch them; the oldest go first.
const MAX_KEPT: usize = 16 * 1024;

/// The log of events.
#[derive(Default)]
pub struct Events {
    log: Mutex<Log>,
    arrived: Notify,
}

#[derive(Default)]
struct Log {
    last: u64,
    kept: VecDeque<Event>,
}

/// Nanoseconds since the epoch on the guest's clock.
pub fn now_ns() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

impl Events {
    fn log(&self) -> MutexGuard<'_, Log> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, kind: Kind) {
        let mut log = self.log();
        log.last += 1;
        let event = Event {
            sequence: log.last,
            time_ns: now_ns(),
            kind: Some(kind),
            ..Default::default()
        };
        log.kept.push_back(event);
        if log.kept.len() > MAX_KEPT {
            log.kept.pop_front();
        }
        drop(log);
        self.arrived.notify_waiters();
    }

    /// A process ended.
    pub fn exited(&self, container_id: &str, exec_id: &str, exit: ProcessExit) {
        self.push(Kind::Exited(Exited {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            exit: Some(exit).into(),
            ..Default::default()
        }));
    }

    /// The kernel killed a process of the container for want of memory.
    pub fn out_of_memory(&self, container_id: &str) {
        self.push(Kind::Oom(OutOfMemory {
            container_id: container_id.to_owned(),
            ..Default::default()
        }));
    }

    /// Forgets what `after` acknowledges and returns the rest, waiting for one if there is none.
    pub async fn after(&self, after: u64, wait: Duration) -> Vec<Event> {
        let deadline = tokio::time::Instant::now() + wait;
        loop {
            // Registered before the look, so that nothing slips in between.
            let arrived = self.arrived.notified();
            {
                let mut log = self.log();
                while log
                    .kept
                    .front()
                    .is_some_and(|event| event.sequence <= after)
                {
                    log.kept.pop_front();
                }
                if !log.kept.is_empty() {
                    return log.kept.iter().take(1024).cloned().collect();
                }
            }
            if tokio::time::timeout_at(deadline, arrived).await.is_err() {
                return Vec::new();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn nothing_is_lost_until_acknowledged() {
        let events = Events::default();
        events.out_of_memory("a");
        events.out_of_memory("b");
        let sequences =
            |list: Vec<Event>| list.iter().map(|event| event.sequence).collect::<Vec<_>>();
        assert_eq!(sequences(events.after(0, Duration::ZERO).await), [1, 2]);
        assert_eq!(sequences(events.after(0, Duration::ZERO).await), [1, 2]);
        assert_eq!(sequences(events.after(1, Duration::ZERO).await), [2]);
        assert!(events.after(2, Duration::from_millis(1)).await.is_empty());
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_waiter_is_woken() {
        let events = std::sync::Arc::new(Events::default());
        let waiter = tokio::spawn({
            let events = events.clone();
            async move { events.after(0, Duration::from_secs(60)).await.len() }
        });
        tokio::task::yield_now().await;
        events.out_of_memory("a");
        assert_eq!(waiter.await.unwrap(), 1);
    }
}
