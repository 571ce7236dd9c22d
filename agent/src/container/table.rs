//! What the agent knows of containers and processes.

use std::{collections::HashMap, os::fd::OwnedFd, sync::Arc};

use caisson_protocol::agent::ProcessExit;
use oci_spec::runtime::{LinuxSeccomp, Process as ProcessSpec};
use tokio::sync::Notify;

use super::spawn;
use crate::{
    cgroup::Cgroup,
    events::now_ns,
    failure::{Failure, Kind, Result},
    stdio::Token,
};

/// Held while a process is being born, until its PID is in the table.
#[must_use]
pub(super) struct Birth {
    _held: Arc<()>,
}

#[derive(Default)]
pub(super) struct Table {
    pub(super) containers: HashMap<String, Container>,
    /// Ends of processes that nobody has claimed yet: their PID is not known before they are
    /// born, and a process may die sooner. Only kept while something is being born.
    unclaimed: HashMap<u32, ProcessExit>,
    /// Every [`Birth`] holds a clone.
    births: Arc<()>,
    /// Keeps the pod's PID namespace where no container does.
    pub(super) pod_init: Option<u32>,
    /// The container that was made first, which may have gone.
    pub(super) first: Option<String>,
}

impl Table {
    /// The process whose PID namespace is the pod's: the one made for that, else the pod's first
    /// container's.
    ///
    /// # Errors
    /// It does not run.
    pub(super) fn pid_namespace_of_pod(&self) -> Result<u32> {
        if let Some(pid) = self.pod_init {
            return Ok(pid);
        }
        self.first
            .as_ref()
            .and_then(|id| self.containers.get(id))
            .map(|container| container.init.pid())
            .filter(|pid| *pid != 0)
            .ok_or_else(|| {
                Failure::new(
                    Kind::FailedPrecondition,
                    "the pod's first container, whose PID namespace this one shares, does not run",
                )
            })
    }

    pub(super) fn container(&mut self, id: &str) -> Result<&mut Container> {
        self.containers
            .get_mut(id)
            .ok_or_else(|| not_found("container", id))
    }

    pub(super) fn process(&mut self, container_id: &str, exec_id: &str) -> Result<&mut Process> {
        self.container(container_id)?.process(exec_id)
    }

    /// Has the ends of unknown processes kept as long as the returned one lives.
    pub(super) fn birth(&mut self) -> Birth {
        if !self.expects() {
            self.unclaimed.clear();
        }
        Birth {
            _held: self.births.clone(),
        }
    }

    /// Keeps the end of a process that nobody knows, if it may be one that is being born.
    pub(super) fn unknown_ended(&mut self, exit: ProcessExit) {
        if self.expects() {
            self.unclaimed.insert(exit.pid, exit);
        }
    }

    /// The end of the new process `pid`, if it came before the process was known.
    pub(super) fn early_end(&mut self, pid: u32) -> Option<ProcessExit> {
        self.unclaimed.remove(&pid)
    }

    fn expects(&self) -> bool {
        Arc::strong_count(&self.births) > 1
    }
}

pub(super) struct Container {
    pub(super) cgroup: Arc<Cgroup>,
    pub(super) init: Process,
    pub(super) execs: HashMap<String, Process>,
    pub(super) seccomp: Option<LinuxSeccomp>,
    /// Of its processes that name none.
    pub(super) oom_score: i32,
    pub(super) oom_kills: u64,
    pub(super) paused: bool,
    pub(super) deleting: bool,
    /// The block device of its writable layer, if that is a disk of ours.
    pub(super) writable_layer: Option<String>,
}

pub(super) struct Process {
    pub(super) state: State,
    pub(super) token: Token,
    pub(super) close_stdin: Arc<Notify>,
    pub(super) terminal: Option<OwnedFd>,
    pub(super) size: (u16, u16),
    /// An exec is only made when it starts.
    pub(super) pending: Option<Pending>,
}

pub(super) struct Pending {
    pub(super) process: ProcessSpec,
    pub(super) archive: Option<caisson_archive::Request>,
    pub(super) user: Option<String>,
    pub(super) streams: crate::stdio::Prepared,
    pub(super) terminal: bool,
}

pub(super) enum State {
    /// Waits to be started; an exec has no process until then.
    Created(Option<Box<spawn::Waiting>>),
    /// Between the request to start and its answer: the end is not reported before the start.
    Starting {
        pid: u32,
        ended: Option<ProcessExit>,
    },
    Running {
        pid: u32,
    },
    Stopped(ProcessExit),
}

impl Process {
    pub(super) fn pid(&self) -> u32 {
        match &self.state {
            State::Created(waiting) => waiting.as_ref().map_or(0, |waiting| waiting.pid),
            State::Starting { pid, .. } | State::Running { pid } => *pid,
            State::Stopped(exit) => exit.pid,
        }
    }
}

impl Container {
    /// Whether there were any since the last call.
    pub(super) fn new_oom_kills(&mut self) -> bool {
        let kills = self.cgroup.oom_kills();
        std::mem::replace(&mut self.oom_kills, kills) < kills
    }

    /// PID of the first process of container `id`, which this is.
    ///
    /// # Errors
    /// It does not run.
    pub(super) fn running(&self, id: &str) -> Result<u32> {
        match self.init.state {
            State::Running { pid } => Ok(pid),
            _ => Err(Failure::new(
                Kind::FailedPrecondition,
                format!("container {id} is not running"),
            )),
        }
    }

    pub(super) fn process(&mut self, exec_id: &str) -> Result<&mut Process> {
        if exec_id.is_empty() {
            return Ok(&mut self.init);
        }
        self.execs
            .get_mut(exec_id)
            .ok_or_else(|| not_found("exec", exec_id))
    }
}

pub(super) fn not_found(what: &str, id: &str) -> Failure {
    Failure::new(Kind::NotFound, format!("no such {what}: {id}"))
}

pub(super) fn exit(pid: u32, status: u32) -> ProcessExit {
    ProcessExit {
        pid,
        exit_status: status,
        exited_at_ns: now_ns(),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_early_end_is_kept_while_something_is_being_born_and_no_longer() {
        let mut table = Table::default();
        table.unknown_ended(exit(7, 0));
        assert_eq!(table.early_end(7), None);

        let (one, other) = (table.birth(), table.birth());
        drop(one); // Given up, or over: all the same.
        table.unknown_ended(exit(7, 3));
        table.unknown_ended(exit(8, 4));
        assert_eq!(table.early_end(7).map(|exit| exit.exit_status), Some(3));
        assert_eq!(table.early_end(7), None);

        drop(other);
        table.unknown_ended(exit(9, 0));
        let _birth = table.birth();
        assert_eq!((table.early_end(8), table.early_end(9)), (None, None));
    }
}
