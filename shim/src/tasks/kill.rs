//! Signals, and a guest that does not do what the last of them says.

use std::{sync::Arc, time::Duration};

use caisson_sandbox::scaled;

use super::{Name, Tasks};
use crate::{error::Error, pod::Pod, process::Stage};

/// SIGKILL (signal(7)).
const SIGKILL: u32 = 9;

/// How long a container may take to end by SIGKILL: one whose process waits for a disk or a share
/// (uninterruptible sleep) ends after that.
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
            self.insist(id, &pod);
        }
        Ok(pod.signal(id, exec_id, signal, all).await?)
    }

    /// Sees to it that the container ends, if that is not under way.
    fn insist(self: &Arc<Self>, id: &str, pod: &Arc<dyn Pod>) {
        let name = (id.to_owned(), String::new());
        let begun = self.with(&name, |process| {
            // The guest need not know of one that is being created.
            let first = process.stage != Stage::Creating && !process.dying;
            process.dying |= first;
            Ok(first)
        });
        if let Ok(true) = begun {
            let (tasks, pod) = (self.clone(), pod.clone());
            tokio::spawn(async move { tasks.end_by_force(name, pod).await });
        }
    }

    /// Stops the microVM unless the guest tells the container's end in time.
    async fn end_by_force(&self, name: Name, pod: Arc<dyn Pod>) {
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
        if let Err(error) = pod.stop(Duration::ZERO).await {
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
