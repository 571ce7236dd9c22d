//! Containers of the pod and their processes.
//!
//! One table under one lock that is never held across an await. A process goes
//! Created → Running → Stopped; whatever takes it a step further first takes
//! what that step needs out of the table, so that two callers cannot both do it.

mod copy_up;
mod devices;
mod exec;
mod hooks;
pub mod init;
pub mod mounts;
mod paths;
mod request;
mod rootfs;
mod spawn;
mod terminal;

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use caisson_protocol::agent::{
    self, ProcessExit, ProcessInfo, StateResponse, Status, StdioRequest,
};
use oci_spec::runtime::{LinuxResources, LinuxSeccomp, Process as ProcessSpec, Spec};
use rustix::{
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
    termios::{Winsize, tcsetwinsize},
};
use tokio::sync::Notify;

pub use request::{Layer, Rootfs, Upper};
pub use rootfs::is_sysctl_name;

use crate::{
    cgroup::Cgroup,
    events::{Events, now_ns},
    failure::{During, Failure, Kind, Result},
    oom,
    stdio::{Streams, Token},
};
use request::{ContainerRequest, ExecRequest, Request};

/// Annotation with "USER[:GROUP]" for a client that cannot see the image's passwd file.
const USER_ANNOTATION: &str = "caisson.user";

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

#[derive(Default)]
struct Table {
    containers: HashMap<String, Container>,
    /// Ends of processes that nobody has claimed yet: their PID is not known before they are
    /// born, and a process may die sooner. Only kept while something is being born.
    unclaimed: HashMap<u32, ProcessExit>,
    births: usize,
    /// The pod's containers share the PID namespace of the first one.
    shared_pid_namespace: bool,
    /// The container that was made first, which may have gone.
    first: Option<String>,
}

impl Table {
    /// The init process of the pod's first container.
    ///
    /// # Errors
    /// It does not run.
    fn first_init(&self) -> Result<u32> {
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
}

struct Container {
    cgroup: Arc<Cgroup>,
    init: Process,
    execs: HashMap<String, Process>,
    seccomp: Option<LinuxSeccomp>,
    oom_kills: u64,
    paused: bool,
    deleting: bool,
}

struct Process {
    state: State,
    token: Token,
    close_stdin: Arc<Notify>,
    terminal: Option<OwnedFd>,
    size: (u16, u16),
    /// An exec is only made when it starts.
    pending: Option<Pending>,
}

struct Pending {
    process: ProcessSpec,
    user: Option<String>,
    streams: crate::stdio::Prepared,
    terminal: bool,
}

enum State {
    /// Waits to be started.
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
    fn pid(&self) -> u32 {
        match &self.state {
            State::Created(waiting) => waiting.as_ref().map_or(0, |waiting| waiting.pid),
            State::Starting { pid, .. } | State::Running { pid } => *pid,
            State::Stopped(exit) => exit.pid,
        }
    }
}

fn not_found(what: &str, id: &str) -> Failure {
    Failure::new(Kind::NotFound, format!("no such {what}: {id}"))
}

/// IDs become names of directories.
fn check_id(what: &str, id: &str) -> Result<()> {
    let valid = !id.is_empty()
        && id.len() <= 128
        && id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_.-+".contains(&byte))
        && !id.starts_with('.');
    if valid {
        Ok(())
    } else {
        Err(Failure::invalid(format!("\"{id}\" is no {what} id")))
    }
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

    /// Whether containers to come share one PID namespace.
    pub fn share_pid_namespace(&self, shared: bool) {
        self.table().shared_pid_namespace = shared;
    }

    /// Makes a container whose first process waits to execute its program.
    ///
    /// # Errors
    /// It exists, its specification is not supported, or a step failed; nothing is left then.
    pub async fn create(&self, request: agent::CreateContainerRequest) -> Result<Created> {
        let id = request.container_id;
        check_id("container", &id)?;
        let spec: Spec = serde_json::from_slice(&request.spec_json).map_err(|error| {
            Failure::invalid(format!("malformed container specification: {error}"))
        })?;
        let rootfs = rootfs_of(request.rootfs.into_option())?;
        if self.table().containers.contains_key(&id) {
            return Err(Failure::new(
                Kind::AlreadyExists,
                format!("container {id} exists already"),
            ));
        }
        let pid_namespace_of = {
            let table = self.table();
            if request.join_pod_pid_namespace {
                Some(table.first_init()?)
            } else if table.shared_pid_namespace {
                table
                    .containers
                    .values()
                    .map(|c| c.init.pid())
                    .find(|pid| *pid != 0)
            } else {
                None
            }
        };
        let linux = spec.linux().as_ref();
        let limits = linux.and_then(|linux| linux.resources().clone());
        let cgroup = Arc::new(Cgroup::create(&id, limits.as_ref())?);
        if let Err(failure) = self
            .oom_watch
            .add(&cgroup.path().join("memory.events"), &id)
        {
            log::warn!("container {id}: {failure}");
        }
        let stdio = request.stdio.unwrap_or_default();
        let seccomp = linux.and_then(|linux| linux.seccomp().clone());
        let user = spec
            .annotations()
            .as_ref()
            .and_then(|annotations| annotations.get(USER_ANNOTATION).cloned());
        let request = Request::Container(Box::new(ContainerRequest {
            id: id.clone(),
            spec,
            rootfs,
            pod_files: request.bind_pod_files,
            pid_namespace_of,
            user,
            terminal: stdio.terminal.then(|| size_of_terminal(&stdio)),
            cgroup: cgroup.path().display().to_string(),
        }));
        let born = self.give_birth(&request, &stdio).await;
        let restricted = born.and_then(|born| match cgroup.restrict_devices(limits.as_ref()) {
            Ok(()) => Ok(born),
            Err(failure) => {
                self.streams.forget(&born.0.token);
                self.table().birth_over();
                Err(failure)
            }
        });
        let (process, created) = match restricted {
            Ok(born) => born,
            Err(failure) => {
                let _ = cgroup.remove().await;
                return Err(failure);
            }
        };
        let container = Container {
            cgroup,
            init: process,
            execs: HashMap::new(),
            seccomp,
            oom_kills: 0,
            paused: false,
            deleting: false,
        };
        let mut table = self.table();
        table.containers.insert(id.clone(), container);
        table.first.get_or_insert_with(|| id.clone());
        let early = table.unclaimed.remove(&created.pid);
        table.birth_over();
        drop(table);
        if let Some(exit) = early {
            self.ended(exit.pid, exit.exit_status);
        }
        Ok(created)
    }

    /// Starts an init process for `request`; the caller ends the birth with `birth_over`.
    async fn give_birth(
        &self,
        request: &Request,
        stdio: &StdioRequest,
    ) -> Result<(Process, Created)> {
        let prepared = self.streams.prepare(stdio)?;
        let token = prepared.token;
        let close_stdin = prepared.close_stdin.clone();
        self.table().births += 1;
        let mut waiting = match spawn::spawn(request, prepared, |_| {}).await {
            Ok(waiting) => waiting,
            Err(failure) => {
                self.streams.forget(&token);
                self.table().birth_over();
                return Err(failure);
            }
        };
        let terminal = match self.take_terminal(token, &mut waiting) {
            Ok(terminal) => terminal,
            Err(failure) => {
                self.streams.forget(&token);
                self.table().birth_over();
                return Err(failure);
            }
        };
        let created = Created {
            pid: waiting.pid,
            token,
        };
        let process = Process {
            state: State::Created(Some(Box::new(waiting))),
            token,
            close_stdin,
            terminal,
            size: (0, 0),
            pending: None,
        };
        Ok((process, created))
    }

    /// Offers the host one descriptor of a terminal and keeps another for its size.
    fn take_terminal(&self, token: Token, waiting: &mut spawn::Waiting) -> Result<Option<OwnedFd>> {
        let Some(master) = waiting.terminal.take() else {
            return Ok(None);
        };
        let kept = master
            .try_clone()
            .during(|| "keep the terminal".to_owned())?;
        self.streams.offer_terminal(token, master);
        Ok(Some(kept))
    }

    /// Registers a process to be started in a running container.
    ///
    /// # Errors
    /// No such container, it is not running, or the exec exists.
    pub fn create_exec(&self, request: agent::CreateExecRequest) -> Result<Created> {
        check_id("exec", &request.exec_id)?;
        let process: ProcessSpec =
            serde_json::from_slice(&request.process_json).map_err(|error| {
                Failure::invalid(format!("malformed process specification: {error}"))
            })?;
        let stdio = request.stdio.unwrap_or_default();
        let mut table = self.table();
        let container = table.container(&request.container_id)?;
        if container.execs.contains_key(&request.exec_id) {
            return Err(Failure::new(
                Kind::AlreadyExists,
                format!("exec {} exists already", request.exec_id),
            ));
        }
        if !matches!(container.init.state, State::Running { .. }) {
            return Err(Failure::new(
                Kind::FailedPrecondition,
                format!("container {} is not running", request.container_id),
            ));
        }
        let streams = self.streams.prepare(&stdio)?;
        let token = streams.token;
        let user = Some(process.user().username().clone().unwrap_or_default())
            .filter(|name| !name.is_empty());
        let exec = Process {
            state: State::Created(None),
            token,
            close_stdin: streams.close_stdin.clone(),
            terminal: None,
            size: size_of_terminal(&stdio),
            pending: Some(Pending {
                process,
                user,
                streams,
                terminal: stdio.terminal,
            }),
        };
        container.execs.insert(request.exec_id, exec);
        Ok(Created { pid: 0, token })
    }

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

    /// Sends a signal to a process, or to all of a container.
    ///
    /// # Errors
    /// No such signal or process, or it has ended (`NotFound`, as containerd expects).
    pub fn signal(&self, request: &agent::SignalRequest) -> Result<()> {
        let number = i32::try_from(request.signal).unwrap_or(0);
        if !(1..=64).contains(&number) {
            return Err(Failure::invalid(format!("{} is no signal", request.signal)));
        }
        let mut table = self.table();
        let container = table.container(&request.container_id)?;
        if request.all {
            if number == libc::SIGKILL {
                return container.cgroup.kill();
            }
            for pid in container.cgroup.processes() {
                // One that has just ended needs no signal.
                let _ = send_signal(pid, number);
            }
            return Ok(());
        }
        let process = container.process(&request.exec_id)?;
        let pid = process.pid();
        if pid == 0 || matches!(process.state, State::Stopped(_)) {
            return Err(Failure::new(Kind::NotFound, "process already finished"));
        }
        send_signal(pid, number)
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// It has none.
    pub fn resize(&self, request: &agent::ResizePtyRequest) -> Result<()> {
        let mut table = self.table();
        let process = table.process(&request.container_id, &request.exec_id)?;
        let clip = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
        let size = (clip(request.rows), clip(request.columns));
        process.size = size;
        match &process.terminal {
            Some(terminal) => {
                let size = Winsize {
                    ws_row: size.0,
                    ws_col: size.1,
                    ws_xpixel: 0,
                    ws_ypixel: 0,
                };
                tcsetwinsize(terminal, size).during(|| "resize the terminal".to_owned())
            }
            None if process
                .pending
                .as_ref()
                .is_some_and(|pending| pending.terminal) =>
            {
                Ok(())
            }
            None => Err(Failure::new(
                Kind::FailedPrecondition,
                "the process has no terminal",
            )),
        }
    }

    /// Ends a process's stdin once what was sent is read.
    ///
    /// # Errors
    /// No such process.
    pub fn close_stdin(&self, container_id: &str, exec_id: &str) -> Result<()> {
        self.table()
            .process(container_id, exec_id)?
            .close_stdin
            .notify_one();
        Ok(())
    }

    /// Processes of a container.
    ///
    /// # Errors
    /// No such container.
    pub fn processes(&self, id: &str) -> Result<Vec<ProcessInfo>> {
        let mut table = self.table();
        let container = table.container(id)?;
        let named: HashMap<u32, &String> = container
            .execs
            .iter()
            .map(|(id, exec)| (exec.pid(), id))
            .collect();
        Ok(container
            .cgroup
            .processes()
            .into_iter()
            .map(|pid| {
                let (inner, command) = describe(pid);
                ProcessInfo {
                    pid: inner,
                    guest_pid: pid,
                    exec_id: named.get(&pid).map(|id| (*id).clone()).unwrap_or_default(),
                    command,
                    ..Default::default()
                }
            })
            .collect())
    }

    /// State of a process.
    ///
    /// # Errors
    /// No such process.
    pub fn state(&self, container_id: &str, exec_id: &str) -> Result<StateResponse> {
        let mut table = self.table();
        let paused = table.container(container_id)?.paused;
        let process = table.process(container_id, exec_id)?;
        let (status, exit) = match &process.state {
            State::Created(_) => (Status::STATUS_CREATED, None),
            State::Starting { .. } | State::Running { .. } if paused => {
                (Status::STATUS_PAUSED, None)
            }
            State::Starting { .. } | State::Running { .. } => (Status::STATUS_RUNNING, None),
            State::Stopped(exit) => (Status::STATUS_STOPPED, Some(exit.clone())),
        };
        Ok(StateResponse {
            status: status.into(),
            exit: exit.into(),
            pid: process.pid(),
            ..Default::default()
        })
    }

    /// Stops or continues all of a container's processes.
    ///
    /// # Errors
    /// It does not run, or will not stop.
    pub async fn pause(&self, id: &str, paused: bool) -> Result<()> {
        let cgroup = {
            let mut table = self.table();
            let container = table.container(id)?;
            if !matches!(container.init.state, State::Running { .. }) {
                return Err(Failure::new(
                    Kind::FailedPrecondition,
                    format!("container {id} is not running"),
                ));
            }
            container.cgroup.clone()
        };
        cgroup.freeze(paused).await?;
        self.table().container(id)?.paused = paused;
        Ok(())
    }

    /// Changes limits of a container.
    ///
    /// # Errors
    /// A limit that cannot be set.
    pub fn update(&self, id: &str, resources_json: &[u8]) -> Result<()> {
        let resources: LinuxResources = serde_json::from_slice(resources_json)
            .map_err(|error| Failure::invalid(format!("malformed resources: {error}")))?;
        self.table().container(id)?.cgroup.update(&resources)
    }

    /// Figures of a container.
    ///
    /// # Errors
    /// No such container.
    pub fn stats(&self, id: &str) -> Result<agent::StatsResponse> {
        Ok(crate::resources::stats(
            self.table().container(id)?.cgroup.path(),
        ))
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

impl Table {
    fn container(&mut self, id: &str) -> Result<&mut Container> {
        self.containers
            .get_mut(id)
            .ok_or_else(|| not_found("container", id))
    }

    fn process(&mut self, container_id: &str, exec_id: &str) -> Result<&mut Process> {
        self.container(container_id)?.process(exec_id)
    }

    fn birth_over(&mut self) {
        self.births = self.births.saturating_sub(1);
        if self.births == 0 {
            self.unclaimed.clear();
        }
    }
}

impl Container {
    /// Whether there were any since the last call.
    fn new_oom_kills(&mut self) -> bool {
        let kills = self.cgroup.oom_kills();
        std::mem::replace(&mut self.oom_kills, kills) < kills
    }

    fn process(&mut self, exec_id: &str) -> Result<&mut Process> {
        if exec_id.is_empty() {
            return Ok(&mut self.init);
        }
        self.execs
            .get_mut(exec_id)
            .ok_or_else(|| not_found("exec", exec_id))
    }
}

fn exit(pid: u32, status: u32) -> ProcessExit {
    ProcessExit {
        pid,
        exit_status: status,
        exited_at_ns: now_ns(),
        ..Default::default()
    }
}

fn send_signal(pid: u32, number: i32) -> Result<()> {
    let gone = || Failure::new(Kind::NotFound, "process already finished");
    let pid = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(gone)?;
    let signal = Signal::from_named_raw(number);
    match signal {
        Some(signal) => pidfd_open(pid, PidfdFlags::empty())
            .and_then(|pidfd| pidfd_send_signal(pidfd, signal))
            .map_err(|_| gone()),
        None => {
            // SAFETY: kill(2) takes any two integers; this one names a process that is ours to reap.
            match unsafe { libc::kill(pid.as_raw_pid(), number) } {
                0 => Ok(()),
                _ => Err(gone()),
            }
        }
    }
}

fn size_of_terminal(stdio: &StdioRequest) -> (u16, u16) {
    let clip = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
    (clip(stdio.rows), clip(stdio.columns))
}

/// PID in the innermost namespace, and the command.
fn describe(pid: u32) -> (u32, String) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let inner = status
        .lines()
        .find_map(|line| line.strip_prefix("NSpid:"))
        .and_then(|list| list.split_whitespace().last()?.parse().ok())
        .unwrap_or(pid);
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words: Vec<_> = command
        .split(|byte| *byte == 0)
        .filter(|word| !word.is_empty())
        .collect();
    (
        inner,
        String::from_utf8_lossy(&words.join(&b' ')).into_owned(),
    )
}

fn rootfs_of(rootfs: Option<agent::Rootfs>) -> Result<Rootfs> {
    use agent::{layer::Source, rootfs::Upper as Wire};
    let rootfs = rootfs.ok_or_else(|| Failure::invalid("a container needs a root file system"))?;
    let layers = rootfs
        .layers
        .into_iter()
        .map(|layer| match layer.source {
            Some(Source::ErofsDevice(device)) => Ok(Layer::Erofs(device)),
            Some(Source::Share(entry)) => Ok(Layer::Share(without_prefix(&entry))),
            _ => Err(Failure::invalid("a layer without a source")),
        })
        .collect::<Result<_>>()?;
    let upper = match rootfs.upper {
        Some(Wire::TmpfsBytes(bytes)) => Upper::Tmpfs(bytes),
        Some(Wire::Ext4Device(device)) => Upper::Ext4(device),
        Some(Wire::ReadOnly(_)) => Upper::ReadOnly,
        Some(Wire::Share(entry)) => Upper::Share(without_prefix(&entry)),
        Some(Wire::Ext4Root(device)) => Upper::Disk {
            device,
            read_only: false,
        },
        Some(Wire::Ext4RootReadOnly(device)) => Upper::Disk {
            device,
            read_only: true,
        },
        _ => {
            return Err(Failure::invalid(
                "a root file system without a kind of upper layer",
            ));
        }
    };
    Ok(Rootfs { layers, upper })
}

fn without_prefix(entry: &str) -> String {
    entry
        .strip_prefix(caisson_protocol::SHARE_PREFIX)
        .unwrap_or(entry)
        .to_owned()
}
