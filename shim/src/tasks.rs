//! The pod's tasks: what the Task API does, in terms of a sandbox.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use caisson_sandbox::{
    Config, ContainerSpec, Event, Gone, ProcessInfo, RootfsSource, Sandbox, SandboxSpec,
    StatsResponse, Upper, scaled,
};
use containerd_shim_protos::{
    api::Mount,
    events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM,
        TaskPaused, TaskResumed, TaskStart,
    },
    protobuf::{MessageField, well_known_types::timestamp::Timestamp},
};
use oci_spec::runtime::Spec;
use tokio::sync::{Notify, mpsc};

use crate::{
    error::Error,
    events::{Events, topic},
    process::{Exit, Process, Stage},
    size::Size,
    stdio::{Host, Paths, Pumps},
};

/// After a process has ended, its last output may take this long to be written before its end is
/// told all the same (somebody else holds the stream, or nobody reads).
const DRAIN_LIMIT: Duration = Duration::from_secs(5);

/// 128 + SIGKILL: the machine went, and the process with it.
const KILLED: u32 = 137;

/// Name of a process: container and exec; the latter is empty for a container's first.
type Name = (String, String);

/// All tasks of the pod.
pub struct Tasks {
    config: Config,
    sandbox_id: String,
    events: Events,
    sandbox: tokio::sync::Mutex<Option<Arc<Sandbox>>>,
    table: Mutex<HashMap<Name, Process>>,
    /// Told when the server shall end.
    pub ended: Notify,
}

/// What a `Create` asks for.
pub struct Creation {
    /// The container.
    pub id: String,
    /// Directory of its config.json.
    pub bundle: PathBuf,
    /// Its root file system.
    pub rootfs: Vec<Mount>,
    /// Its streams.
    pub paths: Paths,
}

/// A snapshot of a process.
pub struct Snapshot {
    /// Where it is in its life.
    pub stage: Stage,
    /// Its container is frozen.
    pub paused: bool,
    /// For containerd.
    pub pid: u32,
    /// Directory of the container.
    pub bundle: PathBuf,
    /// Its streams.
    pub paths: Paths,
    /// Once it has ended.
    pub exit: Option<Exit>,
}

fn missing(name: &Name) -> Error {
    let (container, exec) = name;
    Error::NotFound(if exec.is_empty() {
        format!("no such task: {container}")
    } else {
        format!("no such process: {exec} of {container}")
    })
}

fn timestamp(at: SystemTime) -> MessageField<Timestamp> {
    MessageField::some(at.into())
}

impl Tasks {
    /// None yet.
    pub fn new(config: Config, sandbox_id: String, events: Events) -> Arc<Self> {
        Arc::new(Self {
            config,
            sandbox_id,
            events,
            sandbox: tokio::sync::Mutex::default(),
            table: Mutex::default(),
            ended: Notify::new(),
        })
    }

    fn table(&self) -> MutexGuard<'_, HashMap<Name, Process>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(
        &self,
        name: &Name,
        work: impl FnOnce(&mut Process) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut table = self.table();
        work(table.get_mut(name).ok_or_else(|| missing(name))?)
    }

    async fn sandbox(&self) -> Result<Arc<Sandbox>, Error> {
        let sandbox = self.sandbox.lock().await;
        sandbox
            .clone()
            .ok_or_else(|| Error::FailedPrecondition("the pod has no microVM yet".to_owned()))
    }

    /// The sandbox, booted for the first container.
    async fn sandbox_for(self: &Arc<Self>, spec: &Spec) -> Result<Arc<Sandbox>, Error> {
        let mut place = self.sandbox.lock().await;
        if let Some(sandbox) = place.as_ref() {
            return match sandbox.gone() {
                None => Ok(sandbox.clone()),
                Some(gone) => Err(caisson_sandbox::Error::Gone(gone).into()),
            };
        }
        let size = Size::of(&self.config, spec);
        let request = SandboxSpec {
            id: self.sandbox_id.clone(),
            hostname: spec.hostname().clone().unwrap_or_default(),
            vcpus: size.vcpus,
            memory_mib: size.memory_mib,
            ..Default::default()
        };
        let (sandbox, events) = Sandbox::start(&self.config, request).await?;
        let sandbox = Arc::new(sandbox);
        *place = Some(sandbox.clone());
        tokio::spawn(self.clone().follow(events));
        Ok(sandbox)
    }

    /// Creates a task.
    ///
    /// # Errors
    /// It exists, or something of it cannot be made; nothing is left then.
    pub async fn create(self: &Arc<Self>, request: Creation) -> Result<u32, Error> {
        let name = (request.id.clone(), String::new());
        {
            let mut table = self.table();
            if table.contains_key(&name) {
                return Err(Error::AlreadyExists(format!(
                    "task {} exists already",
                    request.id
                )));
            }
            table.insert(
                name.clone(),
                Process::new(request.paths.clone(), request.bundle.clone()),
            );
        }
        match self.create_in_guest(&request).await {
            Ok((host, created, pid)) => {
                self.with(&name, |process| {
                    process.stage = Stage::Created;
                    process.pid = pid;
                    process.unstarted = Some((host, created.streams));
                    Ok(())
                })?;
                self.events.send(
                    topic::CREATE,
                    &TaskCreate {
                        container_id: request.id,
                        bundle: request.bundle.display().to_string(),
                        rootfs: request.rootfs,
                        io: MessageField::some(TaskIO {
                            stdin: request.paths.stdin,
                            stdout: request.paths.stdout,
                            stderr: request.paths.stderr,
                            terminal: request.paths.terminal,
                            ..Default::default()
                        }),
                        pid,
                        ..Default::default()
                    },
                );
                Ok(pid)
            }
            Err(error) => {
                if let Error::Sandbox(caisson_sandbox::Error::Gone(gone)) = &error {
                    write_vm_exit(&request.bundle, gone);
                }
                self.table().remove(&name);
                Err(error)
            }
        }
    }

    async fn create_in_guest(
        self: &Arc<Self>,
        request: &Creation,
    ) -> Result<(Host, caisson_sandbox::Created, u32), Error> {
        let path = request.bundle.join("config.json");
        let spec_json = tokio::fs::read(&path)
            .await
            .map_err(Error::file("read", &path))?;
        let spec: Spec = serde_json::from_slice(&spec_json).map_err(|error| {
            Error::Invalid(format!(
                "{} is no OCI specification: {error}",
                path.display()
            ))
        })?;
        let rootfs = self.rootfs(request, &spec)?;
        let host = Host::open(&request.paths).await?;
        let console = spec
            .process()
            .as_ref()
            .and_then(|process| process.console_size());
        let size = console.map_or((0, 0), |size| (clip(size.height()), clip(size.width())));
        let sandbox = self.sandbox_for(&spec).await?;
        let created = sandbox
            .create_container(ContainerSpec {
                id: request.id.clone(),
                spec_json,
                rootfs,
                stdio: request.paths.wanted(size),
                pod_files: true,
            })
            .await?;
        // A process of the guest means nothing to the host; its machine's does.
        Ok((host, created, sandbox.vmm_pid()))
    }

    /// EROFS layers travel as disks, everything else as a shared directory.
    fn rootfs(&self, request: &Creation, spec: &Spec) -> Result<RootfsSource, Error> {
        let kinds: Vec<&str> = request
            .rootfs
            .iter()
            .map(|mount| mount.type_.as_str())
            .collect();
        if kinds.is_empty() {
            return Ok(RootfsSource::Directory(root_of(&request.bundle, spec)));
        }
        if kinds.iter().all(|kind| *kind == "erofs") {
            return Ok(RootfsSource::Layers {
                erofs: request
                    .rootfs
                    .iter()
                    .map(|mount| mount.source.clone().into())
                    .collect(),
                upper: Upper::Disk(self.config.upper_disk_mib),
            });
        }
        Err(Error::Unsupported(format!(
            "root file systems of mounts of type {} are not supported yet",
            kinds.join(", ")
        )))
    }

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
        let name = (id.to_owned(), exec_id.to_owned());
        let first = (id.to_owned(), String::new());
        let bundle = self.with(&first, |process| match process.stage {
            Stage::Running => Ok(process.bundle.clone()),
            _ => Err(Error::FailedPrecondition(format!(
                "container {id} is not running"
            ))),
        })?;
        if self.table().contains_key(&name) {
            return Err(Error::AlreadyExists(format!(
                "process {exec_id} exists already"
            )));
        }
        let specification: oci_spec::runtime::Process = serde_json::from_slice(&process_json)
            .map_err(|error| Error::Invalid(format!("malformed process specification: {error}")))?;
        let size = specification
            .console_size()
            .map_or((0, 0), |size| (clip(size.height()), clip(size.width())));
        let host = Host::open(&paths).await?;
        self.table()
            .insert(name.clone(), Process::new(paths.clone(), bundle));
        let created = match self.sandbox().await {
            Ok(sandbox) => sandbox
                .create_exec(id, exec_id, process_json, &paths.wanted(size))
                .await
                .map_err(Error::from),
            Err(error) => Err(error),
        };
        let created = created.inspect_err(|_| {
            self.table().remove(&name);
        })?;
        self.with(&name, |process| {
            process.stage = Stage::Created;
            process.unstarted = Some((host, created.streams));
            Ok(())
        })?;
        self.events.send(
            topic::EXEC_ADDED,
            &TaskExecAdded {
                container_id: name.0,
                exec_id: name.1,
                ..Default::default()
            },
        );
        Ok(())
    }

    /// Starts a process.
    ///
    /// # Errors
    /// Its program cannot be run, in the guest's own words.
    pub async fn start(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<u32, Error> {
        let name = (id.to_owned(), exec_id.to_owned());
        let (host, streams) = self.with(&name, |process| {
            match (process.stage, process.unstarted.take()) {
                (Stage::Created, Some(streams)) => {
                    process.stage = Stage::Starting;
                    Ok(streams)
                }
                _ => Err(Error::FailedPrecondition(
                    "the process was started already".to_owned(),
                )),
            }
        })?;
        let pumps = Pumps::start(host, streams);
        let closer = pumps.stdin_closer();
        self.with(&name, |process| {
            // A CloseIO that came before the start is kept in the old one.
            forward(&process.close_stdin, &closer);
            Ok(())
        })?;
        let started = match self.sandbox().await {
            Ok(sandbox) => sandbox
                .start_process(id, exec_id)
                .await
                .map(|pid| {
                    if exec_id.is_empty() {
                        sandbox.vmm_pid()
                    } else {
                        pid
                    }
                })
                .map_err(Error::from),
            Err(error) => Err(error),
        };
        let pid = match started {
            Ok(pid) => pid,
            Err(error) => {
                // It has ended without having run; that is for Delete to tell, not for an event.
                self.with(&name, |process| {
                    process.set_exit(Exit {
                        status: status_of(&error),
                        at: SystemTime::now(),
                    });
                    Ok(())
                })?;
                return Err(error);
            }
        };
        if exec_id.is_empty() {
            self.events.send(
                topic::START,
                &TaskStart {
                    container_id: name.0.clone(),
                    pid,
                    ..Default::default()
                },
            );
        } else {
            self.events.send(
                topic::EXEC_STARTED,
                &TaskExecStarted {
                    container_id: name.0.clone(),
                    exec_id: name.1.clone(),
                    pid,
                    ..Default::default()
                },
            );
        }
        let early = self.with(&name, |process| {
            process.pid = pid;
            process.stage = Stage::Running;
            Ok(process.early_exit.take())
        })?;
        let watched = self.clone();
        tokio::spawn(async move { watched.see_to_the_end(name, pumps, early).await });
        Ok(pid)
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
                    _ => return,
                }
            }
        };
        if tokio::time::timeout(scaled(DRAIN_LIMIT), pumps.drained())
            .await
            .is_err()
        {
            log::warn!("output of {name:?} is still being written after its end");
            tokio::spawn(async move { pumps.drained().await });
        }
        let told = self.with(&name, |process| Ok((process.set_exit(exit), process.pid)));
        if let Ok((true, pid)) = told {
            self.tell_exit(&name, pid, exit);
        }
    }

    fn tell_exit(&self, (container, exec): &Name, pid: u32, exit: Exit) {
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

    /// Hears of what happens in the guest.
    async fn follow(self: Arc<Self>, mut events: mpsc::Receiver<Event>) {
        while let Some(event) = events.recv().await {
            match event {
                Event::Exited {
                    container,
                    exec,
                    exit,
                } => {
                    let exit = Exit {
                        status: exit.status,
                        at: exit.at,
                    };
                    self.ended_in_guest(&(container, exec), exit);
                }
                Event::OutOfMemory { container } => {
                    self.events.send(
                        topic::OOM,
                        &TaskOOM {
                            container_id: container.clone(),
                            ..Default::default()
                        },
                    );
                    if let Ok(bundle) = self.with(&(container, String::new()), |process| {
                        Ok(process.bundle.clone())
                    }) {
                        // For `caisson inspect`, which has no event bus.
                        let _ = std::fs::write(bundle.join("oom"), "");
                    }
                }
                Event::Gone(gone) => self.machine_gone(&gone),
            }
        }
    }

    fn ended_in_guest(&self, name: &Name, exit: Exit) {
        // The guest may name what it likes; only what is here counts.
        let _ = self.with(name, |process| {
            match process.stage {
                Stage::Starting => process.early_exit = Some(exit),
                Stage::Running => process.end(exit),
                Stage::Creating | Stage::Created => {
                    process.set_exit(exit);
                }
                Stage::Stopped => {}
            }
            Ok(())
        });
    }

    fn machine_gone(&self, gone: &Gone) {
        log::error!("{gone}");
        let exit = Exit {
            status: KILLED,
            at: SystemTime::now(),
        };
        let mut told = Vec::new();
        for (name, process) in self.table().iter_mut() {
            if name.1.is_empty() && process.exit().is_none() {
                write_vm_exit(&process.bundle, gone);
            }
            match process.stage {
                Stage::Starting => process.early_exit = Some(exit),
                Stage::Running => process.end(exit),
                Stage::Creating | Stage::Stopped => {}
                Stage::Created => {
                    if process.set_exit(exit) {
                        told.push((name.clone(), process.pid));
                    }
                }
            }
        }
        for (name, pid) in told {
            self.tell_exit(&name, pid, exit);
        }
    }

    /// A process's state.
    ///
    /// # Errors
    /// No such process.
    pub fn snapshot(&self, id: &str, exec_id: &str) -> Result<Snapshot, Error> {
        let name = (id.to_owned(), exec_id.to_owned());
        self.with(&name, |process| {
            Ok(Snapshot {
                stage: process.stage,
                paused: process.paused,
                pid: process.pid,
                bundle: process.bundle.clone(),
                paths: process.paths.clone(),
                exit: process.exit(),
            })
        })
    }

    /// Waits for a process's end.
    ///
    /// # Errors
    /// No such process, or it was deleted meanwhile.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<Exit, Error> {
        let name = (id.to_owned(), exec_id.to_owned());
        let mut exit = self.with(&name, |process| Ok(process.watch()))?;
        let seen = exit.wait_for(Option::is_some).await;
        match seen.as_deref() {
            Ok(Some(exit)) => Ok(*exit),
            _ => Err(missing(&name)),
        }
    }

    /// Deletes a process that does not run.
    ///
    /// # Errors
    /// It runs, or there is none.
    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<(u32, Exit), Error> {
        let name = (id.to_owned(), exec_id.to_owned());
        let (stage, pid, exit, bundle) = self.with(&name, |process| {
            Ok((
                process.stage,
                process.pid,
                process.exit(),
                process.bundle.clone(),
            ))
        })?;
        if matches!(stage, Stage::Running | Stage::Starting | Stage::Creating) {
            return Err(Error::FailedPrecondition(format!(
                "{} is running",
                if exec_id.is_empty() { id } else { exec_id }
            )));
        }
        let sandbox = self.sandbox().await?;
        match sandbox.delete_process(id, exec_id).await {
            Ok(_) | Err(caisson_sandbox::Error::Gone(_)) => {}
            Err(caisson_sandbox::Error::Agent {
                kind: caisson_sandbox::AgentErrorKind::NotFound,
                ..
            }) => {}
            Err(error) => return Err(error.into()),
        }
        let exit = exit.unwrap_or(Exit {
            status: 0,
            at: SystemTime::now(),
        });
        self.table()
            .retain(|other, _| *other != name && !(exec_id.is_empty() && other.0 == id));
        if exec_id.is_empty() {
            let _ = tokio::fs::remove_file(bundle.join("oom")).await;
            self.events.send(
                topic::DELETE,
                &TaskDelete {
                    container_id: id.to_owned(),
                    id: id.to_owned(),
                    pid,
                    exit_status: exit.status,
                    exited_at: timestamp(exit.at),
                    ..Default::default()
                },
            );
        }
        Ok((pid, exit))
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// No such process, or it has ended.
    pub async fn kill(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<(), Error> {
        let name = (id.to_owned(), exec_id.to_owned());
        let stage = self.with(&name, |process| Ok(process.stage))?;
        if stage == Stage::Stopped {
            return Err(Error::NotFound("process already finished".to_owned()));
        }
        Ok(self
            .sandbox()
            .await?
            .signal(id, exec_id, signal, all)
            .await?)
    }

    /// Sets the size of a terminal.
    ///
    /// # Errors
    /// No such process, no terminal.
    pub async fn resize(
        &self,
        id: &str,
        exec_id: &str,
        rows: u32,
        columns: u32,
    ) -> Result<(), Error> {
        self.with(&(id.to_owned(), exec_id.to_owned()), |_| Ok(()))?;
        Ok(self
            .sandbox()
            .await?
            .resize(id, exec_id, rows, columns)
            .await?)
    }

    /// Ends a process's stdin.
    ///
    /// # Errors
    /// No such process.
    pub fn close_stdin(&self, id: &str, exec_id: &str) -> Result<(), Error> {
        self.with(&(id.to_owned(), exec_id.to_owned()), |process| {
            process.close_stdin.notify_one();
            Ok(())
        })
    }

    /// Freezes or thaws a container.
    ///
    /// # Errors
    /// It does not run.
    pub async fn pause(&self, id: &str, paused: bool) -> Result<(), Error> {
        let name = (id.to_owned(), String::new());
        self.with(&name, |_| Ok(()))?;
        self.sandbox().await?.pause(id, paused).await?;
        self.with(&name, |process| {
            process.paused = paused;
            Ok(())
        })?;
        if paused {
            self.events.send(
                topic::PAUSED,
                &TaskPaused {
                    container_id: name.0,
                    ..Default::default()
                },
            );
        } else {
            self.events.send(
                topic::RESUMED,
                &TaskResumed {
                    container_id: name.0,
                    ..Default::default()
                },
            );
        }
        Ok(())
    }

    /// Processes of a container.
    ///
    /// # Errors
    /// No such container.
    pub async fn processes(&self, id: &str) -> Result<Vec<ProcessInfo>, Error> {
        self.with(&(id.to_owned(), String::new()), |_| Ok(()))?;
        Ok(self.sandbox().await?.processes(id).await?)
    }

    /// Changes a container's limits.
    ///
    /// # Errors
    /// A limit that cannot be set.
    pub async fn update(&self, id: &str, resources_json: Vec<u8>) -> Result<(), Error> {
        self.with(&(id.to_owned(), String::new()), |_| Ok(()))?;
        Ok(self.sandbox().await?.update(id, resources_json).await?)
    }

    /// A container's figures.
    ///
    /// # Errors
    /// No such container.
    pub async fn stats(&self, id: &str) -> Result<StatsResponse, Error> {
        self.with(&(id.to_owned(), String::new()), |_| Ok(()))?;
        Ok(self.sandbox().await?.stats(id).await?)
    }

    /// Whether there is any task.
    pub fn is_empty(&self) -> bool {
        self.table().is_empty()
    }

    /// Ends the microVM and cleans up.
    pub async fn stop(&self) {
        let sandbox = self.sandbox.lock().await.take();
        if let Some(sandbox) = sandbox
            && let Err(error) = sandbox.stop(Duration::ZERO).await
        {
            log::error!("{error}");
        }
    }
}

fn clip(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn root_of(bundle: &Path, spec: &Spec) -> PathBuf {
    let root = spec
        .root()
        .as_ref()
        .map_or(Path::new("rootfs"), |root| root.path());
    bundle.join(root)
}

/// Exit status of a process whose program could not be run (POSIX shell, "exit status for commands").
fn status_of(error: &Error) -> u32 {
    use caisson_sandbox::{AgentErrorKind, Error as SandboxError};
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

/// Passes on what the first is told.
fn forward(from: &Arc<Notify>, to: &Arc<Notify>) {
    let (from, to) = (from.clone(), Arc::downgrade(to));
    tokio::spawn(async move {
        from.notified().await;
        if let Some(to) = to.upgrade() {
            to.notify_one();
        }
    });
}

/// Why the machine ended, for whoever looks into the bundle.
fn write_vm_exit(bundle: &Path, gone: &Gone) {
    let document = serde_json::json!({
        "reason": gone.reason,
        "message": gone.to_string(),
        "console_tail": gone.console_tail,
    });
    let path = bundle.join("vm-exit.json");
    if let Err(error) = std::fs::write(&path, document.to_string()) {
        log::warn!("cannot write {}: {error}", path.display());
    }
}
