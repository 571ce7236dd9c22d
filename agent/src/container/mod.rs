//! Containers of the pod and their processes.
//!
//! One table under one lock that is never held across an await. A process goes
//! Created → Running → Stopped; whatever takes it a step further first takes
//! what that step needs out of the table, so that two callers cannot both do it.

mod control;
mod copy_up;
mod create;
mod devices;
mod exec;
mod hooks;
pub mod init;
mod life;
pub mod mounts;
pub mod paths;
pub mod pod_init;
pub mod published;
mod request;
mod rootfs;
mod spawn;
mod table;
mod terminal;
pub mod trim;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use request::{Layer, Rootfs, Upper};
pub use rootfs::is_sysctl_name;

use crate::{
    events::Events,
    failure::Result,
    oom,
    stdio::{Streams, Token},
};
use table::{State, Table};

/// All containers.
pub struct Manager {
    table: Mutex<Table>,
    /// For the host.
    pub events: Events,
    /// Streams that wait for the host.
    pub streams: Arc<Streams>,
    /// On the containers' memory.
    pub oom_watch: oom::Watch,
}

/// What the host may learn of a new process.
pub struct Created {
    /// PID in the guest, 0 when it does not exist yet.
    pub pid: u32,
    /// Names its streams.
    pub token: Token,
}

impl Manager {
    /// No containers.
    ///
    /// # Errors
    /// The kernel lets nobody watch memory.
    pub fn new() -> Result<Self> {
        Ok(Self {
            table: Mutex::default(),
            events: Events::default(),
            streams: Arc::default(),
            oom_watch: oom::Watch::new()?,
        })
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a PID namespace for containers to come, whichever of them ends.
    ///
    /// # Errors
    /// See [`pod_init::start`].
    pub fn keep_pid_namespace(&self) -> Result<()> {
        let pid = pod_init::start()?;
        self.table().pod_init = Some(pid);
        Ok(())
    }

    /// Every container there is.
    pub fn ids(&self) -> Vec<String> {
        self.table().containers.keys().cloned().collect()
    }

    /// Whether a container's first process has ended.
    pub fn has_ended(&self, id: &str) -> bool {
        self.table().container(id).map_or(true, |container| {
            matches!(container.init.state, State::Stopped(_))
        })
    }
}
