//! A kubelet's calls: containerd's CRI plugin by gRPC.

use std::{fs, io};

use caisson_tests::{Host, seconds, until};
use hyper_util::rt::TokioIo;
use k8s_cri::v1::{
    ContainerConfig, ContainerMetadata, ContainerStatus, CreateContainerRequest, ExecSyncRequest,
    ExecSyncResponse, ImageSpec, LinuxContainerConfig, LinuxContainerSecurityContext,
    LinuxPodSandboxConfig, LinuxSandboxSecurityContext, ListPodSandboxRequest, NamespaceMode,
    NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PodSandboxState,
    PodSandboxStatusRequest, RemoveContainerRequest, RemovePodSandboxRequest, RunPodSandboxRequest,
    StartContainerRequest, StopContainerRequest, StopPodSandboxRequest,
    runtime_service_client::RuntimeServiceClient,
};
use rustix::process::Signal;
use serde_json::Value;
use tokio::{net::UnixStream, runtime::Runtime};
use tonic::{
    Response, Status,
    transport::{Channel, Endpoint, Uri},
};

use crate::containerd::daemon::{Daemon, IMAGE, Version};

/// State of a container that has ended (`CONTAINER_EXITED`).
const EXITED: i32 = 2;

/// A client of a containerd's CRI, of which a runtime handler is Caisson.
pub struct Cri<'a> {
    pub daemon: Daemon<'a>,
    handler: &'static str,
    runtime: Runtime,
    client: RuntimeServiceClient<Channel>,
}

impl<'a> Cri<'a> {
    /// Takes a daemon, whose own way with pods is that of containers.
    pub fn start(host: &'a Host, version: Version) -> Self {
        Self::with_handler(host, version, "caisson")
    }

    /// Takes a daemon, and runs pods by this handler of [`crate::containerd::config`].
    pub fn with_handler(host: &'a Host, version: Version, handler: &'static str) -> Self {
        let daemon = Daemon::start(host, version);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let client = connect(&daemon, &runtime);
        Self {
            daemon,
            handler,
            runtime,
            client,
        }
    }

    /// Ends the daemon by a signal and starts it anew.
    pub fn restart(&mut self, signal: Signal) {
        self.daemon.end(signal);
        self.daemon.run();
        self.client = connect(&self.daemon, &self.runtime);
    }

    /// One call; a call that takes longer than a kubelet waits is an error.
    pub fn call<T>(
        &self,
        work: impl AsyncFnOnce(RuntimeServiceClient<Channel>) -> Result<Response<T>, Status>,
    ) -> Result<T, Status> {
        let client = self.client.clone();
        self.runtime.block_on(async {
            tokio::time::timeout(seconds(60.0), work(client))
                .await
                .unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer within 60 s")))
                .map(Response::into_inner)
        })
    }

    /// Starts a pod and gives its id.
    #[track_caller]
    pub fn run_pod(&self, config: &PodSandboxConfig) -> String {
        self.try_run_pod(config).unwrap()
    }

    /// Starts a pod, which may be refused.
    pub fn try_run_pod(&self, config: &PodSandboxConfig) -> Result<String, Status> {
        self.try_run_pod_by(self.handler, config)
    }

    /// Starts a pod by another handler.
    pub fn try_run_pod_by(
        &self,
        handler: &str,
        config: &PodSandboxConfig,
    ) -> Result<String, Status> {
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.to_owned(),
        };
        self.call(async |mut client| client.run_pod_sandbox(request).await)
            .map(|answer| answer.pod_sandbox_id)
    }

    /// Whether a pod is there and runs.
    #[track_caller]
    pub fn is_ready(&self, pod: &str) -> bool {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: pod.to_owned(),
            verbose: true,
        };
        let answer = self
            .call(async |mut client| client.pod_sandbox_status(request).await)
            .unwrap();
        answer.status.unwrap().state == PodSandboxState::SandboxReady as i32
    }

    /// A pod's addresses, and the path of its network namespace.
    #[track_caller]
    pub fn network_of(&self, pod: &str) -> (Vec<String>, String) {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: pod.to_owned(),
            verbose: true,
        };
        let answer = self
            .call(async |mut client| client.pod_sandbox_status(request).await)
            .unwrap();
        let info: Value = serde_json::from_str(&answer.info["info"]).unwrap();
        let namespaces = &info["runtimeSpec"]["linux"]["namespaces"];
        let path = namespaces
            .as_array()
            .unwrap()
            .iter()
            .filter(|namespace| namespace["type"] == "network")
            .find_map(|namespace| namespace["path"].as_str())
            .expect("the pod's network namespace has a path")
            .to_owned();
        let network = answer.status.unwrap().network.unwrap();
        let more = network.additional_ips.into_iter().map(|more| more.ip);
        (std::iter::once(network.ip).chain(more).collect(), path)
    }

    /// Creates a container and gives its id.
    pub fn create(
        &self,
        pod: &str,
        pod_config: &PodSandboxConfig,
        config: ContainerConfig,
    ) -> Result<String, Status> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(config),
            sandbox_config: Some(pod_config.clone()),
        };
        self.call(async |mut client| client.create_container(request).await)
            .map(|answer| answer.container_id)
    }

    /// Starts a container.
    pub fn start_container(&self, id: &str) -> Result<(), Status> {
        let request = StartContainerRequest {
            container_id: id.to_owned(),
        };
        self.call(async |mut client| client.start_container(request).await)
            .map(drop)
    }

    /// Creates and starts a container.
    #[track_caller]
    pub fn run(&self, pod: &str, pod_config: &PodSandboxConfig, config: ContainerConfig) -> String {
        let id = self.create(pod, pod_config, config).unwrap();
        self.start_container(&id).unwrap();
        id
    }

    /// A container's status.
    #[track_caller]
    pub fn status(&self, id: &str) -> ContainerStatus {
        let request = k8s_cri::v1::ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose: false,
        };
        self.call(async |mut client| client.container_status(request).await)
            .unwrap()
            .status
            .unwrap()
    }

    /// Waits for a container's end.
    #[track_caller]
    pub fn ended(&self, id: &str) -> ContainerStatus {
        let ended = until(seconds(30.0), || {
            let status = self.status(id);
            (status.state == EXITED).then_some(status)
        });
        ended.unwrap_or_else(|| panic!("{id} has not ended"))
    }

    /// Runs a shell script in a container.
    pub fn exec(&self, id: &str, script: &str, limit: i64) -> Result<ExecSyncResponse, Status> {
        let request = ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: ["sh", "-c", script].map(str::to_owned).to_vec(),
            timeout: limit,
        };
        self.call(async |mut client| client.exec_sync(request).await)
    }

    /// What a shell script that succeeds prints.
    #[track_caller]
    pub fn output(&self, id: &str, script: &str) -> String {
        let answer = self.exec(id, script, 0).unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert_eq!(answer.exit_code, 0, "{script}: {}", text(&answer.stderr));
        text(&answer.stdout)
    }

    /// Stops a container: SIGTERM, and SIGKILL after `grace` seconds.
    #[track_caller]
    pub fn stop(&self, id: &str, grace: i64) {
        let request = StopContainerRequest {
            container_id: id.to_owned(),
            timeout: grace,
        };
        self.call(async |mut client| client.stop_container(request).await)
            .unwrap();
    }

    /// Removes a container.
    #[track_caller]
    pub fn remove(&self, id: &str) {
        let request = RemoveContainerRequest {
            container_id: id.to_owned(),
        };
        self.call(async |mut client| client.remove_container(request).await)
            .unwrap();
    }

    /// Stops and removes a pod.
    #[track_caller]
    pub fn remove_pod(&self, pod: &str) {
        self.try_remove_pod(pod).unwrap();
    }

    /// Stops and removes a pod, which may be refused: containerd needs its time after a shim's death.
    pub fn try_remove_pod(&self, pod: &str) -> Result<(), Status> {
        let request = StopPodSandboxRequest {
            pod_sandbox_id: pod.to_owned(),
        };
        self.call(async |mut client| client.stop_pod_sandbox(request).await)?;
        let request = RemovePodSandboxRequest {
            pod_sandbox_id: pod.to_owned(),
        };
        self.call(async |mut client| client.remove_pod_sandbox(request).await)
            .map(drop)
    }

    /// A pod with a network of its own.
    pub fn pod(&self, name: &str) -> PodSandboxConfig {
        let logs = self.daemon.host.scratch().join("logs").join(name);
        fs::create_dir_all(&logs).unwrap();
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-{name}"),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: logs.display().to_string(),
            linux: Some(LinuxPodSandboxConfig {
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(own_processes()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// The log of a container, without times: `stdout F text`.
    pub fn log(&self, pod: &PodSandboxConfig, name: &str) -> Vec<String> {
        let path = format!("{}/{name}.log", pod.log_directory);
        let text = fs::read_to_string(&path).unwrap_or_default();
        text.lines()
            .filter_map(|line| Some(line.split_once(' ')?.1.to_owned()))
            .collect()
    }
}

impl Drop for Cri<'_> {
    /// After a failure: the pods' networks go with them alone.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let listed = self.call(async |mut client| {
            let all = ListPodSandboxRequest::default();
            client.list_pod_sandbox(all).await
        });
        for pod in listed.map(|listed| listed.items).unwrap_or_default() {
            let _ = self.try_remove_pod(&pod.id);
        }
    }
}

fn connect(daemon: &Daemon<'_>, runtime: &Runtime) -> RuntimeServiceClient<Channel> {
    let address = daemon.address();
    let connector = tower::service_fn(move |_: Uri| {
        let address = address.clone();
        async move { Ok::<_, io::Error>(TokioIo::new(UnixStream::connect(address).await?)) }
    });
    let channel = runtime
        .block_on(Endpoint::from_static("http://cri").connect_with_connector(connector))
        .unwrap();
    RuntimeServiceClient::new(channel)
}

/// A container that runs a shell script.
pub fn container(name: &str, script: &str) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata {
            name: name.to_owned(),
            attempt: 0,
        }),
        image: Some(ImageSpec {
            image: IMAGE.to_owned(),
            ..Default::default()
        }),
        command: ["sh", "-c", script].map(str::to_owned).to_vec(),
        log_path: format!("{name}.log"),
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(own_processes()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// What a kubelet asks for unless a pod shares its processes.
fn own_processes() -> NamespaceOption {
    NamespaceOption {
        pid: NamespaceMode::Container.into(),
        ..Default::default()
    }
}
