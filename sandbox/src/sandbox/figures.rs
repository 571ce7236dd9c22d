//! The sandbox's account of itself.

use std::time::{Duration, SystemTime};

use super::Sandbox;
use crate::{
    deadline::scaled,
    error::Error,
    figures::{ContainerFigures, Figures, HostProcess, Stage},
};

/// What the guest has not told by then is left out: whoever watches a host asks all sandboxes.
const GUEST_LIMIT: Duration = Duration::from_secs(1);

/// What the boot was like.
pub(super) struct BootFigures {
    at: u64,
    stages: Vec<Stage>,
}

impl BootFigures {
    pub(super) fn now(stages: Vec<Stage>) -> Self {
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Self {
            at: since.unwrap_or_default().as_secs(),
            stages,
        }
    }
}

impl Sandbox {
    /// What can be counted, for the sandbox that is called `name` and belongs to `manager`.
    ///
    /// # Errors
    /// The VMM has gone.
    pub async fn figures(&self, name: &str, manager: &str) -> Result<Figures, Error> {
        let vmm = self.describe().await?;
        let told = tokio::time::timeout(scaled(GUEST_LIMIT), self.container_figures()).await;
        let file_server = self.shares.lock().await.as_ref().map(|shares| shares.pid());
        let mut processes = vec![
            ("vmm", Some(self.vmm_pid())),
            ("shim", Some(std::process::id())),
            ("file-server", file_server),
        ];
        let look = move || {
            let there = processes.drain(..);
            there
                .filter_map(|(role, pid)| HostProcess::look(role, pid?))
                .collect()
        };
        Ok(Figures {
            sandbox: name.to_owned(),
            manager: manager.to_owned(),
            booted_at: self.boot.at,
            boot: self.boot.stages.clone(),
            vmm,
            vcpus_online: self.sizing.vcpus().await,
            guest_answers: told.is_ok(),
            containers: told.unwrap_or_default(),
            requests: self.agent.latencies().list(),
            // The kernel walks the whole of the guest's memory for it.
            processes: tokio::task::spawn_blocking(look).await.unwrap_or_default(),
        })
    }

    async fn container_figures(&self) -> Vec<ContainerFigures> {
        let mut ids: Vec<String> = self.container_ids();
        ids.sort();
        let mut figures = Vec::with_capacity(ids.len());
        for id in ids {
            // It may have been deleted meanwhile.
            if let Ok(stats) = self.stats(&id).await {
                figures.push(ContainerFigures {
                    id,
                    cpu_usec: stats.cpu_usage_usec,
                    memory_bytes: stats.memory_current_bytes,
                    pids: stats.pids_current,
                    oom_kills: stats.memory_events.get("oom_kill").copied().unwrap_or(0),
                });
            }
        }
        figures
    }
}
