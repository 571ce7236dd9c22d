//! The pod's microVM as a whole: what is known of it, and its end.

use std::{path::PathBuf, sync::Arc, sync::atomic::Ordering, time::Duration, time::SystemTime};

use caisson_sandbox::{StatsResponse, scaled};
use serde_json::json;

use super::{DRAIN_LIMIT, Tasks, release_rootfs};
use crate::{
    error::Error,
    process::{Exit, Process, Stage},
    server::sandbox_id,
};

impl Tasks {
    /// Whether `id` is the pod's.
    pub fn is_pod(&self, id: &str) -> bool {
        sandbox_id(&self.identity.namespace, id) == self.identity.sandbox
    }

    /// Name of the pod's sandbox on the host.
    pub fn sandbox_name(&self) -> &str {
        &self.identity.sandbox
    }

    /// From now on the pod does not end with its last task: somebody else sees to its life. False:
    /// that was so before.
    pub fn hold(&self) -> bool {
        !self.held.swap(true, Ordering::Relaxed)
    }

    /// See [`Tasks::hold`].
    pub fn is_held(&self) -> bool {
        self.held.load(Ordering::Relaxed)
    }

    /// How the machine ended, if it has.
    pub fn machine_end(&self) -> Option<Exit> {
        *self.machine_end.borrow()
    }

    pub(super) fn set_machine_end(&self, status: u32) {
        self.machine_end.send_if_modified(|end| {
            let first = end.is_none();
            if first {
                let at = SystemTime::now();
                *end = Some(Exit { status, at });
            }
            first
        });
    }

    /// Waits for the machine's end.
    ///
    /// # Errors
    /// None while the server lives.
    pub async fn wait_machine(&self) -> Result<Exit, Error> {
        let mut end = self.machine_end.subscribe();
        match end.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(exit)) => Ok(*exit),
            _ => Err(Error::Stopping),
        }
    }

    /// Process of the host that is the machine, while there is one.
    pub async fn machine_pid(&self) -> Option<u32> {
        let pod = self.pod.lock().await;
        pod.as_ref().map(|pod| pod.vmm_pid())
    }

    /// Figures of all containers together.
    ///
    /// # Errors
    /// No machine, no answer.
    pub async fn pod_stats(&self) -> Result<StatsResponse, Error> {
        Ok(self.pod().await?.stats("").await?)
    }

    /// What is known of the machine, for people.
    pub async fn about_pod(&self) -> serde_json::Value {
        let (name, manager) = (&self.identity.sandbox, &self.identity.namespace);
        let figures = match self.pod().await {
            Ok(pod) => pod.figures(name, manager).await.ok(),
            Err(_) => None,
        };
        json!({ "sandbox": name, "shim": std::process::id(), "figures": figures })
    }

    /// Ends the machine, removes what it has on the host, and tells the ends of what ran in it.
    /// Containers get SIGTERM and `grace` to end when it is not zero. Can be repeated.
    pub async fn stop_machine(&self, grace: Duration) {
        self.stopping.send_replace(true);
        let pod = self.pod.lock().await.clone();
        let Some(pod) = pod else {
            self.set_machine_end(0);
            return;
        };
        if let Err(error) = pod.stop(grace).await {
            log::error!("{error}");
        }
        self.set_machine_end(0);
        let ends: Vec<_> = self
            .table()
            .values()
            .filter(|process| matches!(process.stage, Stage::Starting | Stage::Running))
            .map(Process::watch)
            .collect();
        let told = async {
            for mut end in ends {
                // An end without a word: it was deleted.
                let _ = end.wait_for(Option::is_some).await;
            }
        };
        let limit = scaled(DRAIN_LIMIT) + Duration::from_secs(1);
        if tokio::time::timeout(limit, told).await.is_err() {
            log::warn!("some processes' ends are not told");
        }
    }

    /// Ends the machine, and lets go of what the tasks have on the host.
    pub async fn stop(&self) {
        self.stop_machine(Duration::ZERO).await;
        drop(self.pod.lock().await.take());
        let bundles: Vec<PathBuf> = self
            .table()
            .values()
            .map(|process| process.bundle.clone())
            .collect();
        for bundle in bundles {
            release_rootfs(&bundle).await;
        }
    }

    /// Ends the machine, and then the server.
    pub async fn shut_down(self: Arc<Self>) {
        self.stop().await;
        tokio::spawn(async move {
            // The answer goes first.
            tokio::time::sleep(scaled(Duration::from_millis(10))).await;
            self.ended.notify_one();
        });
    }

    /// Waits until containerd has heard of all that happened, but not for ever.
    pub async fn flush_events(&self) {
        self.events.flush(scaled(Duration::from_secs(3))).await;
    }
}
