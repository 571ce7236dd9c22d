//! Histograms of how long requests take.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use serde::{Deserialize, Serialize};

/// Upper bounds of the histograms' buckets, seconds. What is longer is in the count alone.
pub const BOUNDS: [f64; 9] = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0];

/// The histogram of one kind of request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// What was asked for.
    pub request: String,
    /// Requests that took at most as long as the bound of [`BOUNDS`] in the same place, and longer
    /// than the one before.
    pub buckets: [u64; BOUNDS.len()],
    /// All requests.
    pub count: u64,
    /// Those that failed.
    pub failed: u64,
    /// Time of all, seconds.
    pub sum: f64,
}

/// Histograms by kind of request.
#[derive(Debug, Default)]
pub struct Latencies(Mutex<BTreeMap<&'static str, Latency>>);

impl Latencies {
    /// Adds a request.
    pub fn add(&self, request: &'static str, took: Duration, failed: bool) {
        let seconds = took.as_secs_f64();
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let latency = table.entry(request).or_insert_with(|| Latency {
            request: request.to_owned(),
            buckets: [0; BOUNDS.len()],
            count: 0,
            failed: 0,
            sum: 0.0,
        });
        if let Some(place) = BOUNDS.iter().position(|bound| seconds <= *bound) {
            latency.buckets[place] += 1;
        }
        latency.count += 1;
        latency.failed += u64::from(failed);
        latency.sum += seconds;
    }

    /// All of them.
    pub fn list(&self) -> Vec<Latency> {
        let table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        table.values().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_by_kind_and_length() {
        let latencies = Latencies::default();
        latencies.add("a", Duration::from_millis(1), false);
        latencies.add("a", Duration::from_millis(2), true);
        latencies.add("a", Duration::from_secs(60), false);
        latencies.add("b", Duration::ZERO, false);
        let list = latencies.list();
        assert_eq!(list.len(), 2);
        assert_eq!(list[0].buckets[..3], [1, 1, 0]);
        assert_eq!((list[0].count, list[0].failed), (3, 1));
        assert!((list[0].sum - 60.003).abs() < 1e-9);
        assert_eq!(list[1].buckets[0], 1);
    }
}
