//! Token buckets over bytes and operations.
//!
//! A request is let through while both buckets hold at least one token and then takes all it costs, which may leave a
//! bucket in debt; the next one waits until the debt is paid. So a request of any size passes, nothing has to be put
//! back on the queue, and the sustained rate is exact.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use caisson_vmm_api::RateLimit;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

const NANOS: i128 = 1_000_000_000;
/// Burst of a bucket for which none was asked for: this part of a second's worth, so that short sleeps average out.
const DEFAULT_BURST_DIVISOR: u64 = 10;

/// Level of one bucket, in tokens times 10⁹ so that refilling loses nothing.
#[derive(Debug)]
struct Bucket {
    rate: u64,
    capacity: i128,
    level: i128,
}

impl Bucket {
    /// None when the rate is 0, which means unlimited.
    fn new(rate: u64, burst: u64) -> Option<Self> {
        let burst = if burst == 0 {
            rate / DEFAULT_BURST_DIVISOR
        } else {
            burst
        };
        let capacity = i128::from(burst.max(1)) * NANOS;
        (rate > 0).then_some(Self {
            rate,
            capacity,
            level: capacity,
        })
    }

    fn refill(&mut self, elapsed: Duration) {
        let gained = i128::from(self.rate) * elapsed.as_nanos().min(i64::MAX as u128) as i128;
        self.level = (self.level + gained).min(self.capacity);
    }

    /// Time until the bucket holds a token again.
    fn wait(&self) -> Duration {
        let missing = NANOS - self.level;
        if missing <= 0 {
            return Duration::ZERO;
        }
        let nanos = (missing + i128::from(self.rate) - 1) / i128::from(self.rate);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

/// Limits what a device does in a second and wakes its thread when it may go on.
#[derive(Debug)]
pub struct RateLimiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
    refilled: Instant,
    timer: OwnedFd,
}

impl RateLimiter {
    /// None when the limit limits nothing. Creates a timerfd.
    pub fn new(limit: &RateLimit) -> rustix::io::Result<Option<Self>> {
        let bytes = Bucket::new(limit.bytes_per_second, limit.burst_bytes);
        let operations = Bucket::new(limit.operations_per_second, limit.burst_operations);
        if bytes.is_none() && operations.is_none() {
            return Ok(None);
        }
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?;
        Ok(Some(Self {
            bytes,
            operations,
            refilled: Instant::now(),
            timer,
        }))
    }

    /// Becomes readable (an edge, nobody reads it) once a refused request may be tried again.
    pub fn timer(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// May a request start? If not, the timer is set for when it may.
    pub fn admit(&mut self) -> rustix::io::Result<bool> {
        let wait = self.admit_at(Instant::now());
        if wait.is_zero() {
            return Ok(true);
        }
        let spec = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: Timespec {
                tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: wait.subsec_nanos().into(),
            },
        };
        rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec)?;
        Ok(false)
    }

    /// Takes what a request costs that was let through.
    pub fn charge(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.level -= i128::from(bytes) * NANOS;
        }
        if let Some(bucket) = &mut self.operations {
            bucket.level -= NANOS;
        }
    }

    fn admit_at(&mut self, now: Instant) -> Duration {
        let elapsed = now.saturating_duration_since(self.refilled);
        self.refilled = now;
        let mut wait = Duration::ZERO;
        for bucket in [&mut self.bytes, &mut self.operations]
            .into_iter()
            .flatten()
        {
            bucket.refill(elapsed);
            wait = wait.max(bucket.wait());
        }
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limiter(bytes: u64, burst: u64, operations: u64, burst_operations: u64) -> RateLimiter {
        let limit = RateLimit {
            bytes_per_second: bytes,
            burst_bytes: burst,
            operations_per_second: operations,
            burst_operations,
        };
        RateLimiter::new(&limit).unwrap().unwrap()
    }

    #[test]
    fn zero_means_unlimited() {
        assert!(RateLimiter::new(&RateLimit::default()).unwrap().is_none());
    }

    #[test]
    fn sustained_rate_is_exact() {
        let mut limiter = limiter(1_000_000, 4096, 0, 0);
        let start = limiter.refilled;
        let (mut now, mut sent) = (start, 0u64);
        while now < start + Duration::from_secs(10) {
            let wait = limiter.admit_at(now);
            if wait.is_zero() {
                limiter.charge(65_536);
                sent += 65_536;
            } else {
                now += wait;
            }
        }
        assert!(sent.abs_diff(10_000_000) < 2 * 65_536, "{sent}");
    }

    #[test]
    fn burst_passes_at_once_and_only_once() {
        let mut limiter = limiter(0, 0, 10, 5);
        let start = limiter.refilled;
        for _ in 0..5 {
            assert!(limiter.admit_at(start).is_zero());
            limiter.charge(1 << 40);
        }
        assert_eq!(limiter.admit_at(start), Duration::from_millis(100));
        let later = start + Duration::from_secs(3600);
        for _ in 0..5 {
            assert!(limiter.admit_at(later).is_zero());
            limiter.charge(0);
        }
        assert!(!limiter.admit_at(later).is_zero());
    }

    #[test]
    fn timer_fires_when_the_debt_is_paid() {
        let mut limiter = limiter(1_000_000, 1000, 0, 0);
        assert!(limiter.admit().unwrap());
        limiter.charge(21_000);
        assert!(!limiter.admit().unwrap());
        let started = Instant::now();
        let mut fds = [rustix::event::PollFd::new(
            &limiter.timer,
            rustix::event::PollFlags::IN,
        )];
        let timeout = Timespec {
            tv_sec: 5,
            tv_nsec: 0,
        };
        assert_eq!(rustix::event::poll(&mut fds, Some(&timeout)).unwrap(), 1);
        assert!(started.elapsed() >= Duration::from_millis(15));
        assert!(limiter.admit().unwrap());
    }

    #[test]
    fn extreme_figures_do_not_overflow() {
        let mut limiter = limiter(u64::MAX, u64::MAX, u64::MAX, u64::MAX);
        let start = limiter.refilled;
        for step in 0..100u64 {
            limiter.admit_at(start + Duration::from_secs(step << 20));
            limiter.charge(u64::MAX);
        }
    }
}
