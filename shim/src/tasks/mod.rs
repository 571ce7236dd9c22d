//! The pod's tasks: what the Task API does, in terms of a microVM.
//!
//! [`boot`] starts the microVM and [`machine`] ends it, [`life`] has what changes a process's stage,
//! [`kill`] its signals, [`news`] what comes from the guest.

mod boot;
mod kill;
mod life;
mod machine;
mod news;

#[cfg(test)]
pub mod tests;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicBool},
    time::{Duration, SystemTime},
};

use caisson_sandbox::{Config, ContainerSpec, Created, ProcessInfo, StatsResponse};
use containerd_shim_protos::{
    api::Mount,
    events::task::{TaskCreate, TaskIO, TaskPaused, TaskResumed},
    protobuf::{MessageField, well_known_types::timestamp::Timestamp},
};
use oci_spec::runtime::Spec;
use tokio::sync::{Notify, watch};

use crate::{
    error::Error,
    events::{Events, topic},
    hooks::HostHooks,
    pod::{Pod, Pods},
    process::{Exit, Process, Stage},
    rootfs,
    stdio::{Host, Paths},
};

/// After a process has ended, its last output may take this long to be written before its end is
/// told all the same (somebody else holds the stream, or nobody reads).
const DRAIN_LIMIT: Duration = Duration::from_secs(5);

/// 128 + SIGKILL: the machine went, and the process with it.
const KILLED: u32 = 137;

/// Name of a process: container and exec; the latter is empty for a container's first.
type Name = (String, String);

/// The pod that the tasks are in.
#[derive(Debug, Clone)]
pub struct Identity {
    /// containerd's namespace.
    pub namespace: String,
    /// Name of its sandbox on the host.
    pub sandbox: String,
    /// containerd listens: its clients take process ids for the host's (`docker top` asks the
    /// host's ps about them).
    pub containerd: bool,
}

/// All tasks of the pod.
pub struct Tasks {
    config: Config,
    identity: Identity,
    pods: Box<dyn Pods>,
    events: Events,
    /// Held while it boots.
    pod: tokio::sync::Mutex<Option<Arc<dyn Pod>>>,
    table: Mutex<HashMap<Name, Process>>,
    /// See [`Tasks::hold`].
    held: AtomicBool,
    /// True once the machine shall end, or has been ended.
    stopping: watch::Sender<bool>,
    /// How the machine has ended.
    machine_end: watch::Sender<Option<Exit>>,
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
    /// None yet. Containers get a microVM of `pods` when the first one is created.
    pub fn new(
        config: Config,
        identity: Identity,
        pods: Box<dyn Pods>,
        events: Events,
    ) -> Arc<Self> {
        Arc::new(Self {
            config,
            identity,
            pods,
            events,
            pod: tokio::sync::Mutex::default(),
            table: Mutex::default(),
            held: AtomicBool::new(false),
            stopping: watch::Sender::new(false),
            machine_end: watch::Sender::new(None),
            ended: Notify::new(),
        })
    }

    /// See [`Identity::containerd`].
    pub fn for_containerd(&self) -> bool {
        self.identity.containerd
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

    /// The pod of a process that is there.
    async fn pod_of(&self, name: &Name) -> Result<Arc<dyn Pod>, Error> {
        self.with(name, |_| Ok(()))?;
        self.pod().await
    }

    async fn pod(&self) -> Result<Arc<dyn Pod>, Error> {
        let pod = self.pod.lock().await;
        pod.clone()
            .ok_or_else(|| Error::FailedPrecondition("the pod has no microVM".to_owned()))
    }

    /// Creates a task.
    ///
    /// # Errors
    /// It exists, or something of it cannot be made; nothing is left then.
    pub async fn create(self: &Arc<Self>, request: Creation) -> Result<u32, Error> {
        if request.id.is_empty() {
            return Err(Error::Invalid("the task's id is missing".to_owned()));
        }
        let name = (request.id.clone(), String::new());
        self.insert(
            name.clone(),
            Process::new(request.paths.clone(), request.bundle.clone()),
        )?;
        match self.create_in_guest(&request).await {
            Ok((host, created, pid)) => {
                self.with(&name, |process| {
                    process.stage = Stage::Created;
                    process.pid = pid;
                    process.unstarted = Some((host, created.streams));
                    self.tell_created(&request, pid);
                    if let Some(exit) = process.early_exit.take() {
                        process.set_exit(exit);
                        self.tell_exit(&name, pid, exit);
                    }
                    Ok(())
                })?;
                Ok(pid)
            }
            Err(error) => {
                if let Error::Sandbox(caisson_sandbox::Error::Gone(gone)) = &error {
                    news::write_vm_exit(&request.bundle, gone);
                }
                self.table().remove(&name);
                Err(error)
            }
        }
    }

    fn insert(&self, name: Name, process: Process) -> Result<(), Error> {
        let mut table = self.table();
        if table.contains_key(&name) {
            let (container, exec) = name;
            return Err(Error::AlreadyExists(if exec.is_empty() {
                format!("task {container} exists already")
            } else {
                format!("process {exec} of {container} exists already")
            }));
        }
        table.insert(name, process);
        Ok(())
    }

    fn tell_created(&self, request: &Creation, pid: u32) {
        self.events.send(
            topic::CREATE,
            &TaskCreate {
                container_id: request.id.clone(),
                bundle: request.bundle.display().to_string(),
                rootfs: request.rootfs.clone(),
                io: MessageField::some(TaskIO {
                    stdin: request.paths.stdin.clone(),
                    stdout: request.paths.stdout.clone(),
                    stderr: request.paths.stderr.clone(),
                    terminal: request.paths.terminal,
                    ..Default::default()
                }),
                pid,
                ..Default::default()
            },
        );
    }

    async fn create_in_guest(
        self: &Arc<Self>,
        request: &Creation,
    ) -> Result<(Host, Created, u32), Error> {
        let name = (request.id.clone(), String::new());
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
        let hooks = HostHooks::of(&spec, &request.id, &request.bundle)?;
        let host = Host::open(&request.paths, (&self.identity.namespace, &request.id)).await?;
        let console = spec
            .process()
            .as_ref()
            .and_then(|process| process.console_size());
        let size = console.map_or((0, 0), |size| (clip(size.height()), clip(size.width())));
        let (config, bundle, mounts) = (
            self.config.clone(),
            request.bundle.clone(),
            request.rootfs.clone(),
        );
        let (spec, rootfs) = blocking(move || {
            let rootfs = rootfs::prepare(&config, &bundle, &spec, &mounts)?;
            Ok((spec, rootfs))
        })
        .await?;
        let created = async {
            let pod = self.booted(&spec, &rootfs).await?;
            self.with(&name, |process| {
                process.hooks = Some(hooks.clone());
                Ok(())
            })?;
            hooks.create(pod.vmm_pid()).await?;
            let container = ContainerSpec {
                id: request.id.clone(),
                spec_json,
                rootfs,
                stdio: request.paths.wanted(size),
                pod_files: true,
            };
            // A process of the guest means nothing to the host; its machine's does.
            Ok((pod.create_container(container).await?, pod.vmm_pid()))
        };
        match created.await {
            Ok((created, pid)) => Ok((host, created, pid)),
            Err(error) => {
                release_rootfs(&request.bundle).await;
                let hooks = self.with(&name, |process| Ok(process.hooks.take()))?;
                if let Some(hooks) = hooks {
                    hooks.stopped().await;
                }
                Err(error)
            }
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
        let pod = self.pod_of(&(id.to_owned(), exec_id.to_owned())).await?;
        Ok(pod.resize(id, exec_id, rows, columns).await?)
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
        self.pod_of(&name).await?.pause(id, paused).await?;
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

    /// Processes of a container; of one that has ended, its machine.
    ///
    /// # Errors
    /// No such container.
    pub async fn processes(&self, id: &str) -> Result<Vec<ProcessInfo>, Error> {
        let name = (id.to_owned(), String::new());
        let (stage, pid) = self.with(&name, |process| Ok((process.stage, process.pid)))?;
        if stage == Stage::Stopped {
            // A containerd that comes back takes a shim without a process for one whose task was
            // never made, and would end it before its exit status has been asked for.
            return Ok(vec![ProcessInfo {
                pid,
                guest_pid: pid,
                exec: String::new(),
                command: String::new(),
            }]);
        }
        Ok(self.pod().await?.processes(id).await?)
    }

    /// Changes a container's limits.
    ///
    /// # Errors
    /// A limit that cannot be set.
    pub async fn update(&self, id: &str, resources_json: Vec<u8>) -> Result<(), Error> {
        let pod = self.pod_of(&(id.to_owned(), String::new())).await?;
        Ok(pod.update(id, resources_json).await?)
    }

    /// A container's figures.
    ///
    /// # Errors
    /// No such container.
    pub async fn stats(&self, id: &str) -> Result<StatsResponse, Error> {
        let pod = self.pod_of(&(id.to_owned(), String::new())).await?;
        Ok(pod.stats(id).await?)
    }

    /// Whether there is any task.
    pub fn is_empty(&self) -> bool {
        self.table().is_empty()
    }
}

async fn release_rootfs(bundle: &Path) {
    let owned = bundle.to_owned();
    if let Err(error) = blocking(move || rootfs::release(&owned)).await {
        log::error!("{error}");
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Error::io("run a task")(error)))
}

fn clip(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}
