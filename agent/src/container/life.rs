//! Processes start and end; what is left of them is taken away.

use caisson_protocol::agent::ProcessExit;

use super::{
    Manager,
    request::{ExecRequest, Request},
    spawn,
    table::{Container, State, exit, not_found},
};
use crate::{
    failure::{Failure, Kind, Result},
    stdio::Token,
};

impl Manager {
    /// Lets a created process execute its program.
    ///
    /// # Errors
    /// What kept it from running; the process is Stopped then, with 127 or 126 as its status.
    pub async fn start(&self, container_id: &str, exec_id: &str) -> Result<u32> {
        let result = if exec_id.is_empty() {
            self.start_init(container_id).await
        } else {
            self.start_exec(container_id, exec_id).await
        };
        match result {
            Ok(pid) => {
                let mut table = self.table();
                let process = table.process(container_id, exec_id)?;
                let State::Starting { ended, .. } = &mut process.state else {
                    return Ok(pid);
                };
                let ended = ended.take();
                process.state = State::Running { pid };
                drop(table);
                if let Some(exit) = ended {
                    self.stopped(container_id, exec_id, exit);
                }
                Ok(pid)
            }
            Err(failure) => {
                self.failed_to_start(container_id, exec_id, &failure);
                Err(failure)
            }
        }
    }

    async fn start_init(&self, id: &str) -> Result<u32> {
        let (waiting, token) = {
            let mut table = self.table();
            let container = table.container(id)?;
            let token = container.init.token;
            let State::Created(waiting) = &mut container.init.state else {
                return Err(Failure::new(
                    Kind::FailedPrecondition,
                    format!("container {id} was started already"),
                ));
            };
            let waiting = waiting.take().ok_or_else(|| {
                Failure::new(
                    Kind::FailedPrecondition,
                    format!("container {id} is being started"),
                )
            })?;
            container.init.state = State::Starting {
                pid: waiting.pid,
                ended: None,
            };
            (waiting, token)
        };
        let pid = waiting.pid;
        self.streams.connected(&token).await?;
        waiting.go().await?;
        Ok(pid)
    }

    async fn start_exec(&self, container_id: &str, exec_id: &str) -> Result<u32> {
        let (request, pending_streams, token) = {
            let mut table = self.table();
            let container = table.container(container_id)?;
            let init = container.init.pid();
            let cgroup = container.cgroup.path().display().to_string();
            let seccomp = container.seccomp.clone();
            let exec = container
                .execs
                .get_mut(exec_id)
                .ok_or_else(|| not_found("exec", exec_id))?;
            let pending = exec.pending.take().ok_or_else(|| {
                Failure::new(
                    Kind::FailedPrecondition,
                    format!("exec {exec_id} was started already"),
                )
            })?;
            let request = Request::Exec(Box::new(ExecRequest {
                init,
                process: pending.process,
                archive: pending.archive,
                user: pending.user,
                terminal: pending.terminal.then_some(exec.size),
                cgroup,
                seccomp,
            }));
            (request, pending.streams, exec.token)
        };
        self.table().births += 1;
        let waiting = spawn::spawn(&request, pending_streams, |_| {}).await;
        let mut waiting = match waiting {
            Ok(waiting) => waiting,
            Err(failure) => {
                self.table().birth_over();
                return Err(failure);
            }
        };
        let pid = waiting.pid;
        let terminal = self.take_terminal(token, &mut waiting);
        {
            let mut table = self.table();
            let early = table.unclaimed.remove(&pid);
            table.birth_over();
            let exec = table.process(container_id, exec_id)?;
            exec.state = State::Starting { pid, ended: early };
            exec.terminal = terminal?;
        }
        // The host connects to a terminal once the process exists: before that there is none.
        self.streams.connected(&token).await?;
        waiting.go().await?;
        Ok(pid)
    }

    fn failed_to_start(&self, container_id: &str, exec_id: &str, failure: &Failure) {
        let mut table = self.table();
        let Ok(process) = table.process(container_id, exec_id) else {
            return;
        };
        let pid = match process.state {
            State::Starting { pid, .. } => pid,
            State::Created(None) if !exec_id.is_empty() && process.pending.is_none() => 0,
            _ => return, // It was not this call that touched it.
        };
        let status = match failure.kind {
            Kind::NotFound => 127,
            Kind::PermissionDenied => 126,
            _ => 128,
        };
        process.state = State::Stopped(exit(pid, status));
        let token = process.token;
        drop(table);
        self.streams.forget(&token);
    }

    /// A process of the guest ended. Called for every one there is.
    pub fn ended(&self, pid: u32, status: u32) {
        let mut table = self.table();
        let mut found = None;
        for (id, container) in &mut table.containers {
            if container.init.pid() == pid && !matches!(container.init.state, State::Stopped(_)) {
                found = Some((id.clone(), String::new()));
            }
            for (exec_id, exec) in &container.execs {
                if exec.pid() == pid && !matches!(exec.state, State::Stopped(_)) {
                    found = Some((id.clone(), exec_id.clone()));
                }
            }
        }
        let exit = exit(pid, status);
        let Some((container_id, exec_id)) = found else {
            if table.births > 0 {
                table.unclaimed.insert(pid, exit);
            }
            return;
        };
        let Ok(process) = table.process(&container_id, &exec_id) else {
            return;
        };
        if let State::Starting { ended, .. } = &mut process.state {
            *ended = Some(exit);
            return;
        }
        drop(table);
        self.stopped(&container_id, &exec_id, exit);
    }

    /// Notes the end of a process and tells the host, once.
    fn stopped(&self, container_id: &str, exec_id: &str, exit: ProcessExit) {
        let mut table = self.table();
        let Ok(container) = table.container(container_id) else {
            return;
        };
        // Before the exit that it explains, whatever the watch has seen so far.
        let oom = container.new_oom_kills();
        // With a PID namespace of its own the kernel has done so. Of one that is the pod's, others
        // would live on, and hold the container's output open.
        if exec_id.is_empty()
            && let Err(failure) = container.cgroup.kill()
        {
            log::warn!("container {container_id}: its processes are not killed: {failure}");
        }
        let Ok(process) = container.process(exec_id) else {
            return;
        };
        process.state = State::Stopped(exit.clone());
        drop(table);
        if oom {
            self.events.out_of_memory(container_id);
        }
        self.events.exited(container_id, exec_id, exit);
    }

    /// Tells the host when the kernel has killed a process of the container for want of memory.
    pub fn check_memory(&self, id: &str) {
        let oom = self
            .table()
            .container(id)
            .is_ok_and(Container::new_oom_kills);
        if oom {
            self.events.out_of_memory(id);
        }
    }

    /// Removes a container that does not run, with all that is left of it.
    ///
    /// # Errors
    /// It runs, or its cgroup cannot be removed.
    pub async fn delete(&self, id: &str) -> Result<ProcessExit> {
        let (cgroup, exit_status, tokens) = {
            let mut table = self.table();
            let container = table.container(id)?;
            let exit_status = match &mut container.init.state {
                State::Stopped(exit) => exit.clone(),
                // Never started: hanging up ends the waiting process.
                State::Created(waiting) => {
                    let pid = waiting.take().map_or(0, |waiting| waiting.pid);
                    exit(pid, 0)
                }
                State::Starting { .. } | State::Running { .. } => {
                    return Err(Failure::new(
                        Kind::FailedPrecondition,
                        format!("container {id} is running"),
                    ));
                }
            };
            if std::mem::replace(&mut container.deleting, true) {
                return Err(Failure::new(
                    Kind::FailedPrecondition,
                    format!("container {id} is being deleted"),
                ));
            }
            let tokens: Vec<Token> = container
                .execs
                .values()
                .map(|exec| exec.token)
                .chain([container.init.token])
                .collect();
            (container.cgroup.clone(), exit_status, tokens)
        };
        let removed = cgroup.remove().await;
        if removed.is_err() {
            if let Ok(container) = self.table().container(id) {
                container.deleting = false;
            }
            removed?;
        }
        tokens.iter().for_each(|token| self.streams.forget(token));
        self.table().containers.remove(id);
        Ok(exit_status)
    }

    /// Forgets an exec that does not run.
    ///
    /// # Errors
    /// It runs, or there is none.
    pub fn delete_exec(&self, container_id: &str, exec_id: &str) -> Result<ProcessExit> {
        let mut table = self.table();
        let container = table.container(container_id)?;
        let exec = container
            .execs
            .get(exec_id)
            .ok_or_else(|| not_found("exec", exec_id))?;
        let result = match &exec.state {
            State::Stopped(exit) => exit.clone(),
            State::Created(_) if exec.pending.is_some() => exit(0, 0),
            _ => {
                return Err(Failure::new(
                    Kind::FailedPrecondition,
                    format!("exec {exec_id} is running"),
                ));
            }
        };
        let token = exec.token;
        container.execs.remove(exec_id);
        drop(table);
        self.streams.forget(&token);
        Ok(result)
    }
}
