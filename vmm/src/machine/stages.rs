//! How long the start took, stage by stage.

use std::time::Instant;

/// Nanoseconds from the start of the process to each stage.
pub struct Stages {
    start: Instant,
    reached: Vec<(&'static str, u64)>,
}

impl Stages {
    /// Counts from now.
    pub fn start() -> Self {
        Self {
            start: Instant::now(),
            reached: Vec::new(),
        }
    }

    /// Notes that `stage` is done.
    pub fn reached(&mut self, stage: &'static str) {
        // 584 years fit.
        let elapsed = self.start.elapsed().as_nanos() as u64;
        self.reached.push((stage, elapsed));
    }

    /// All stages so far.
    pub fn list(&self) -> Vec<(String, u64)> {
        let reached = self.reached.iter();
        reached
            .map(|(stage, at)| ((*stage).to_owned(), *at))
            .collect()
    }
}
