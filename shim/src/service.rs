//! The ttrpc service: containerd's messages in, [`Tasks`]' methods, messages out.

use std::sync::Arc;

use async_trait::async_trait;
use caisson_sandbox::scaled;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
        ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
        StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    protobuf::{EnumOrUnknown, MessageField},
    shim_async::Task,
    ttrpc::{self, r#async::TtrpcContext},
};

use crate::{
    error::Error,
    metrics,
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
        let pid = self
            .tasks
            .create(Creation {
                id: request.id,
                bundle: request.bundle.into(),
                rootfs: request.rootfs,
                paths: Paths {
                    terminal: request.terminal,
                    stdin: request.stdin,
                    stdout: request.stdout,
                    stderr: request.stderr,
                },
            })
            .await?;
        Ok(CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Reply<StartResponse> {
        let pid = self.tasks.start(&request.id, &request.exec_id).await?;
        Ok(StartResponse {
            pid,
            ..Default::default()
        })
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Reply<DeleteResponse> {
        let (pid, exit) = self.tasks.delete(&request.id, &request.exec_id).await?;
        Ok(DeleteResponse {
            pid,
            exit_status: exit.status,
            exited_at: at(exit),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Reply<PidsResponse> {
        let processes = self.tasks.processes(&request.id).await?;
        let processes = processes.into_iter().map(|process| ProcessInfo {
            pid: process.guest_pid,
            ..Default::default()
        });
        Ok(PidsResponse {
            processes: processes.collect(),
            ..Default::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Reply<Empty> {
        self.tasks.pause(&request.id, true).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Reply<Empty> {
        self.tasks.pause(&request.id, false).await?;
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
        self.tasks
            .exec(&request.id, &request.exec_id, process, paths)
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
        let process = self.tasks.snapshot(&request.id, "")?;
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: process.pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> Reply<Empty> {
        // containerd says it after each container; only the last one ends the pod.
        if request.now || self.tasks.is_empty() {
            self.tasks.stop().await;
            let tasks = self.tasks.clone();
            tokio::spawn(async move {
                // The answer goes first.
                tokio::time::sleep(scaled(std::time::Duration::from_millis(10))).await;
                tasks.ended.notify_one();
            });
        }
        Ok(Empty::new())
    }
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
