//! Processes start and end; what is left of them is taken away.

use caisson_protocol::agent::ProcessExit;
use tokio::time::Instant;

use super::{
    Manager,
    request::{ExecRequest, Request},
    spawn,
    table::{Container, State, exit, not_found},
};
use crate::{
    failure::{Failure, Kind, Result},
    stdio::{Prepared, Token},
};

impl Manager {
    /// Lets a created process execute its program.
    ///
    /// # Errors
    /// It was started already. Or what kept it from running until `deadline`; the process is
    /// Stopped then, with 127 or 126 as its status.
    pub async fn start(&self, container_id: &str, exec_id: &str, deadline: Instant) -> Result<u32> {
        // A process is claimed once; what then goes wrong stops it, whatever it is.
        let result = if exec_id.is_empty() {
            let (waiting, token) = self.claim_init(container_id)?;
            self.let_go(*waiting, &token, deadline).await
        } else {
            let (request, streams) = self.claim_exec(container_id, exec_id)?;
            self.start_exec(container_id, exec_id, &request, streams, deadline)
                .await
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

    fn claim_init(&self, id: &str) -> Result<(Box<spawn::Waiting>, Token)> {
        let mut table = self.table();
        let container = table.container(id)?;
        let State::Created(waiting) = &mut container.init.state else {
            return Err(started_already("container", id));
        };
        let waiting = waiting
            .take()
            .ok_or_else(|| started_already("container", id))?;
        container.init.state = State::Starting {
            pid: waiting.pid,
            ended: None,
        };
        Ok((waiting, container.init.token))
    }

    fn claim_exec(&self, container_id: &str, exec_id: &str) -> Result<(Request, Prepared)> {
        let mut table = self.table();
        let container = table.container(container_id)?;
        let init = container.running(container_id)?;
        let cgroup = container.cgroup.path().to_owned();
        let seccomp = container.seccomp.clone();
        let oom_score_of_container = container.oom_score;
        let exec = container
            .execs
            .get_mut(exec_id)
            .ok_or_else(|| not_found("exec", exec_id))?;
        let pending = exec
            .pending
            .take()
            .ok_or_else(|| started_already("exec", exec_id))?;
        let oom_score = pending.process.oom_score_adj();
        let request = Request::Exec(Box::new(ExecRequest {
            init,
            process: pending.process,
            archive: pending.archive,
            user: pending.user,
            terminal: pending.terminal.then_some(exec.size),
            cgroup,
            oom_score: oom_score.unwrap_or(oom_score_of_container),
            seccomp,
        }));
        Ok((request, pending.streams))
    }

    async fn start_exec(
        &self,
        container_id: &str,
        exec_id: &str,
        request: &Request,
        streams: Prepared,
        deadline: Instant,
    ) -> Result<u32> {
        let token = streams.token;
        let birth = self.table().birth();
        let mut waiting = spawn::spawn(request, streams, deadline).await?;
        let pid = waiting.pid;
        let terminal = self.take_terminal(token, &mut waiting)?;
        {
            let mut table = self.table();
            let ended = table.early_end(pid);
            let exec = table.process(container_id, exec_id)?;
            exec.state = State::Starting { pid, ended };
            exec.terminal = terminal;
        }
        drop(birth);
        // The host connects to a terminal once the process exists: before that there is none.
        self.let_go(waiting, &token, deadline).await
    }

    async fn let_go(
        &self,
        waiting: spawn::Waiting,
        token: &Token,
        deadline: Instant,
    ) -> Result<u32> {
        let pid = waiting.pid;
        self.streams.connected(token).await?;
        waiting.go(deadline).await?;
        Ok(pid)
    }

    /// Ends the start of a process that the calling [`Manager::start`] has claimed.
    fn failed_to_start(&self, container_id: &str, exec_id: &str, failure: &Failure) {
        let mut table = self.table();
        let Ok(process) = table.process(container_id, exec_id) else {
            return;
        };
        let status = match failure.kind {
            Kind::NotFound => 127,
            Kind::PermissionDenied => 126,
            _ => 128,
        };
        process.state = State::Stopped(exit(process.pid(), status));
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
            table.unknown_ended(exit);
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
            let exit_status = match &container.init.state {
                State::Stopped(exit) => exit.clone(),
                State::Created(_) => exit(container.init.pid(), 0),
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
            // The process of one that was never started is killed by this.
            container.init.state = State::Stopped(exit_status.clone());
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

fn started_already(what: &str, id: &str) -> Failure {
    Failure::new(
        Kind::FailedPrecondition,
        format!("{what} {id} was started already"),
    )
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, process::Child, sync::Arc, time::Duration};

    use caisson_protocol::agent::{SignalRequest, Status, StdioRequest};

    use super::{
        super::table::{Pending, Process},
        *,
    };
    use crate::cgroup::Cgroup;

    /// A manager of container "c", which waits to be started, in a directory that stands for its
    /// cgroup; and what the container's process has.
    fn created() -> (Arc<Manager>, tempfile::TempDir, Child, std::os::fd::OwnedFd) {
        let manager = Manager::new().unwrap();
        let directory = tempfile::tempdir().unwrap();
        let cgroup = directory.path().join("c");
        std::fs::create_dir(&cgroup).unwrap();
        let (child, waiting, theirs) = spawn::tests::sleeper();
        let container = Container {
            cgroup: Arc::new(Cgroup::at(cgroup)),
            init: Process {
                state: State::Created(Some(Box::new(waiting))),
                token: Token::default(),
                close_stdin: Arc::default(),
                terminal: None,
                size: (0, 0),
                pending: None,
            },
            execs: HashMap::new(),
            seccomp: None,
            oom_score: 500,
            oom_kills: 0,
            paused: false,
            deleting: false,
            writable_layer: None,
        };
        manager.table().containers.insert("c".to_owned(), container);
        (Arc::new(manager), directory, child, theirs)
    }

    fn status(manager: &Manager) -> Status {
        let state = manager.state("c", "").unwrap();
        state.status.enum_value_or_default()
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_start_that_takes_too_long_leaves_a_container_that_can_be_deleted() {
        let (manager, _directory, mut child, _theirs) = created();
        let failure = manager.start("c", "", Instant::now()).await.unwrap_err();
        assert_eq!(failure.kind, Kind::DeadlineExceeded, "{failure}");
        child.wait().unwrap();
        assert_eq!(status(&manager), Status::STATUS_STOPPED);
        let kill = SignalRequest {
            container_id: "c".to_owned(),
            signal: 9,
            ..Default::default()
        };
        assert_eq!(manager.signal(&kill).unwrap_err().kind, Kind::NotFound);
        assert_eq!(manager.delete("c").await.unwrap().exit_status, 128);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_second_start_is_refused_and_does_the_first_no_harm() {
        let (manager, _directory, mut child, theirs) = created();
        let deadline = Instant::now() + Duration::from_secs(3600);
        let first = tokio::spawn({
            let manager = manager.clone();
            async move { manager.start("c", "", deadline).await }
        });
        tokio::task::yield_now().await;
        let failure = manager.start("c", "", deadline).await.unwrap_err();
        assert_eq!(failure.kind, Kind::FailedPrecondition, "{failure}");
        assert_eq!(status(&manager), Status::STATUS_RUNNING);
        drop(theirs);
        assert_eq!(first.await.unwrap().unwrap(), child.id());
        assert!(manager.table().container("c").unwrap().running("c").is_ok());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn an_exec_has_the_containers_oom_score_unless_it_names_one() {
        let (manager, _directory, mut child, _theirs) = created();
        let pid = child.id();
        manager.table().container("c").unwrap().init.state = State::Running { pid };
        child.wait().unwrap();
        for (named, expected) in [(None, 500), (Some(-3), -3)] {
            let mut process = oci_spec::runtime::Process::default();
            process.set_oom_score_adj(named);
            let streams = manager.streams.prepare(&StdioRequest::default()).unwrap();
            let exec = Process {
                state: State::Created(None),
                token: streams.token,
                close_stdin: streams.close_stdin.clone(),
                terminal: None,
                size: (0, 0),
                pending: Some(Pending {
                    process,
                    archive: None,
                    user: None,
                    streams,
                    terminal: false,
                }),
            };
            let mut table = manager.table();
            let container = table.container("c").unwrap();
            container.execs.insert("e".to_owned(), exec);
            drop(table);
            let (request, _) = manager.claim_exec("c", "e").unwrap();
            let Request::Exec(request) = request else {
                panic!("not an exec");
            };
            assert_eq!(request.oom_score, expected);
        }
    }
}
