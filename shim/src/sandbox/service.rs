//! The ttrpc service: containerd's messages in, [`Sandbox`]'s methods, messages out.

use std::{collections::HashMap, path::Path, sync::Arc, time::Duration};

use async_trait::async_trait;
use containerd_shim_protos::{
    protobuf::{MessageField, well_known_types::timestamp::Timestamp},
    sandbox_api::{
        CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
        PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
        SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse,
        StartSandboxRequest, StartSandboxResponse, StopSandboxRequest, StopSandboxResponse,
        WaitSandboxRequest, WaitSandboxResponse,
    },
    sandbox_async::Sandbox as SandboxService,
    ttrpc::{self, r#async::TtrpcContext},
    types::platform::Platform,
};

use super::Sandbox;
use crate::{error::Error, metrics, tasks::Tasks};

/// States that containerd's CRI plugin knows (`PodSandboxState`).
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The Sandbox service of one pod.
pub struct Service {
    sandbox: Arc<Sandbox>,
    tasks: Arc<Tasks>,
}

impl Service {
    /// Serves `sandbox`, the containers of which are `tasks`.
    pub fn new(sandbox: Sandbox, tasks: Arc<Tasks>) -> Self {
        Self {
            sandbox: Arc::new(sandbox),
            tasks,
        }
    }
}

type Reply<T> = ttrpc::Result<T>;

/// Does the whole of `work` even if the caller gives up on it, as for tasks.
async fn whole<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Error> {
    tokio::spawn(work)
        .await
        .unwrap_or_else(|error| Err(Error::io("do it")(error)))
}

#[async_trait]
impl SandboxService for Service {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> Reply<CreateSandboxResponse> {
        if !request.rootfs.is_empty() {
            return Err(Error::Unsupported(
                "a microVM boots from an image of its own: a sandbox cannot be given a root file \
                 system"
                    .to_owned(),
            )
            .into());
        }
        self.sandbox.create(
            &request.sandbox_id,
            Path::new(&request.bundle_path),
            request.options.as_ref(),
            &request.netns_path,
        )?;
        Ok(CreateSandboxResponse::new())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> Reply<StartSandboxResponse> {
        let sandbox = self.sandbox.clone();
        let started = whole(async move { sandbox.start(&request.sandbox_id).await }).await?;
        Ok(StartSandboxResponse {
            pid: started.pid,
            created_at: MessageField::some(started.at.into()),
            ..Default::default()
        })
    }

    async fn platform(&self, _: &TtrpcContext, _: PlatformRequest) -> Reply<PlatformResponse> {
        Ok(PlatformResponse {
            platform: MessageField::some(Platform {
                os: "linux".to_owned(),
                architecture: match std::env::consts::ARCH {
                    "x86_64" => "amd64",
                    "aarch64" => "arm64",
                    other => other,
                }
                .to_owned(),
                ..Default::default()
            }),
            ..Default::default()
        })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> Reply<StopSandboxResponse> {
        let sandbox = self.sandbox.clone();
        whole(async move {
            let grace = Duration::from_secs(request.timeout_secs.into());
            sandbox.stop(&request.sandbox_id, grace).await
        })
        .await?;
        Ok(StopSandboxResponse::new())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> Reply<WaitSandboxResponse> {
        let exit = self.sandbox.wait(&request.sandbox_id).await?;
        Ok(WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: MessageField::some(exit.at.into()),
            ..Default::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> Reply<SandboxStatusResponse> {
        let status = self.sandbox.status(&request.sandbox_id)?;
        let runs = status.started.is_some() && status.exit.is_none();
        let mut info = HashMap::new();
        if request.verbose {
            // Under the name by which `crictl inspectp` looks for it.
            info.insert("info".to_owned(), self.tasks.about_pod().await.to_string());
        }
        Ok(SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: status.started.map_or(0, |started| started.pid),
            state: if runs { READY } else { NOT_READY }.to_owned(),
            info,
            created_at: status
                .started
                .map(|started| MessageField::some(started.at.into()))
                .unwrap_or_default(),
            exited_at: status
                .exit
                .map(|exit| MessageField::some(exit.at.into()))
                .unwrap_or_default(),
            ..Default::default()
        })
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> Reply<PingResponse> {
        self.sandbox.ping(&request.sandbox_id)?;
        Ok(PingResponse::new())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> Reply<ShutdownSandboxResponse> {
        self.sandbox.check(&request.sandbox_id)?;
        let tasks = self.tasks.clone();
        whole(async move {
            tasks.shut_down().await;
            Ok(())
        })
        .await?;
        Ok(ShutdownSandboxResponse::new())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> Reply<SandboxMetricsResponse> {
        let stats = self.sandbox.stats(&request.sandbox_id).await?;
        let mut response = SandboxMetricsResponse::new();
        // The crate does not export the message's type.
        let metric = response.metrics.mut_or_insert_default();
        metric.timestamp = MessageField::some(Timestamp::now());
        metric.id = request.sandbox_id;
        metric.data = MessageField::some(metrics::encode(&stats)?);
        Ok(response)
    }
}
