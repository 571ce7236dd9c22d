//! The shim as containerd would drive it: started by its verb, spoken to over its Task API.

use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use caisson_sandbox::{Config, scaled};
use containerd_shim_protos::{
    api::{
        CloseIORequest, CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest, Mount,
        PauseRequest, PidsRequest, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
        StateRequest, StatsRequest, Status, UpdateTaskRequest, WaitRequest,
    },
    cgroups_v2::metrics::Metrics,
    protobuf::{Message, MessageField, well_known_types::any::Any},
    shim_async::{Client, TaskClient},
    ttrpc::{self, Code, context},
};

use crate::{
    container::start_time,
    error::{Error, ShimCode},
};

/// containerd's namespace for what docker's verbs run.
pub const NAMESPACE: &str = "caisson";

/// Longest that an ordinary call may take; the shim has its own, shorter limits.
const LIMIT: Duration = Duration::from_secs(60);

/// Longest that a killed container may take to end.
const END_LIMIT: Duration = Duration::from_secs(10);

/// The shim's name.
const PROGRAM: &[u8] = b"containerd-shim-caisson-v2";

fn program(config: &Config) -> PathBuf {
    // <prefix>/bin, beside this program; the VMM's place names the prefix when it is configured.
    let own = std::env::current_exe().ok();
    let beside = own
        .as_deref()
        .and_then(Path::parent)
        .map(|directory| directory.join("containerd-shim-caisson-v2"));
    beside.filter(|path| path.is_file()).unwrap_or_else(|| {
        let prefix = config.vmm.ancestors().nth(3).unwrap_or(Path::new("/usr"));
        prefix.join("bin/containerd-shim-caisson-v2")
    })
}

fn run(
    config: &Config,
    (namespace, id): (&str, &str),
    bundle: &Path,
    verb: &str,
    debug: bool,
) -> Result<String, Error> {
    let program = program(config);
    let output = Command::new(&program)
        .args(["-namespace", namespace, "-id", id, "-address", ""])
        .args(debug.then_some("-debug"))
        .arg(verb)
        .current_dir(bundle)
        .stdin(Stdio::null())
        .output()
        .map_err(Error::file("run", &program))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Error::Shim {
        code: ShimCode::Other,
        message: if message.is_empty() {
            output.status.to_string()
        } else {
            message
        },
    })
}

/// Starts the shim of a container, named by containerd's namespace and its id, and connects to it.
/// With `debug` its log says more.
///
/// # Errors
/// It cannot be started.
pub async fn start(
    config: &Config,
    name: (&str, &str),
    bundle: &Path,
    debug: bool,
) -> Result<Shim, Error> {
    let address = run(config, name, bundle, "start", debug)?;
    Shim::connect(&address).await
}

/// Removes what a shim that was killed has left.
///
/// # Errors
/// Something could not be removed.
pub fn delete(config: &Config, name: (&str, &str), bundle: &Path) -> Result<(), Error> {
    run(config, name, bundle, "delete", false).map(drop)
}

/// Ends a shim that has lost its monitor, if there is one.
pub fn end_orphan(bundle: &Path) {
    let pid = fs::read_to_string(bundle.join("shim.pid"))
        .ok()
        .and_then(|text| text.trim().parse::<u32>().ok());
    let Some(pid) = pid else { return };
    // Only if it is still that program: ids are used again.
    let is_shim = || start_time(pid).is_some() && is_shim_of(pid, bundle);
    let signal = |signal| {
        if let Some(pid) = i32::try_from(pid)
            .ok()
            .and_then(rustix::process::Pid::from_raw)
            && is_shim()
        {
            let _ = rustix::process::kill_process(pid, signal);
        }
    };
    signal(rustix::process::Signal::TERM);
    let step = Duration::from_millis(5);
    let mut left = scaled(Duration::from_secs(3));
    while is_shim() && !left.is_zero() {
        std::thread::sleep(step);
        left = left.saturating_sub(step);
    }
    signal(rustix::process::Signal::KILL);
}

/// Whether a process is the shim of this bundle, by its command line: unlike its program and its
/// directory this is to be seen from another user namespace, too.
fn is_shim_of(pid: u32, bundle: &Path) -> bool {
    let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
    let program = words.first().is_some_and(|word| word.ends_with(PROGRAM));
    let bundle = bundle.as_os_str().as_encoded_bytes();
    program && words.windows(2).any(|pair| pair == [b"-bundle", bundle])
}

/// Ends a task that has lost its monitor, in a shim that serves others too.
pub fn end_task(bundle: &Path, id: &str) {
    let end = || -> Result<(), Error> {
        crate::event_loop()?.block_on(async {
            let shim = Shim::of_bundle(bundle).await?;
            shim.end_task(id).await;
            Ok(())
        })
    };
    // A thread of its own, as the caller may be part of an event loop.
    std::thread::scope(|scope| {
        let _ = scope.spawn(end).join();
    });
}

/// A connection to a shim.
#[derive(Clone)]
pub struct Shim {
    client: TaskClient,
}

/// Where a process's streams are.
#[derive(Debug, Clone, Default)]
pub struct Streams {
    /// It has a terminal.
    pub terminal: bool,
    /// FIFOs, or nothing.
    pub stdin: Option<PathBuf>,
    /// FIFOs, or nothing.
    pub stdout: Option<PathBuf>,
    /// FIFOs, or nothing.
    pub stderr: Option<PathBuf>,
}

fn text(path: &Option<PathBuf>) -> String {
    path.as_ref()
        .map(|path| path.display().to_string())
        .unwrap_or_default()
}

fn refusal(error: ttrpc::Error) -> Error {
    match error {
        ttrpc::Error::RpcStatus(status) => {
            let code = match status.code() {
                Code::NOT_FOUND => ShimCode::NotFound,
                Code::PERMISSION_DENIED => ShimCode::PermissionDenied,
                _ => ShimCode::Other,
            };
            Error::Shim {
                code,
                message: status.message().to_owned(),
            }
        }
        other => Error::Shim {
            code: ShimCode::Gone,
            message: format!("lost the container's shim: {other}"),
        },
    }
}

fn limit() -> context::Context {
    context::with_duration(scaled(LIMIT))
}

impl Shim {
    /// Connects to the shim at `address` ("unix:///path").
    ///
    /// # Errors
    /// Nobody is there.
    pub async fn connect(address: &str) -> Result<Self, Error> {
        let client = Client::connect(address)
            .await
            .map_err(|error| Error::Shim {
                code: ShimCode::Gone,
                message: format!("cannot reach the container's shim at {address}: {error}"),
            })?;
        Ok(Self {
            client: TaskClient::new(client),
        })
    }

    /// Connects to the shim of a bundle.
    ///
    /// # Errors
    /// Nobody is there.
    pub async fn of_bundle(bundle: &Path) -> Result<Self, Error> {
        let path = bundle.join("address");
        let address = fs::read_to_string(&path).map_err(|error| Error::Shim {
            code: ShimCode::Gone,
            message: format!("the container has no shim ({}: {error})", path.display()),
        })?;
        Self::connect(address.trim()).await
    }

    /// Connects a bundle to the shim of another one's microVM.
    ///
    /// # Errors
    /// Nobody is there any more.
    pub async fn join(bundle: &Path, other: &Path) -> Result<Self, Error> {
        let shim = Self::of_bundle(other).await?;
        let (from, to) = (other.join("address"), bundle.join("address"));
        fs::copy(&from, &to).map_err(Error::file("write", to))?;
        Ok(shim)
    }

    /// Ends a container and forgets it; others of its microVM stay.
    pub async fn end_task(&self, id: &str) {
        // Refused only when it has ended, which is what is wanted.
        let _ = self.kill(id, "", 9, true).await;
        let _ = tokio::time::timeout(scaled(END_LIMIT), self.wait(id, "")).await;
        let _ = self.delete(id, "").await;
    }

    /// Creates the task.
    ///
    /// # Errors
    /// The shim's words.
    pub async fn create(
        &self,
        id: &str,
        bundle: &Path,
        layers: &[PathBuf],
        streams: &Streams,
    ) -> Result<u32, Error> {
        let rootfs = layers.iter().map(|layer| Mount {
            type_: "erofs".to_owned(),
            source: layer.display().to_string(),
            options: vec!["ro".to_owned()],
            ..Default::default()
        });
        let request = CreateTaskRequest {
            id: id.to_owned(),
            bundle: bundle.display().to_string(),
            rootfs: rootfs.collect(),
            terminal: streams.terminal,
            stdin: text(&streams.stdin),
            stdout: text(&streams.stdout),
            stderr: text(&streams.stderr),
            ..Default::default()
        };
        Ok(self
            .client
            .create(limit(), &request)
            .await
            .map_err(refusal)?
            .pid)
    }

    /// Registers an exec.
    ///
    /// # Errors
    /// The shim's words.
    pub async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: &serde_json::Value,
        streams: &Streams,
    ) -> Result<(), Error> {
        let request = ExecProcessRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            terminal: streams.terminal,
            stdin: text(&streams.stdin),
            stdout: text(&streams.stdout),
            stderr: text(&streams.stderr),
            spec: MessageField::some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
                value: process.to_string().into_bytes(),
                ..Default::default()
            }),
            ..Default::default()
        };
        self.client
            .exec(limit(), &request)
            .await
            .map_err(refusal)
            .map(drop)
    }

    /// Starts a process.
    ///
    /// # Errors
    /// The shim's words.
    pub async fn start(&self, id: &str, exec_id: &str) -> Result<u32, Error> {
        let request = StartRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        Ok(self
            .client
            .start(limit(), &request)
            .await
            .map_err(refusal)?
            .pid)
    }

    /// Waits for a process's end; its exit status.
    ///
    /// # Errors
    /// The shim is gone, or there is no such process.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<u32, Error> {
        let request = WaitRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        // As long as it takes; the connection's end ends it.
        let answer = self
            .client
            .wait(context::Context::default(), &request)
            .await;
        Ok(answer.map_err(refusal)?.exit_status)
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// The process has ended.
    pub async fn kill(&self, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<(), Error> {
        let request = KillRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        self.client
            .kill(limit(), &request)
            .await
            .map_err(refusal)
            .map(drop)
    }

    /// Sets a terminal's size.
    ///
    /// # Errors
    /// It has none.
    pub async fn resize(
        &self,
        id: &str,
        exec_id: &str,
        rows: u16,
        columns: u16,
    ) -> Result<(), Error> {
        let request = ResizePtyRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            width: columns.into(),
            height: rows.into(),
            ..Default::default()
        };
        self.client
            .resize_pty(limit(), &request)
            .await
            .map_err(refusal)
            .map(drop)
    }

    /// Ends a process's standard input.
    ///
    /// # Errors
    /// There is no such process.
    pub async fn close_stdin(&self, id: &str, exec_id: &str) -> Result<(), Error> {
        let request = CloseIORequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            stdin: true,
            ..Default::default()
        };
        self.client
            .close_io(limit(), &request)
            .await
            .map_err(refusal)
            .map(drop)
    }

    /// Deletes a process that has ended.
    ///
    /// # Errors
    /// It runs.
    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<(), Error> {
        let request = DeleteRequest {
            id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        self.client
            .delete(limit(), &request)
            .await
            .map_err(refusal)
            .map(drop)
    }

    /// Where a container is in its life.
    ///
    /// # Errors
    /// There is no such container.
    pub async fn status(&self, id: &str) -> Result<Status, Error> {
        let request = StateRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let state = self
            .client
            .state(limit(), &request)
            .await
            .map_err(refusal)?;
        Ok(state.status.enum_value_or_default())
    }

    /// Freezes a container or lets it go on.
    ///
    /// # Errors
    /// It does not run.
    pub async fn pause(&self, id: &str, paused: bool) -> Result<(), Error> {
        let id = id.to_owned();
        let done = if paused {
            let request = PauseRequest {
                id,
                ..Default::default()
            };
            self.client.pause(limit(), &request).await
        } else {
            let request = ResumeRequest {
                id,
                ..Default::default()
            };
            self.client.resume(limit(), &request).await
        };
        done.map_err(refusal).map(drop)
    }

    /// Processes of a container, by their ids in the guest.
    ///
    /// # Errors
    /// There is no such container.
    pub async fn processes(&self, id: &str) -> Result<Vec<u32>, Error> {
        let request = PidsRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let answer = self.client.pids(limit(), &request).await.map_err(refusal)?;
        Ok(answer.processes.iter().map(|process| process.pid).collect())
    }

    /// Changes a container's limits: an OCI `linux.resources` object.
    ///
    /// # Errors
    /// The guest's words.
    pub async fn update(&self, id: &str, resources: &serde_json::Value) -> Result<(), Error> {
        let request = UpdateTaskRequest {
            id: id.to_owned(),
            resources: MessageField::some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
                    .to_owned(),
                value: resources.to_string().into_bytes(),
                ..Default::default()
            }),
            ..Default::default()
        };
        self.client
            .update(limit(), &request)
            .await
            .map_err(refusal)
            .map(drop)
    }

    /// A container's figures.
    ///
    /// # Errors
    /// There is no such container.
    pub async fn stats(&self, id: &str) -> Result<Metrics, Error> {
        let request = StatsRequest {
            id: id.to_owned(),
            ..Default::default()
        };
        let answer = self
            .client
            .stats(limit(), &request)
            .await
            .map_err(refusal)?;
        let stats = answer.stats.unwrap_or_default();
        Metrics::parse_from_bytes(&stats.value)
            .map_err(|error| Error::io("read the shim's metrics")(io::Error::other(error)))
    }

    /// Ends the shim.
    ///
    /// # Errors
    /// It is gone already.
    pub async fn shutdown(&self, id: &str) -> Result<(), Error> {
        let request = ShutdownRequest {
            id: id.to_owned(),
            now: true,
            ..Default::default()
        };
        self.client
            .shutdown(limit(), &request)
            .await
            .map_err(refusal)
            .map(drop)
    }
}

/// Makes a FIFO for root alone.
///
/// # Errors
/// Those of mkfifo(3).
pub fn make_fifo(path: PathBuf) -> Result<PathBuf, Error> {
    rustix::fs::mkfifoat(
        rustix::fs::CWD,
        &path,
        rustix::fs::Mode::from_raw_mode(0o600),
    )
    .map_err(|error| Error::file("create the FIFO", &path)(io::Error::from(error)))?;
    Ok(path)
}
