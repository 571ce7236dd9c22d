//! The ttrpc service of the agent: each method hands over to the module that does it.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use async_trait::async_trait;
use caisson_protocol::{
    VERSION,
    agent::{
        BindDeviceRequest, BindDeviceResponse, ConfigureSandboxRequest, ConfigureSandboxResponse,
        CreateContainerRequest, CreateExecRequest, CreateProcessResponse, Empty,
        ForgetFilesRequest, HelloRequest, HelloResponse, ListProcessesResponse, Network,
        NextEventsRequest, NextEventsResponse, OnlineResourcesRequest, OnlineResourcesResponse,
        ProcessExit, ProcessId, PublishedVolume, ResizePtyRequest, SetHugePagesRequest,
        ShutdownRequest, SignalRequest, StartProcessResponse, StateResponse, StatsRequest,
        StatsResponse, UnbindDeviceRequest, UpdateContainerRequest, WithdrawVolumeRequest,
    },
    agent_ttrpc::{Agent, create_agent},
    ports,
};
use tokio::time::Instant;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VMADDR_CID_LOCAL, VsockAddr, VsockListener};
use ttrpc::r#async::{TtrpcContext, transport::Listener};

use crate::{
    boot::Stages,
    cgroup,
    container::{Created, Manager, published, trim},
    device,
    failure::{During, Failure, Result},
    forward, huge_pages, oom, reaper, resolver, resources, sandbox,
};

/// Longest that the first steps of a process may take when the caller names no end.
const FIRST_STEPS_LIMIT: Duration = Duration::from_secs(60);

/// Longest that a poll for events may wait.
const MAX_POLL: Duration = Duration::from_secs(300);

/// Whether a peer is the host. The local CID only exists where there is no VMM: under test.
pub fn is_host(cid: u32) -> bool {
    cid == VMADDR_CID_HOST || (cfg!(debug_assertions) && cid == VMADDR_CID_LOCAL)
}

struct Service {
    manager: Arc<Manager>,
    stages: Stages,
    /// As last configured.
    names: Mutex<sandbox::Names>,
}

impl Service {
    /// Does the whole of `work` even if the caller gives up on it: ttrpc drops a method in its
    /// midst when the caller's deadline is over, which must leave nothing half made.
    async fn whole<T: Send + 'static, F: Future<Output = Result<T>> + Send + 'static>(
        &self,
        work: impl FnOnce(Arc<Manager>) -> F,
    ) -> Result<T> {
        tokio::spawn(work(self.manager.clone()))
            .await
            .unwrap_or_else(|error| Err(Failure::internal(format!("cannot do it: {error}"))))
    }
}

/// A process that has not taken its first steps by then is killed. It is shortly before the caller
/// gives up, which the host has scaled to the machine's speed: so the caller hears why, and finds
/// the process ended.
fn deadline(context: &TtrpcContext) -> Instant {
    let limit = u64::try_from(context.timeout_nano)
        .ok()
        .filter(|nanoseconds| *nanoseconds != 0)
        .map_or(FIRST_STEPS_LIMIT, |nanoseconds| {
            Duration::from_nanos(nanoseconds / 10 * 9)
        });
    Instant::now() + limit
}

/// Serves the host until the machine is reset.
///
/// # Errors
/// A port cannot be listened on.
pub async fn serve(mut stages: Stages) -> Result<()> {
    let manager = Arc::new(Manager::new()?);
    let streams = manager.streams.clone();
    let address = VsockAddr::new(VMADDR_CID_ANY, ports::AGENT);
    let listener =
        VsockListener::bind(address).during(|| format!("listen on vsock port {}", ports::AGENT))?;
    stages.reached("listening");
    let reaper = tokio::spawn(reaper::run(manager.clone()));
    let oom = tokio::spawn(oom::run(manager.clone()));
    tokio::spawn(trim::run(manager.clone()));
    let stdio = tokio::spawn(streams.serve());
    let forward = tokio::spawn(forward::serve());
    let resolver = tokio::spawn(resolver::serve());
    let service = create_agent(Arc::new(Service {
        manager,
        stages,
        names: Mutex::default(),
    }));
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(host_only(listener))
        .register_service(service);
    server
        .start()
        .await
        .map_err(|error| Failure::internal(format!("cannot serve: {error}")))?;
    let ended = tokio::select! {
        result = reaper => result,
        result = oom => result,
        result = stdio => result,
        result = forward => result,
        result = resolver => result,
    };
    match ended {
        Ok(result) => result,
        Err(error) => Err(Failure::internal(format!(
            "a task of the agent failed: {error}"
        ))),
    }
}

/// Connections of the listener, without those that workloads inside the guest open.
fn host_only(listener: VsockListener) -> Listener {
    Listener::new(futures_util::stream::unfold(listener, |listener| async {
        loop {
            match listener.accept().await {
                Ok((stream, peer)) if is_host(peer.cid()) => return Some((Ok(stream), listener)),
                Ok((_, peer)) => log::warn!("refused a connection from CID {}", peer.cid()),
                Err(error) => {
                    log::warn!("cannot accept a connection: {error}");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }))
}

type Reply<T> = ttrpc::Result<T>;

fn process(created: &Created) -> CreateProcessResponse {
    CreateProcessResponse {
        pid: created.pid,
        stdio_token: created.token.to_vec(),
        ..Default::default()
    }
}

#[async_trait]
impl Agent for Service {
    async fn hello(&self, _: &TtrpcContext, request: HelloRequest) -> Reply<HelloResponse> {
        if request.protocol_version != VERSION {
            return Err(Failure::invalid(format!(
                "the host speaks version {} of the agent protocol, this guest image version {VERSION}: \
                 rebuild the guest image",
                request.protocol_version
            ))
            .into());
        }
        Ok(HelloResponse {
            protocol_version: VERSION,
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel_release: rustix::system::uname()
                .release()
                .to_string_lossy()
                .into_owned(),
            stages: self.stages.to_proto(),
            memory_total_bytes: sandbox::memory_total(),
            cpus_online: sandbox::count_cpus(),
            ..Default::default()
        })
    }

    async fn configure_sandbox(
        &self,
        _: &TtrpcContext,
        request: ConfigureSandboxRequest,
    ) -> Reply<ConfigureSandboxResponse> {
        let names = sandbox::Names::of(&request);
        sandbox::configure(&self.manager, &names, &request)?;
        *self.names.lock().unwrap_or_else(PoisonError::into_inner) = names;
        Ok(ConfigureSandboxResponse::default())
    }

    async fn configure_network(&self, _: &TtrpcContext, request: Network) -> Reply<Empty> {
        let names = self.names.lock().unwrap_or_else(PoisonError::into_inner);
        sandbox::configure_network(&names, &request)?;
        Ok(Empty::default())
    }

    async fn bind_device(
        &self,
        _: &TtrpcContext,
        request: BindDeviceRequest,
    ) -> Reply<BindDeviceResponse> {
        let device = device::bind(request.slot, request.expect.as_ref()).await?;
        let (major, minor) = device::numbers(&device)?;
        Ok(BindDeviceResponse {
            device,
            major,
            minor,
            ..Default::default()
        })
    }

    async fn unbind_device(&self, _: &TtrpcContext, request: UnbindDeviceRequest) -> Reply<Empty> {
        device::unbind(request.slot)?;
        Ok(Empty::default())
    }

    async fn publish_volume(&self, _: &TtrpcContext, volume: PublishedVolume) -> Reply<Empty> {
        published::publish(&volume)?;
        Ok(Empty::default())
    }

    async fn withdraw_volume(
        &self,
        _: &TtrpcContext,
        request: WithdrawVolumeRequest,
    ) -> Reply<Empty> {
        published::withdraw(request.number)?;
        Ok(Empty::default())
    }

    async fn forget_files(&self, _: &TtrpcContext, request: ForgetFilesRequest) -> Reply<Empty> {
        // The file server is asked meanwhile.
        tokio::task::spawn_blocking(move || sandbox::forget_files(&request.entries))
            .await
            .map_err(|error| Failure::internal(format!("cannot forget files: {error}")))??;
        Ok(Empty::default())
    }

    async fn online_resources(
        &self,
        _: &TtrpcContext,
        request: OnlineResourcesRequest,
    ) -> Reply<OnlineResourcesResponse> {
        Ok(OnlineResourcesResponse {
            cpus_online: sandbox::online_cpus(request.cpus)?,
            memory_total_bytes: sandbox::memory_total(),
            ..Default::default()
        })
    }

    async fn set_huge_pages(&self, _: &TtrpcContext, request: SetHugePagesRequest) -> Reply<Empty> {
        huge_pages::keep(&request.pools).await?;
        Ok(Empty::default())
    }

    async fn create_container(
        &self,
        context: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> Reply<CreateProcessResponse> {
        let deadline = deadline(context);
        // Memory that the container needs has been added before.
        sandbox::allow_threads();
        let created = self
            .whole(|manager| async move { manager.create(request, deadline).await })
            .await?;
        Ok(process(&created))
    }

    async fn start_container(
        &self,
        context: &TtrpcContext,
        request: ProcessId,
    ) -> Reply<StartProcessResponse> {
        let deadline = deadline(context);
        let pid = self
            .whole(
                |manager| async move { manager.start(&request.container_id, "", deadline).await },
            )
            .await?;
        Ok(StartProcessResponse {
            pid,
            ..Default::default()
        })
    }

    async fn delete_container(&self, _: &TtrpcContext, request: ProcessId) -> Reply<ProcessExit> {
        Ok(self
            .whole(|manager| async move { manager.delete(&request.container_id).await })
            .await?)
    }

    async fn create_exec(
        &self,
        _: &TtrpcContext,
        request: CreateExecRequest,
    ) -> Reply<CreateProcessResponse> {
        Ok(process(&self.manager.create_exec(request)?))
    }

    async fn start_exec(
        &self,
        context: &TtrpcContext,
        request: ProcessId,
    ) -> Reply<StartProcessResponse> {
        let deadline = deadline(context);
        let pid = self
            .whole(|manager| async move {
                manager
                    .start(&request.container_id, &request.exec_id, deadline)
                    .await
            })
            .await?;
        Ok(StartProcessResponse {
            pid,
            ..Default::default()
        })
    }

    async fn delete_exec(&self, _: &TtrpcContext, request: ProcessId) -> Reply<ProcessExit> {
        Ok(self
            .manager
            .delete_exec(&request.container_id, &request.exec_id)?)
    }

    async fn signal_process(&self, _: &TtrpcContext, request: SignalRequest) -> Reply<Empty> {
        self.manager.signal(&request)?;
        Ok(Empty::default())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Reply<Empty> {
        self.manager.resize(&request)?;
        Ok(Empty::default())
    }

    async fn close_stdin(&self, _: &TtrpcContext, request: ProcessId) -> Reply<Empty> {
        self.manager
            .close_stdin(&request.container_id, &request.exec_id)?;
        Ok(Empty::default())
    }

    async fn list_processes(
        &self,
        _: &TtrpcContext,
        request: ProcessId,
    ) -> Reply<ListProcessesResponse> {
        Ok(ListProcessesResponse {
            processes: self.manager.processes(&request.container_id)?,
            ..Default::default()
        })
    }

    async fn state(&self, _: &TtrpcContext, request: ProcessId) -> Reply<StateResponse> {
        Ok(self
            .manager
            .state(&request.container_id, &request.exec_id)?)
    }

    async fn pause_container(&self, _: &TtrpcContext, request: ProcessId) -> Reply<Empty> {
        self.whole(|manager| async move { manager.pause(&request.container_id, true).await })
            .await?;
        Ok(Empty::default())
    }

    async fn resume_container(&self, _: &TtrpcContext, request: ProcessId) -> Reply<Empty> {
        self.whole(|manager| async move { manager.pause(&request.container_id, false).await })
            .await?;
        Ok(Empty::default())
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> Reply<Empty> {
        sandbox::allow_threads();
        self.manager
            .update(&request.container_id, &request.resources_json)?;
        Ok(Empty::default())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Reply<StatsResponse> {
        if request.container_id.is_empty() {
            return Ok(resources::stats(&cgroup::of_containers()));
        }
        Ok(self.manager.stats(&request.container_id)?)
    }

    async fn next_events(
        &self,
        _: &TtrpcContext,
        request: NextEventsRequest,
    ) -> Reply<NextEventsResponse> {
        let wait = Duration::from_millis(request.wait_ms.into()).min(MAX_POLL);
        let events = self
            .manager
            .events
            .after(request.after_sequence, wait)
            .await;
        Ok(NextEventsResponse {
            events,
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> Reply<Empty> {
        let grace = Duration::from_millis(request.grace_ms.into());
        self.whole(|manager| async move {
            sandbox::shutdown(&manager, grace).await?;
            // The answer goes first.
            tokio::spawn(async {
                tokio::time::sleep(Duration::from_millis(20)).await;
                if let Err(failure) = sandbox::power_off() {
                    log::error!("{failure}");
                }
            });
            Ok(())
        })
        .await?;
        Ok(Empty::default())
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::Notify;

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn what_a_caller_gives_up_is_done_to_its_end() {
        let service = Service {
            manager: Arc::new(Manager::new().unwrap()),
            stages: Stages::default(),
            names: Mutex::default(),
        };
        let (begun, go_on, done) = <(Arc<Notify>, Arc<Notify>, Arc<Notify>)>::default();
        let work = service.whole(|_| {
            let (begun, go_on, done) = (begun.clone(), go_on.clone(), done.clone());
            async move {
                begun.notify_one();
                go_on.notified().await;
                done.notify_one();
                Ok(())
            }
        });
        tokio::select! {
            _ = work => panic!("it cannot be done yet"),
            () = begun.notified() => {}
        }
        go_on.notify_one();
        done.notified().await;
    }
}
