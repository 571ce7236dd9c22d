//! A process's life, and the events that tell it: in this order, each once.

use std::{sync::Arc, time::SystemTime};

use caisson_sandbox::{AgentErrorKind, Error as SandboxError, scaled};
use containerd_shim_protos::events::task::{
    TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskStart,
};

use super::{DRAIN_LIMIT, KILLED, Name, Tasks, clip, missing, release_rootfs, timestamp};
use crate::{
    error::Error,
    events::topic,
    pod::Pod,
    process::{Exit, Process, Stage},
    stdio::{Host, Paths, Pumps},
};

impl Tasks {
    /// Registers an exec.
    ///
    /// # Errors
    /// It exists, or its container does not run.
    pub async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process_json: Vec<u8>,
        paths: Paths,
    ) -> Result<(), Error> {
        if exec_id.is_empty() {
            return Err(Error::Invalid("the exec's id is missing".to_owned()));
        }
        let name = (id.to_owned(), exec_id.to_owned());
        let first = (id.to_owned(), String::new());
        let bundle = self.with(&first, |process| match process.stage {
            Stage::Running => Ok(process.bundle.clone()),
            _ => Err(Error::FailedPrecondition(format!(
                "container {id} is not running"
            ))),
        })?;
        self.insert(name.clone(), Process::new(paths.clone(), bundle))?;
        match self.exec_in_guest(&name, process_json, &paths).await {
            Ok((host, created)) => self.with(&name, |process| {
                process.stage = Stage::Created;
                process.unstarted = Some((host, created.streams));
                self.events.send(
                    topic::EXEC_ADDED,
                    &TaskExecAdded {
                        container_id: name.0.clone(),
                        exec_id: name.1.clone(),
                        ..Default::default()
                    },
                );
                Ok(())
            }),
            Err(error) => {
                self.table().remove(&name);
                Err(error)
            }
        }
    }

    async fn exec_in_guest(
        &self,
        (id, exec_id): &Name,
        process_json: Vec<u8>,
        paths: &Paths,
    ) -> Result<(Host, caisson_sandbox::Created), Error> {
        let specification: oci_spec::runtime::Process = serde_json::from_slice(&process_json)
            .map_err(|error| Error::Invalid(format!("malformed process specification: {error}")))?;
        let size = specification
            .console_size()
            .map_or((0, 0), |size| (clip(size.height()), clip(size.width())));
        let host = Host::open(paths, (&self.identity.namespace, id)).await?;
        let pod = self.pod().await?;
        let created = pod
            .create_exec(id, exec_id, process_json, &paths.wanted(size))
            .await?;
        Ok((host, created))
    }

    /// Starts a process.
    ///
    /// # Errors
    /// Its program cannot be run, in the guest's own words.
    pub async fn start(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<u32, Error> {
        let name = (id.to_owned(), exec_id.to_owned());
        let (host, streams, close_stdin) = self.with(&name, |process| {
            match (process.stage, process.deleting, process.unstarted.take()) {
                (Stage::Created, false, Some((host, streams))) => {
                    process.stage = Stage::Starting;
                    Ok((host, streams, process.close_stdin.clone()))
                }
                (_, _, unstarted) => {
                    process.unstarted = unstarted;
                    Err(Error::FailedPrecondition(
                        "the process was started already".to_owned(),
                    ))
                }
            }
        })?;
        let pumps = Pumps::start(host, streams, close_stdin);
        let started = match self.pod().await {
            Ok(pod) => start_in_guest(pod.as_ref(), &name).await,
            Err(error) => Err(error),
        };
        let pid = started.inspect_err(|error| {
            // It has ended without having run; that is for Delete to tell, not for an event.
            let exit = Exit {
                status: status_of(error),
                at: SystemTime::now(),
            };
            let _ = self.with(&name, |process| Ok(process.set_exit(exit)));
        })?;
        let hooks = self.with(&name, |process| Ok(process.hooks.clone()))?;
        if let Some(hooks) = hooks {
            hooks.started(pid).await;
        }
        let early = self.with(&name, |process| {
            process.pid = pid;
            process.stage = Stage::Running;
            self.tell_start(&name, pid);
            Ok(process.early_exit.take())
        })?;
        let watched = self.clone();
        tokio::spawn(async move { watched.see_to_the_end(name, pumps, early).await });
        Ok(pid)
    }

    fn tell_start(&self, (container, exec): &Name, pid: u32) {
        if exec.is_empty() {
            let event = TaskStart {
                container_id: container.clone(),
                pid,
                ..Default::default()
            };
            self.events.send(topic::START, &event);
        } else {
            let event = TaskExecStarted {
                container_id: container.clone(),
                exec_id: exec.clone(),
                pid,
                ..Default::default()
            };
            self.events.send(topic::EXEC_STARTED, &event);
        }
    }

    /// Waits for the process's end, then for its output, and tells everybody.
    async fn see_to_the_end(self: Arc<Self>, name: Name, mut pumps: Pumps, early: Option<Exit>) {
        let exit = match early {
            Some(exit) => exit,
            None => {
                let Ok(mut ends) = self.with(&name, |process| Ok(process.early_end())) else {
                    return;
                };
                match ends.wait_for(Option::is_some).await.as_deref() {
                    Ok(Some(exit)) => *exit,
                    // Deleted with its container.
                    _ => return,
                }
            }
        };
        let drained = tokio::time::timeout(scaled(DRAIN_LIMIT), pumps.drained()).await;
        if drained.is_err() {
            log::warn!("output of {name:?} is still being written after its end");
        }
        let has_logger = pumps.has_logger();
        let finished = (drained.is_err() || has_logger).then(|| tokio::spawn(pumps.finish()));
        if name.1.is_empty() {
            self.execs_told(&name.0).await;
        }
        let _ = self.with(&name, |process| {
            process.logger = finished.filter(|_| has_logger);
            if process.set_exit(exit) {
                self.tell_exit(&name, process.pid, exit);
            }
            Ok(())
        });
    }

    /// A container's end takes its execs along, so theirs are told first.
    async fn execs_told(&self, container: &str) {
        let ends: Vec<_> = self
            .table()
            .iter()
            .filter(|(name, process)| {
                name.0 == container && !name.1.is_empty() && process.stage == Stage::Running
            })
            .map(|(_, process)| process.watch())
            .collect();
        let told = async {
            for mut end in ends {
                let _ = end.wait_for(Option::is_some).await;
            }
        };
        // Those that are late are told by `Delete`.
        let limit = scaled(DRAIN_LIMIT).mul_f32(1.5);
        let _ = tokio::time::timeout(limit, told).await;
    }

    pub(super) fn tell_exit(&self, (container, exec): &Name, pid: u32, exit: Exit) {
        let id = if exec.is_empty() { container } else { exec };
        self.events.send(
            topic::EXIT,
            &TaskExit {
                container_id: container.clone(),
                id: id.clone(),
                pid,
                exit_status: exit.status,
                exited_at: timestamp(exit.at),
                ..Default::default()
            },
        );
    }

    /// Deletes a process that does not run.
    ///
    /// # Errors
    /// It runs, or there is none, or it is being deleted already.
    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<(u32, Exit), Error> {
        let name = (id.to_owned(), exec_id.to_owned());
        let logger = self.with(&name, |process| {
            if matches!(
                process.stage,
                Stage::Running | Stage::Starting | Stage::Creating
            ) {
                return Err(Error::FailedPrecondition(format!(
                    "{} is running",
                    if exec_id.is_empty() { id } else { exec_id }
                )));
            }
            if std::mem::replace(&mut process.deleting, true) {
                return Err(missing(&name));
            }
            Ok(process.logger.take())
        })?;
        if let Some(logger) = logger {
            // It makes the program end within a limit of its own.
            let _ = logger.await;
        }
        if let Err(error) = self.delete_in_guest(&name).await {
            let _ = self.with(&name, |process| {
                process.deleting = false;
                Ok(())
            });
            if exec_id.is_empty() {
                self.kept(&name).await;
            }
            return Err(error);
        }
        if exec_id.is_empty() {
            let hooks = self.with(&name, |process| Ok(process.hooks.take()))?;
            let forgotten = self.forget_container(&name).await;
            if let Some(hooks) = hooks {
                hooks.stopped().await;
            }
            forgotten
        } else {
            let process = self.table().remove(&name).ok_or_else(|| missing(&name))?;
            Ok((process.pid, exit_of(&process)))
        }
    }

    async fn delete_in_guest(&self, (id, exec_id): &Name) -> Result<(), Error> {
        match self.pod().await?.delete_process(id, exec_id).await {
            Ok(())
            | Err(
                SandboxError::Gone(_)
                | SandboxError::Agent {
                    kind: AgentErrorKind::NotFound,
                    ..
                },
            ) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// After the guest has deleted it, and killed what was left in it.
    async fn forget_container(&self, name: &Name) -> Result<(u32, Exit), Error> {
        let bundle = self.with(name, |process| Ok(process.bundle.clone()))?;
        release_rootfs(&bundle).await;
        let _ = tokio::fs::remove_file(bundle.join("oom")).await;
        let mut table = self.table();
        let killed = Exit {
            status: KILLED,
            at: SystemTime::now(),
        };
        for (exec, process) in table.iter_mut() {
            let ran = process.stage == Stage::Running;
            if exec.0 == name.0 && exec != name && process.set_exit(killed) && ran {
                self.tell_exit(exec, process.pid, killed);
            }
        }
        let process = table.remove(name).ok_or_else(|| missing(name))?;
        table.retain(|other, _| other.0 != name.0);
        let exit = exit_of(&process);
        self.events.send(
            topic::DELETE,
            &TaskDelete {
                container_id: name.0.clone(),
                id: name.0.clone(),
                pid: process.pid,
                exit_status: exit.status,
                exited_at: timestamp(exit.at),
                ..Default::default()
            },
        );
        Ok((process.pid, exit))
    }
}

/// One that was never started has ended well.
fn exit_of(process: &Process) -> Exit {
    process.exit().unwrap_or(Exit {
        status: 0,
        at: SystemTime::now(),
    })
}

async fn start_in_guest(pod: &dyn Pod, (id, exec_id): &Name) -> Result<u32, Error> {
    let pid = pod.start_process(id, exec_id).await?;
    Ok(if exec_id.is_empty() {
        pod.vmm_pid()
    } else {
        pid
    })
}

/// Exit status of a process whose program could not be run (POSIX shell, "exit status for commands").
fn status_of(error: &Error) -> u32 {
    match error {
        Error::Sandbox(SandboxError::Agent {
            kind: AgentErrorKind::NotFound,
            ..
        }) => 127,
        Error::Sandbox(SandboxError::Agent {
            kind: AgentErrorKind::PermissionDenied,
            ..
        }) => 126,
        Error::Sandbox(SandboxError::Gone(_)) => KILLED,
        _ => 128,
    }
}
