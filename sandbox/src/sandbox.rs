//! A running sandbox and the containers in it.

use std::{
    fs::File,
    io::{self, Read},
    os::{fd::AsFd, unix::net::UnixListener},
    path::{Path, PathBuf},
    sync::{Arc, Mutex as StdMutex, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use caisson_fs::Share;
use caisson_protocol::{
    SHARE_PREFIX, SHARE_TAG,
    agent::{
        BindDeviceRequest, ConfigureSandboxRequest, CreateContainerRequest, CreateExecRequest,
        HelloResponse, Layer, ProcessExit, ProcessId, ResizePtyRequest, Rootfs, ShutdownRequest,
        SignalRequest, StatsRequest, StatsResponse, StdioRequest, UnbindDeviceRequest,
        UpdateContainerRequest, bind_device_request::Expect, event::Kind, layer::Source,
        rootfs::Upper as WireUpper,
    },
    stdio::{Stream, TOKEN_LEN},
};
use caisson_vmm_api::{
    BlockConfig, BlockContents, BootConfig, Description, DeviceConfig, Fd, MemoryConfig, Request,
    Response, VcpuConfig,
};
use tokio::{
    net::UnixStream,
    sync::{Mutex, mpsc},
};

use crate::{
    agent::Agent,
    cgroup,
    config::Config,
    deadline::scaled,
    disk,
    error::{AgentErrorKind, Error},
    record::{self, Record, Resource},
    shares::{self, Shares},
    spec,
    vmm::{Gone, Vmm},
};

/// The guest's side of every vsock is this; each VM has a socket of its own, so all may share it.
const GUEST_CID: u32 = 3;

/// Most layers of an image (the GPT the VMM makes up has room for so many).
const MAX_LAYERS: usize = 120;

/// Events that may wait for the sandbox's owner.
const EVENT_QUEUE: usize = 256;

/// A sandbox to be started.
#[derive(Debug, Clone, Default)]
pub struct SandboxSpec {
    /// Unique on the host.
    pub id: String,
    /// Of the pod; empty = "caisson".
    pub hostname: String,
    /// 0 = the configuration's default.
    pub vcpus: u8,
    /// 0 = the configuration's default.
    pub memory_mib: u32,
    /// cgroup below which the sandbox's is made, as in /proc/self/cgroup.
    pub cgroup_parent: Option<PathBuf>,
    /// Lines of resolv.conf.
    pub dns_servers: Vec<String>,
    /// Lines of resolv.conf.
    pub dns_searches: Vec<String>,
    /// Lines of resolv.conf.
    pub dns_options: Vec<String>,
    /// Containers see each other's processes.
    pub shared_pid_namespace: bool,
}

/// A container to be created.
#[derive(Debug, Clone)]
pub struct ContainerSpec {
    /// Unique in the sandbox.
    pub id: String,
    /// OCI config.json as the host has it.
    pub spec_json: Vec<u8>,
    /// Its root file system.
    pub rootfs: RootfsSource,
    /// Its streams.
    pub stdio: Stdio,
    /// Bind the pod's hosts, hostname and resolv.conf.
    pub pod_files: bool,
}

/// Where a root file system comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RootfsSource {
    /// EROFS images (files or block devices), bottom first, and what is written on top.
    Layers {
        /// The images.
        erofs: Vec<PathBuf>,
        /// What is written.
        upper: Upper,
    },
    /// A directory of the host, served as it is.
    Directory(PathBuf),
}

/// The writable part of a root file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Upper {
    /// An ext4 disk of this many MiB, sparse on the host.
    Disk(u32),
    /// Guest memory, at most so many bytes.
    Tmpfs(u64),
    /// None.
    ReadOnly,
}

/// Which streams a process has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stdio {
    /// One terminal instead of three streams.
    pub terminal: bool,
    /// Rows and columns of it.
    pub size: (u32, u32),
    /// A stream, else /dev/null.
    pub stdin: bool,
    /// A stream, else /dev/null.
    pub stdout: bool,
    /// A stream, else /dev/null.
    pub stderr: bool,
}

/// Connected streams of a process.
#[derive(Debug, Default)]
pub struct Streams {
    /// To the process; half-closing it ends the process's stdin.
    pub stdin: Option<UnixStream>,
    /// From the process.
    pub stdout: Option<UnixStream>,
    /// From the process.
    pub stderr: Option<UnixStream>,
    /// Both ways.
    pub terminal: Option<UnixStream>,
}

/// A created process.
#[derive(Debug)]
pub struct Created {
    /// In the guest; 0 for an exec that has not been started.
    pub pid: u32,
    /// Its streams.
    pub streams: Streams,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// In the guest.
    pub pid: u32,
    /// 0..=255.
    pub status: u32,
    /// When.
    pub at: SystemTime,
}

/// What happened in a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A process ended; `exec` is empty for a container's first.
    Exited {
        /// The container.
        container: String,
        /// The exec.
        exec: String,
        /// How.
        exit: Exit,
    },
    /// The kernel killed a process of the container for want of memory.
    OutOfMemory {
        /// The container.
        container: String,
    },
    /// The microVM is gone, and every container with it. The last event.
    Gone(Gone),
}

/// State of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct State {
    /// Where it is in its life.
    pub status: Status,
    /// In the guest.
    pub pid: u32,
    /// Once it has ended.
    pub exit: Option<Exit>,
}

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Waits for start.
    Created,
    /// Runs.
    Running,
    /// Has ended.
    Stopped,
    /// Its container is frozen.
    Paused,
}

/// A process of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessInfo {
    /// In the container's PID namespace.
    pub pid: u32,
    /// In the guest.
    pub guest_pid: u32,
    /// Empty unless it is an exec's first process.
    pub exec: String,
    /// Its command line.
    pub command: String,
}

/// A running sandbox.
pub struct Sandbox {
    config: Config,
    vmm: Arc<Vmm>,
    agent: Agent,
    record: StdMutex<Record>,
    shares: Mutex<Option<Shares>>,
    containers: StdMutex<std::collections::HashMap<String, Vec<u32>>>,
    vsock: PathBuf,
    hello: HelloResponse,
}

impl Sandbox {
    /// Boots a microVM and waits for its agent. Events arrive at the receiver.
    ///
    /// # Errors
    /// [`Error`]; nothing is left on the host then.
    pub async fn start(
        config: &Config,
        spec: SandboxSpec,
    ) -> Result<(Self, mpsc::Receiver<Event>), Error> {
        let size = Size::of(config, &spec)?;
        let assets = Assets::open(config)?;
        let mut record = Record::create(&config.run_dir, &spec.id)?;
        match boot(config, &spec, size, &assets, &mut record).await {
            Ok((vmm, agent, hello, vsock)) => {
                let (sender, receiver) = mpsc::channel(EVENT_QUEUE);
                tokio::spawn(forward_events(agent.clone(), vmm.clone(), sender));
                let sandbox = Self {
                    config: config.clone(),
                    vmm,
                    agent,
                    record: StdMutex::new(record),
                    shares: Mutex::new(None),
                    containers: StdMutex::default(),
                    vsock,
                    hello,
                };
                Ok((sandbox, receiver))
            }
            Err(error) => {
                if let Err(left) = record.teardown() {
                    log::error!("sandbox {}: {left}", spec.id);
                }
                Err(error)
            }
        }
    }

    /// What the guest said of itself.
    pub fn guest(&self) -> &HelloResponse {
        &self.hello
    }

    /// State of the VMM.
    ///
    /// # Errors
    /// It has gone.
    pub async fn describe(&self) -> Result<Description, Error> {
        match self
            .vmm
            .call("describe itself", Request::Describe, &[])
            .await?
        {
            Response::Description(description) => Ok(*description),
            other => Err(unexpected("describe itself", &other)),
        }
    }

    /// The VMM's process id.
    pub fn vmm_pid(&self) -> u32 {
        self.vmm.pid()
    }

    /// Why the VM has gone, if it has.
    pub fn gone(&self) -> Option<Gone> {
        self.vmm.gone()
    }

    /// Creates a container; its program waits for [`Sandbox::start_process`].
    ///
    /// # Errors
    /// [`Error`]; nothing of the container is left then.
    pub async fn create_container(&self, request: ContainerSpec) -> Result<Created, Error> {
        let mut spec = spec::parse(&request.spec_json)?;
        spec::translate(&mut spec)?;
        for bind in spec::host_binds(&spec) {
            let share = Share {
                read_only: bind.read_only,
                set_id: false,
            };
            let entry = self.share(&bind.source, share).await?;
            spec::use_share(&mut spec, bind.mount, &entry);
        }
        let mut slots = Vec::new();
        let result = self.create_with(&request, &spec, &mut slots).await;
        match result {
            Ok(created) => {
                let mut containers = self
                    .containers
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                containers.insert(request.id, slots);
                Ok(created)
            }
            Err(error) => {
                self.detach(&slots).await;
                Err(error)
            }
        }
    }

    async fn create_with(
        &self,
        request: &ContainerSpec,
        spec: &oci_spec::runtime::Spec,
        slots: &mut Vec<u32>,
    ) -> Result<Created, Error> {
        let rootfs = self.rootfs(&request.rootfs, slots).await?;
        let spec_json =
            serde_json::to_vec(spec).map_err(|error| Error::Invalid(error.to_string()))?;
        let message = CreateContainerRequest {
            container_id: request.id.clone(),
            spec_json,
            rootfs: Some(rootfs).into(),
            stdio: Some(stdio_message(&request.stdio)).into(),
            bind_pod_files: request.pod_files,
            ..Default::default()
        };
        let response = self
            .agent
            .call("create the container", |client, context| async move {
                client.create_container(context, &message).await
            })
            .await?;
        let streams = self.connect(&response.stdio_token, &request.stdio).await;
        match streams {
            Ok(streams) => Ok(Created {
                pid: response.pid,
                streams,
            }),
            Err(error) => {
                // A process that nobody can talk to is of no use.
                let _ = self.delete_process(&request.id, "").await;
                Err(error)
            }
        }
    }

    /// Disks of the root file system; the slots they take are added to `slots`.
    async fn rootfs(&self, source: &RootfsSource, slots: &mut Vec<u32>) -> Result<Rootfs, Error> {
        let mut rootfs = Rootfs::default();
        match source {
            RootfsSource::Directory(path) => {
                let entry = self
                    .share(
                        path,
                        Share {
                            read_only: false,
                            set_id: true,
                        },
                    )
                    .await?;
                rootfs.upper = Some(WireUpper::Share(format!("{SHARE_PREFIX}{entry}")));
            }
            RootfsSource::Layers { erofs, upper } => {
                if erofs.is_empty() || erofs.len() > MAX_LAYERS {
                    return Err(Error::Invalid(format!(
                        "an image has 1 to {MAX_LAYERS} layers, not {}",
                        erofs.len()
                    )));
                }
                let files = erofs
                    .iter()
                    .map(|path| {
                        File::open(path)
                            .map_err(Error::io(format!("open the layer {}", path.display())))
                    })
                    .collect::<Result<Vec<_>, _>>()?;
                let descriptors: Vec<_> = files.iter().map(AsFd::as_fd).collect();
                let indexes = (0..descriptors.len())
                    .map(|index| Fd(u32::try_from(index).unwrap_or(u32::MAX)));
                let contents = BlockContents::Partitions(indexes.collect());
                let disk = self
                    .attach_disk("layers", contents, true, &descriptors, slots)
                    .await?;
                for number in 1..=files.len() {
                    rootfs.layers.push(Layer {
                        source: Some(Source::ErofsDevice(format!("{disk}{number}"))),
                        ..Default::default()
                    });
                }
                rootfs.upper = Some(match upper {
                    Upper::ReadOnly => WireUpper::ReadOnly(true),
                    Upper::Tmpfs(bytes) => WireUpper::TmpfsBytes(*bytes),
                    Upper::Disk(mib) => {
                        let (directory, mib) = (self.config.state_dir.join("uppers"), *mib);
                        let upper = blocking(move || disk::fresh(&directory, mib)).await?;
                        let contents = BlockContents::File(Fd(0));
                        WireUpper::Ext4Device(
                            self.attach_disk("upper", contents, false, &[upper.as_fd()], slots)
                                .await?,
                        )
                    }
                });
            }
        }
        Ok(rootfs)
    }

    /// Attaches a disk and returns its node in the guest.
    async fn attach_disk(
        &self,
        kind: &str,
        contents: BlockContents,
        read_only: bool,
        fds: &[std::os::fd::BorrowedFd<'_>],
        slots: &mut Vec<u32>,
    ) -> Result<String, Error> {
        let serial = format!("{kind}-{}", slots.len());
        let device = DeviceConfig::Block(BlockConfig {
            serial: serial.clone(),
            contents,
            read_only,
            rate_limit: None,
        });
        let slot = self.attach("attach a disk", device, fds).await?;
        slots.push(slot);
        let node = self.bind(slot, Expect::BlockSerial(serial)).await?;
        let plain = node.strip_prefix("/dev/").is_some_and(|name| {
            !name.is_empty()
                && name.len() <= 16
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric())
        });
        if plain {
            Ok(node)
        } else {
            Err(lie("named a disk that is none"))
        }
    }

    async fn attach(
        &self,
        what: &'static str,
        device: DeviceConfig,
        fds: &[std::os::fd::BorrowedFd<'_>],
    ) -> Result<u32, Error> {
        match self.vmm.call(what, Request::Attach(device), fds).await? {
            Response::Attached { slot } => Ok(slot),
            other => Err(unexpected(what, &other)),
        }
    }

    async fn bind(&self, slot: u32, expect: Expect) -> Result<String, Error> {
        let request = BindDeviceRequest {
            slot,
            expect: Some(expect),
            ..Default::default()
        };
        let response = self
            .agent
            .call("bind a device", |client, context| async move {
                client.bind_device(context, &request).await
            })
            .await?;
        Ok(response.device)
    }

    /// Takes devices away again. What fails here ends with the VM.
    async fn detach(&self, slots: &[u32]) {
        for slot in slots.iter().copied() {
            let request = UnbindDeviceRequest {
                slot,
                ..Default::default()
            };
            let unbound = self
                .agent
                .call("unbind a device", |client, context| async move {
                    client.unbind_device(context, &request).await
                })
                .await;
            if unbound.is_ok()
                && let Err(error) = self
                    .vmm
                    .call("detach a device", Request::Detach { slot }, &[])
                    .await
            {
                log::warn!("{error}");
            }
        }
    }

    /// Shares a host path with the guest and returns its name there.
    async fn share(&self, source: &Path, share: Share) -> Result<String, Error> {
        let mut guard = self.shares.lock().await;
        let mut shares = match guard.take() {
            Some(shares) => shares,
            None => self.start_file_server().await?,
        };
        let source = source.to_owned();
        let (shares, entry) = blocking(move || {
            let entry = shares.add(&source, share);
            Ok((shares, entry))
        })
        .await?;
        *guard = Some(shares);
        entry
    }

    async fn start_file_server(&self) -> Result<Shares, Error> {
        let program = self.config.file_server.clone();
        let (shares, socket) = blocking(move || Shares::start(&program)).await?;
        self.remember(process(shares.pid()))?;
        self.adopt(shares.pid());
        let device = DeviceConfig::Fs {
            tag: SHARE_TAG.to_owned(),
            socket: Fd(0),
            queues: shares::QUEUES,
        };
        let slot = self
            .attach(
                "attach the shared directories",
                device,
                &[shares::descriptor(&socket)],
            )
            .await?;
        self.bind(slot, Expect::FsTag(SHARE_TAG.to_owned())).await?;
        Ok(shares)
    }

    fn remember(&self, resource: Option<Resource>) -> Result<(), Error> {
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        resource.map_or(Ok(()), |resource| Ok(record.add(resource)?))
    }

    /// Puts a helper process into the sandbox's cgroup.
    fn adopt(&self, pid: u32) {
        let record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(path) = record.cgroup()
            && let Err(error) = cgroup::add(path, pid)
        {
            log::warn!("process {pid} stays out of the sandbox's cgroup: {error}");
        }
    }

    /// Creates another process in a running container.
    ///
    /// # Errors
    /// No such container, it does not run, the exec exists.
    pub async fn create_exec(
        &self,
        container: &str,
        exec: &str,
        process_json: Vec<u8>,
        stdio: &Stdio,
    ) -> Result<Created, Error> {
        let message = CreateExecRequest {
            container_id: container.to_owned(),
            exec_id: exec.to_owned(),
            process_json,
            stdio: Some(stdio_message(stdio)).into(),
            ..Default::default()
        };
        let response = self
            .agent
            .call("create the process", |client, context| async move {
                client.create_exec(context, &message).await
            })
            .await?;
        match self.connect(&response.stdio_token, stdio).await {
            Ok(streams) => Ok(Created {
                pid: response.pid,
                streams,
            }),
            Err(error) => {
                let _ = self.delete_process(container, exec).await;
                Err(error)
            }
        }
    }

    async fn connect(&self, token: &[u8], stdio: &Stdio) -> Result<Streams, Error> {
        let token: [u8; TOKEN_LEN] = token
            .try_into()
            .map_err(|_| lie("sent a malformed token"))?;
        let mut streams = Streams::default();
        let wanted = [
            (stdio.terminal, Stream::Terminal, &mut streams.terminal),
            (
                stdio.stdin && !stdio.terminal,
                Stream::Stdin,
                &mut streams.stdin,
            ),
            (
                stdio.stdout && !stdio.terminal,
                Stream::Stdout,
                &mut streams.stdout,
            ),
            (
                stdio.stderr && !stdio.terminal,
                Stream::Stderr,
                &mut streams.stderr,
            ),
        ];
        for (asked, stream, place) in wanted {
            if asked {
                let connected = tokio::select! {
                    gone = self.vmm.wait_gone() => Err(Error::Gone(gone)),
                    connected = crate::vsock::stdio(&self.vsock, token, stream) => connected,
                };
                *place = Some(connected?);
            }
        }
        Ok(streams)
    }

    /// Lets a created process run its program; `exec` is empty for a container's first. Returns
    /// its pid in the guest.
    ///
    /// # Errors
    /// The program cannot be run ([`AgentErrorKind::NotFound`], [`AgentErrorKind::PermissionDenied`]).
    pub async fn start_process(&self, container: &str, exec: &str) -> Result<u32, Error> {
        let request = process_id(container, exec);
        let response = if exec.is_empty() {
            self.agent
                .call("start the container", |client, context| async move {
                    client.start_container(context, &request).await
                })
                .await?
        } else {
            self.agent
                .call("start the process", |client, context| async move {
                    client.start_exec(context, &request).await
                })
                .await?
        };
        Ok(response.pid)
    }

    /// Deletes a process that does not run. A container's first takes the container along.
    ///
    /// # Errors
    /// It runs, or there is none.
    pub async fn delete_process(&self, container: &str, exec: &str) -> Result<Exit, Error> {
        let request = process_id(container, exec);
        if !exec.is_empty() {
            let exit = self
                .agent
                .call("delete the process", |client, context| async move {
                    client.delete_exec(context, &request).await
                })
                .await?;
            return Ok(exit_of(&exit));
        }
        let exit = self
            .agent
            .call("delete the container", |client, context| async move {
                client.delete_container(context, &request).await
            })
            .await?;
        let slots = {
            let mut containers = self
                .containers
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            containers.remove(container).unwrap_or_default()
        };
        self.detach(&slots).await;
        Ok(exit_of(&exit))
    }

    /// Sends a signal to a process, or to all of a container.
    ///
    /// # Errors
    /// It has ended ([`AgentErrorKind::NotFound`]).
    pub async fn signal(
        &self,
        container: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), Error> {
        let request = SignalRequest {
            container_id: container.to_owned(),
            exec_id: exec.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        self.agent
            .call("send the signal", |client, context| async move {
                client.signal_process(context, &request).await
            })
            .await
            .map(drop)
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// It has none.
    pub async fn resize(
        &self,
        container: &str,
        exec: &str,
        rows: u32,
        columns: u32,
    ) -> Result<(), Error> {
        let request = ResizePtyRequest {
            container_id: container.to_owned(),
            exec_id: exec.to_owned(),
            rows,
            columns,
            ..Default::default()
        };
        self.agent
            .call("resize the terminal", |client, context| async move {
                client.resize_pty(context, &request).await
            })
            .await
            .map(drop)
    }

    /// Ends a process's stdin once all that was sent is read.
    ///
    /// # Errors
    /// No such process.
    pub async fn close_stdin(&self, container: &str, exec: &str) -> Result<(), Error> {
        let request = process_id(container, exec);
        self.agent
            .call("close the standard input", |client, context| async move {
                client.close_stdin(context, &request).await
            })
            .await
            .map(drop)
    }

    /// Processes of a container.
    ///
    /// # Errors
    /// No such container.
    pub async fn processes(&self, container: &str) -> Result<Vec<ProcessInfo>, Error> {
        let request = process_id(container, "");
        let response = self
            .agent
            .call("list the processes", |client, context| async move {
                client.list_processes(context, &request).await
            })
            .await?;
        let processes = response.processes.into_iter().map(|process| ProcessInfo {
            pid: process.pid,
            guest_pid: process.guest_pid,
            exec: process.exec_id,
            command: process.command,
        });
        Ok(processes.collect())
    }

    /// State of a process.
    ///
    /// # Errors
    /// No such process.
    pub async fn state(&self, container: &str, exec: &str) -> Result<State, Error> {
        use caisson_protocol::agent::Status as Wire;
        let request = process_id(container, exec);
        let response = self
            .agent
            .call("tell the state", |client, context| async move {
                client.state(context, &request).await
            })
            .await?;
        let status = match response.status.enum_value() {
            Ok(Wire::STATUS_CREATED) => Status::Created,
            Ok(Wire::STATUS_RUNNING) => Status::Running,
            Ok(Wire::STATUS_STOPPED) => Status::Stopped,
            Ok(Wire::STATUS_PAUSED) => Status::Paused,
            _ => return Err(lie("sent an unknown state")),
        };
        Ok(State {
            status,
            pid: response.pid,
            exit: response.exit.as_ref().map(exit_of),
        })
    }

    /// Freezes or thaws a container.
    ///
    /// # Errors
    /// It does not run.
    pub async fn pause(&self, container: &str, paused: bool) -> Result<(), Error> {
        let request = process_id(container, "");
        self.agent
            .call(
                "pause or resume the container",
                |client, context| async move {
                    if paused {
                        client.pause_container(context, &request).await
                    } else {
                        client.resume_container(context, &request).await
                    }
                },
            )
            .await
            .map(drop)
    }

    /// Changes limits of a container (OCI `linux.resources`).
    ///
    /// # Errors
    /// A limit that cannot be set.
    pub async fn update(&self, container: &str, resources_json: Vec<u8>) -> Result<(), Error> {
        let request = UpdateContainerRequest {
            container_id: container.to_owned(),
            resources_json,
            ..Default::default()
        };
        self.agent
            .call("update the container", |client, context| async move {
                client.update_container(context, &request).await
            })
            .await
            .map(drop)
    }

    /// Figures of a container; of the whole guest for an empty name.
    ///
    /// # Errors
    /// No such container.
    pub async fn stats(&self, container: &str) -> Result<StatsResponse, Error> {
        let request = StatsRequest {
            container_id: container.to_owned(),
            ..Default::default()
        };
        self.agent
            .call("tell the statistics", |client, context| async move {
                client.stats(context, &request).await
            })
            .await
    }

    /// Ends the microVM and removes all that the sandbox has on the host. Containers get SIGTERM
    /// and `grace` to end, when it is not zero. Can be repeated.
    ///
    /// # Errors
    /// What could not be removed.
    pub async fn stop(&self, grace: Duration) -> Result<(), Error> {
        if self.vmm.gone().is_none() {
            if !grace.is_zero() {
                let request = ShutdownRequest {
                    grace_ms: u32::try_from(grace.as_millis()).unwrap_or(u32::MAX),
                    ..Default::default()
                };
                let asked = self
                    .agent
                    .call_within(
                        grace + Duration::from_secs(5),
                        "shut down",
                        |client, context| async move { client.shutdown(context, &request).await },
                    )
                    .await;
                if let Err(error) = asked {
                    log::warn!("the guest did not shut down by itself: {error}");
                }
            }
            // Already gone is as good.
            let _ = self.vmm.call("stop", Request::Stop, &[]).await;
            let _ =
                tokio::time::timeout(scaled(Duration::from_secs(2)), self.vmm.wait_gone()).await;
        }
        // The server's destructor ends and reaps it.
        drop(self.shares.lock().await.take());
        let record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(record.teardown()?)
    }
}

/// Removes what a sandbox whose owner was killed has left. A sandbox that does not exist is fine.
///
/// # Errors
/// What could not be removed.
pub fn cleanup(config: &Config, id: &str) -> Result<(), Error> {
    match Record::load(&config.run_dir, id)? {
        Some(record) => Ok(record.teardown()?),
        None => Ok(()),
    }
}

#[derive(Debug, Clone, Copy)]
struct Size {
    vcpus: u8,
    memory_mib: u32,
}

impl Size {
    fn of(config: &Config, spec: &SandboxSpec) -> Result<Self, Error> {
        let vcpus = if spec.vcpus == 0 {
            config.default_vcpus
        } else {
            spec.vcpus
        };
        let memory_mib = if spec.memory_mib == 0 {
            config.default_memory_mib
        } else {
            spec.memory_mib
        };
        if vcpus > config.max_vcpus {
            return Err(Error::Invalid(format!(
                "{vcpus} vCPUs are more than this host's configuration allows ({})",
                config.max_vcpus
            )));
        }
        if memory_mib < config.min_memory_mib {
            return Err(Error::Invalid(format!(
                "{memory_mib} MiB of memory are too little for a microVM to boot: {} MiB are the least",
                config.min_memory_mib
            )));
        }
        if memory_mib > config.max_memory_mib {
            return Err(Error::Invalid(format!(
                "{memory_mib} MiB of memory are more than this host's configuration allows ({} MiB)",
                config.max_memory_mib
            )));
        }
        Ok(Self { vcpus, memory_mib })
    }
}

struct Assets {
    kvm: File,
    kernel: File,
    image: File,
}

impl Assets {
    fn open(config: &Config) -> Result<Self, Error> {
        let kernel = asset(
            "guest kernel",
            &config.kernel,
            |head| head.starts_with(b"\x7fELF"),
            0,
            "not an ELF vmlinux",
        )?;
        // The magic of EROFS, little-endian, at the superblock's offset 1024.
        let image = asset(
            "guest image",
            &config.guest_image,
            |head| head.starts_with(&[0xe2, 0xe1, 0xf5, 0xe0]),
            1024,
            "not an EROFS image",
        )?;
        if !config.vmm.is_file() {
            return Err(Error::Asset {
                what: "VMM",
                path: config.vmm.clone(),
                reason: "no such file".to_owned(),
            });
        }
        let kvm = File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .map_err(|source| Error::Kvm { source })?;
        Ok(Self { kvm, kernel, image })
    }
}

fn asset(
    what: &'static str,
    path: &Path,
    right: impl Fn(&[u8]) -> bool,
    offset: u64,
    wrong: &str,
) -> Result<File, Error> {
    use std::os::unix::fs::FileExt;
    let broken = |reason: String| Error::Asset {
        what,
        path: path.to_owned(),
        reason,
    };
    let file = File::open(path).map_err(|error| broken(error.to_string()))?;
    let mut head = [0; 4];
    let read = file
        .read_at(&mut head, offset)
        .map_err(|error| broken(error.to_string()))?;
    if read < head.len() || !right(&head) {
        return Err(broken(wrong.to_owned()));
    }
    Ok(file)
}

type Booted = (Arc<Vmm>, Agent, HelloResponse, PathBuf);

async fn boot(
    config: &Config,
    spec: &SandboxSpec,
    size: Size,
    assets: &Assets,
    record: &mut Record,
) -> Result<Booted, Error> {
    let uid = record::claim_uid(
        record,
        &config.run_dir,
        &spec.id,
        config.uid_base,
        config.uid_count,
    )?;
    let cgroup = cgroup::path_for(&spec.id, spec.cgroup_parent.as_deref());
    if let Some(path) = &cgroup {
        record.add(Resource::Cgroup(path.clone()))?;
    }
    let vsock = record.directory().join("vsock.sock");
    let listener =
        UnixListener::bind(&vsock).map_err(Error::io(format!("listen on {}", vsock.display())))?;
    let begin = Instant::now();
    let vmm = Arc::new(Vmm::spawn(&config.vmm, uid)?);
    if let Some(resource) = process(vmm.pid()) {
        record.add(resource)?;
    }
    if let Some(path) = &cgroup {
        let entered = cgroup::create(path).and_then(|()| cgroup::add(path, vmm.pid()));
        if let Err(error) = entered {
            log::warn!(
                "the sandbox has no cgroup of its own ({}): {error}",
                path.display()
            );
        }
    }
    let spawned = begin.elapsed();
    let (request, fds) = boot_request(config, size, assets, &listener);
    vmm.call("boot", request, &fds).await?;
    let booting = begin.elapsed();
    let (agent, hello) = Agent::connect(&vsock, vmm.clone()).await?;
    let answered = begin.elapsed();
    configure(&agent, spec).await?;
    log_stages(&vmm, &hello, [spawned, booting, answered, begin.elapsed()]).await;
    Ok((vmm, agent, hello, vsock))
}

/// Where the time of a boot went, for whoever reads the log.
async fn log_stages(vmm: &Vmm, hello: &HelloResponse, host: [Duration; 4]) {
    let mut line = String::from("booted; ms since the VMM's start:");
    for (name, at) in ["spawned", "vCPUs run", "agent answers", "configured"]
        .iter()
        .zip(host)
    {
        line.push_str(&format!(" {name} {:.1},", at.as_secs_f64() * 1e3));
    }
    if let Ok(Response::Description(description)) =
        vmm.call("describe itself", Request::Describe, &[]).await
    {
        line.push_str(" in the VMM:");
        for (name, at) in &description.stages {
            line.push_str(&format!(" {name} {:.1},", *at as f64 / 1e6));
        }
    }
    line.push_str(" in the guest:");
    for stage in hello.stages.iter().take(16) {
        let name: String = stage
            .name
            .chars()
            .filter(char::is_ascii_graphic)
            .take(32)
            .collect();
        line.push_str(&format!(" {name} {:.1},", stage.nanoseconds as f64 / 1e6));
    }
    log::info!("{}", line.trim_end_matches(','));
}

fn boot_request<'a>(
    config: &Config,
    size: Size,
    assets: &'a Assets,
    listener: &'a UnixListener,
) -> (Request, Vec<std::os::fd::BorrowedFd<'a>>) {
    let fds = vec![
        assets.kvm.as_fd(),
        assets.kernel.as_fd(),
        assets.image.as_fd(),
        listener.as_fd(),
    ];
    let mut cmdline = String::from(
        "root=/dev/vda ro rootfstype=erofs init=/sbin/caisson-agent console=hvc0 quiet \
         reboot=k panic=-1 noreplace-smp swiotlb=noforce 8250.nr_uarts=0 random.trust_cpu=on",
    );
    if !config.kernel_parameters.is_empty() {
        cmdline.push(' ');
        cmdline.push_str(&config.kernel_parameters);
    }
    let boot = BootConfig {
        kvm: Fd(0),
        kernel: Fd(1),
        cmdline,
        vcpus: VcpuConfig {
            boot: size.vcpus,
            max: size.vcpus,
        },
        // Shared, so that a file server can be attached at any time.
        memory: MemoryConfig {
            boot_mib: size.memory_mib,
            hotplug_mib: 0,
            shared: true,
        },
        devices: vec![
            DeviceConfig::Block(BlockConfig {
                serial: "guest".to_owned(),
                contents: BlockContents::File(Fd(2)),
                read_only: true,
                rate_limit: None,
            }),
            DeviceConfig::Vsock {
                cid: GUEST_CID,
                listener: Fd(3),
                acceptor: None,
            },
            DeviceConfig::Console { output: None },
            DeviceConfig::Rng,
            DeviceConfig::Balloon,
        ],
    };
    (Request::Boot(Box::new(boot)), fds)
}

async fn configure(agent: &Agent, spec: &SandboxSpec) -> Result<(), Error> {
    let mut seed = [0; 64];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut seed))
        .map_err(Error::io("read /dev/urandom"))?;
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let request = ConfigureSandboxRequest {
        sandbox_id: spec.id.clone(),
        hostname: spec.hostname.clone(),
        realtime_ns: i64::try_from(since.as_nanos()).unwrap_or(i64::MAX),
        entropy_seed: seed.to_vec(),
        dns_servers: spec.dns_servers.clone(),
        dns_searches: spec.dns_searches.clone(),
        dns_options: spec.dns_options.clone(),
        shared_pid_namespace: spec.shared_pid_namespace,
        ..Default::default()
    };
    agent
        .call("configure the guest", |client, context| async move {
            client.configure_sandbox(context, &request).await
        })
        .await
        .map(drop)
}

/// Hands the agent's events on, and in the end the VM's own.
async fn forward_events(agent: Agent, vmm: Arc<Vmm>, sender: mpsc::Sender<Event>) {
    let mut sequence = 0;
    loop {
        let events = match agent.events(sequence).await {
            Ok(events) => events,
            Err(Error::Gone(gone)) => {
                let _ = sender.send(Event::Gone(gone)).await;
                return;
            }
            Err(error) => {
                log::error!("cannot hear of the guest's events: {error}; stopping the VM");
                // A guest whose events cannot be heard cannot be supervised.
                let _ = vmm.call("stop", Request::Stop, &[]).await;
                let _ = sender.send(Event::Gone(vmm.wait_gone().await)).await;
                return;
            }
        };
        for event in events {
            // A guest that counts backwards or skips gets no event handled twice.
            if event.sequence <= sequence {
                continue;
            }
            sequence = event.sequence;
            let event = match event.kind {
                Some(Kind::Exited(exited)) => Event::Exited {
                    container: exited.container_id,
                    exec: exited.exec_id,
                    exit: exit_of(exited.exit.as_ref().unwrap_or_default()),
                },
                Some(Kind::Oom(oom)) => Event::OutOfMemory {
                    container: oom.container_id,
                },
                _ => continue,
            };
            if sender.send(event).await.is_err() {
                return;
            }
        }
    }
}

fn process(pid: u32) -> Option<Resource> {
    record::start_time(pid).map(|start_time| Resource::Process { pid, start_time })
}

fn process_id(container: &str, exec: &str) -> ProcessId {
    ProcessId {
        container_id: container.to_owned(),
        exec_id: exec.to_owned(),
        ..Default::default()
    }
}

fn exit_of(exit: &ProcessExit) -> Exit {
    let nanoseconds = u64::try_from(exit.exited_at_ns).unwrap_or(0);
    Exit {
        pid: exit.pid,
        status: exit.exit_status & 0xFF,
        at: UNIX_EPOCH + Duration::from_nanos(nanoseconds),
    }
}

fn stdio_message(stdio: &Stdio) -> StdioRequest {
    StdioRequest {
        terminal: stdio.terminal,
        stdin: stdio.stdin,
        stdout: stdio.stdout,
        stderr: stdio.stderr,
        rows: stdio.size.0,
        columns: stdio.size.1,
        ..Default::default()
    }
}

fn lie(what: &str) -> Error {
    Error::Agent {
        kind: AgentErrorKind::Other,
        message: format!("the guest's agent {what}"),
    }
}

fn unexpected(what: &'static str, response: &Response) -> Error {
    Error::Vmm {
        what,
        reason: format!("unexpected answer {response:?}"),
    }
}

/// Runs what blocks where it may.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| {
            Err(Error::Io {
                what: "run a task".to_owned(),
                source: io::Error::other(error),
            })
        })
}
