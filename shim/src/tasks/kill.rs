//! Signals, and a guest that does not let a container end or go.

use std::{sync::Arc, time::Duration};

use caisson_sandbox::scaled;
use tokio::time::Instant;

use super::{Name, Tasks};
use crate::{error::Error, process::Stage};

/// SIGKILL (signal(7)).
const SIGKILL: u32 = 9;

/// How long a container may take to end by SIGKILL, and then to be deleted: one whose process waits
/// for a disk or a share (uninterruptible sleep) ends after that.
const KILL_LIMIT: Duration = Duration::from_secs(60);

impl Tasks {
    /// Sends a signal. A container that SIGKILL does not end costs the pod its microVM.
    ///
    /// # Errors
    /// No such process, or it has ended.
    pub async fn kill(
        self: &Arc<Self>,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), Error> {
        let name = (id.to_owned(), exec_id.to_owned());
        let stage = self.with(&name, |process| Ok(process.stage))?;
        if stage == Stage::Stopped {
            return Err(Error::NotFound("process already finished".to_owned()));
        }
        let pod = self.pod().await?;
        // Whatever the guest answers: it may lie.
        if signal == SIGKILL && (all || exec_id.is_empty()) {
            self.insist(id);
        }
        Ok(pod.signal(id, exec_id, signal, all).await?)
    }

    /// Sees to it that the container ends, if that is not under way.
    fn insist(self: &Arc<Self>, id: &str) {
        let name = (id.to_owned(), String::new());
        let begun = self.with(&name, |process| {
            // The guest need not know of one that is being created.
            let first = process.stage != Stage::Creating && !process.dying;
            process.dying |= first;
            Ok(first)
        });
        if let Ok(true) = begun {
            let tasks = self.clone();
            tokio::spawn(async move { tasks.end_by_force(name).await });
        }
    }

    /// Stops the microVM unless the guest tells the container's end in time.
    async fn end_by_force(&self, name: Name) {
        let limit = scaled(KILL_LIMIT);
        if self.ends_within(limit, &name).await {
            return;
        }
        log::error!(
            "container {} has not ended {} s after SIGKILL, whatever its guest says: stopping the \
             microVM, and all containers in it",
            name.0,
            limit.as_secs()
        );
        self.stop_pod().await;
    }

    /// Stops the microVM if its guest has refused for too long to delete a container that has ended:
    /// its pod could not go.
    pub(super) async fn kept(&self, name: &Name) {
        let limit = scaled(KILL_LIMIT);
        let since = self.with(name, |process| {
            Ok(*process.kept_since.get_or_insert_with(Instant::now))
        });
        if !since.is_ok_and(|since| since.elapsed() > limit) {
            return;
        }
        log::error!(
            "the guest has not deleted container {} for {} s: stopping the microVM, and all containers \
             in it",
            name.0,
            limit.as_secs()
        );
        self.stop_pod().await;
    }

    async fn stop_pod(&self) {
        let stopped = match self.pod().await {
            Ok(pod) => pod.stop(Duration::ZERO).await.map_err(Error::from),
            Err(error) => Err(error),
        };
        if let Err(error) = stopped {
            log::error!("{error}");
        }
    }

    async fn ends_within(&self, limit: Duration, name: &Name) -> bool {
        let Ok(mut exit) = self.with(name, |process| Ok(process.watch())) else {
            return true;
        };
        let told = tokio::time::timeout(limit, exit.wait_for(Option::is_some))
            .await
            .is_ok();
        // Perhaps only its output is late. One that is not there was deleted.
        told || self
            .with(name, |process| Ok(process.has_ended()))
            .unwrap_or(true)
    }
}
