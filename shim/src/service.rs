//! The ttrpc service: containerd's messages in, [`Tasks`]' methods, messages out.

use std::sync::Arc;

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
        ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
        StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    protobuf::{EnumOrUnknown, Message, MessageField, well_known_types::any::Any},
    shim::oci::ProcessDetails,
    shim_async::Task,
    ttrpc::{self, r#async::TtrpcContext},
};

use crate::{
    error::Error,
    metrics, options,
    process::{Exit, Stage},
    stdio::Paths,
    tasks::{Creation, Tasks},
};

/// The Task service of one pod.
pub struct Service {
    tasks: Arc<Tasks>,
}

impl Service {
    /// Serves `tasks`.
    pub fn new(tasks: Arc<Tasks>) -> Self {
        Self { tasks }
    }

    /// Does the whole of `work` even if the caller gives up on it: ttrpc drops a method in its
    /// midst when the caller's deadline is over, which must leave nothing half made.
    async fn whole<T: Send + 'static, F: Future<Output = Result<T, Error>> + Send + 'static>(
        &self,
        work: impl FnOnce(Arc<Tasks>) -> F,
    ) -> Result<T, Error> {
        tokio::spawn(work(self.tasks.clone()))
            .await
            .unwrap_or_else(|error| Err(Error::io("do it")(error)))
    }
}

type Reply<T> = ttrpc::Result<T>;

fn status(stage: Stage, paused: bool) -> Status {
    match stage {
        Stage::Creating | Stage::Created => Status::CREATED,
        Stage::Starting | Stage::Running if paused => Status::PAUSED,
        Stage::Starting | Stage::Running => Status::RUNNING,
        Stage::Stopped => Status::STOPPED,
    }
}

fn at(
    exit: Exit,
) -> MessageField<containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp> {
    MessageField::some(exit.at.into())
}

#[async_trait]
impl Task for Service {
    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> Reply<StateResponse> {
        let process = self.tasks.snapshot(&request.id, &request.exec_id)?;
        Ok(StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: process.bundle.display().to_string(),
            pid: process.pid,
            status: EnumOrUnknown::new(status(process.stage, process.paused)),
            stdin: process.paths.stdin,
            stdout: process.paths.stdout,
            stderr: process.paths.stderr,
            terminal: process.paths.terminal,
            exit_status: process.exit.map_or(0, |exit| exit.status),
            exited_at: process.exit.map(at).unwrap_or_default(),
            ..Default::default()
        })
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> Reply<CreateTaskResponse> {
        if !request.checkpoint.is_empty() || !request.parent_checkpoint.is_empty() {
            return Err(Error::Unsupported(
                "containers cannot be restored from checkpoints".to_owned(),
            )
            .into());
        }
        options::check(request.options.as_ref())?;
        let creation = Creation {
            id: request.id,
            bundle: request.bundle.into(),
            rootfs: request.rootfs,
            paths: Paths {
                terminal: request.terminal,
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
            },
        };
        let pid = self
            .whole(|tasks| async move { tasks.create(creation).await })
            .await?;
        Ok(CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Reply<StartResponse> {
        let pid = self
            .whole(|tasks| async move { tasks.start(&request.id, &request.exec_id).await })
            .await?;
        Ok(StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Reply<DeleteResponse> {
        let (pid, exit) = self
            .whole(|tasks| async move { tasks.delete(&request.id, &request.exec_id).await })
            .await?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: at(exit),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Reply<PidsResponse> {
        let mut processes = self.tasks.processes(&request.id).await?;
        let machine = self.tasks.snapshot(&request.id, "")?.pid;
        let host = self.tasks.for_containerd().then_some(machine);
        if host.is_some() {
            processes.sort_by(|one, other| one.exec.cmp(&other.exec));
            processes.dedup_by(|one, before| one.exec.is_empty() && before.exec.is_empty());
        }
        Ok(PidsResponse {
            processes: processes
                .into_iter()
                .map(|process| process_info(process, host))
                .collect::<Result<_, _>>()?,
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Reply<Empty> {
        self.whole(|tasks| async move { tasks.pause(&request.id, true).await })
            .await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Reply<Empty> {
        self.whole(|tasks| async move { tasks.pause(&request.id, false).await })
            .await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: CheckpointTaskRequest) -> Reply<Empty> {
        Err(Error::Unsupported("containers cannot be checkpointed".to_owned()).into())
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Reply<Empty> {
        self.tasks
            .kill(&request.id, &request.exec_id, request.signal, request.all)
            .await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Reply<Empty> {
        let mut process = request.spec.unwrap_or_default().value;
        if request.terminal {
            process = with_terminal(process);
        }
        let paths = Paths {
            terminal: request.terminal,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        self.whole(|tasks| async move {
            tasks
                .exec(&request.id, &request.exec_id, process, paths)
                .await
        })
        .await?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Reply<Empty> {
        self.tasks
            .resize(&request.id, &request.exec_id, request.height, request.width)
            .await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Reply<Empty> {
        if request.stdin {
            self.tasks.close_stdin(&request.id, &request.exec_id)?;
        }
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> Reply<Empty> {
        let resources = request.resources.unwrap_or_default().value;
        self.tasks.update(&request.id, resources).await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Reply<WaitResponse> {
        let exit = self.tasks.wait(&request.id, &request.exec_id).await?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: at(exit),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Reply<StatsResponse> {
        let stats = self.tasks.stats(&request.id).await?;
        Ok(StatsResponse {
            stats: MessageField::some(metrics::encode(&stats)?),
            ..Default::default()
        })
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> Reply<ConnectResponse> {
        // A containerd that comes back asks it of each shim, a sandbox's too, which is no task.
        let task_pid = if self.tasks.is_held() && self.tasks.is_pod(&request.id) {
            self.tasks.machine_pid().await.unwrap_or(0)
        } else {
            self.tasks.snapshot(&request.id, "")?.pid
        };
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> Reply<Empty> {
        // containerd says it after each container; only the last one ends the pod, unless somebody
        // else does.
        if !self.tasks.is_held() && (request.now || self.tasks.is_empty()) {
            self.whole(|tasks| async move {
                tasks.shut_down().await;
                Ok(())
            })
            .await?;
        }
        Ok(Empty::new())
    }
}

/// With the exec it was started by, as runc's shim tells it (`ctr task ps`). To those who want
/// processes of the host, each is the one that is their machine.
fn process_info(
    process: caisson_sandbox::ProcessInfo,
    host: Option<u32>,
) -> Result<ProcessInfo, Error> {
    let mut info = ProcessInfo {
        pid: host.unwrap_or(process.guest_pid),
        ..Default::default()
    };
    if !process.exec.is_empty() {
        let details = ProcessDetails {
            exec_id: process.exec,
            ..Default::default()
        };
        info.info = MessageField::some(Any {
            type_url: "containerd.runc.v1.ProcessDetails".to_owned(),
            value: details
                .write_to_bytes()
                .map_err(|error| Error::io("encode the answer")(std::io::Error::other(error)))?,
            ..Default::default()
        });
    }
    Ok(info)
}

/// containerd says in the request that an exec has a terminal, not always in its specification.
fn with_terminal(process: Vec<u8>) -> Vec<u8> {
    let Ok(mut document) = serde_json::from_slice::<serde_json::Value>(&process) else {
        return process; // Refused with its own message where it is read.
    };
    if let Some(object) = document.as_object_mut() {
        object.insert("terminal".to_owned(), true.into());
    }
    serde_json::to_vec(&document).unwrap_or(process)
}
