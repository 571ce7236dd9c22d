//! An agent without a guest: it runs in the fake VMM's process, behind the VMM's vsock.

use std::{
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use caisson_protocol::{
    VERSION,
    agent::{
        BindDeviceRequest, BindDeviceResponse, ConfigureSandboxRequest, ConfigureSandboxResponse,
        CreateContainerRequest, CreateProcessResponse, Empty, HelloRequest, HelloResponse,
        NextEventsRequest, NextEventsResponse, OnlineResourcesRequest, OnlineResourcesResponse,
        ProcessExit, ProcessId, SetHugePagesRequest, UnbindDeviceRequest, UpdateContainerRequest,
        bind_device_request::Expect,
    },
    agent_ttrpc::{Agent, create_agent},
    ports,
    stdio::TOKEN_LEN,
};
use ttrpc::r#async::{TtrpcContext, transport::Listener};

use crate::vmm::note;

type Reply<T> = ttrpc::Result<T>;

fn refuse<T>(code: ttrpc::Code, message: &str) -> Reply<T> {
    Err(ttrpc::Error::RpcStatus(ttrpc::get_status(
        code,
        message.to_owned(),
    )))
}

struct Fake {
    behaviour: String,
    directory: PathBuf,
    cpus: AtomicU32,
    deletions: AtomicU32,
}

/// Serves the agent's port until the process ends.
pub fn run(behaviour: &str, directory: PathBuf, listener: UnixListener, boot_cpus: u32) {
    let fake = Fake {
        behaviour: behaviour.to_owned(),
        directory,
        cpus: AtomicU32::new(boot_cpus),
        deletions: AtomicU32::new(0),
    };
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(serve(fake, listener));
}

async fn serve(fake: Fake, listener: UnixListener) {
    let (sender, receiver) = tokio::sync::mpsc::channel::<UnixStream>(8);
    let behaviour = fake.behaviour.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let stream = stream.unwrap();
            if let Some(stream) = greet(&behaviour, stream) {
                sender.blocking_send(stream).unwrap();
            }
        }
    });
    let streams = futures_util::stream::unfold(receiver, |mut receiver| async {
        let stream = receiver.recv().await?;
        stream.set_nonblocking(true).unwrap();
        Some((tokio::net::UnixStream::from_std(stream), receiver))
    });
    let mut server = ttrpc::r#async::Server::new()
        .add_listener(Listener::new(streams))
        .register_service(create_agent(Arc::new(fake)));
    server.start().await.unwrap();
    std::future::pending::<()>().await;
}

/// What the VMM does with a new connection; None: it is not for the agent.
fn greet(behaviour: &str, mut stream: UnixStream) -> Option<UnixStream> {
    let mut line = Vec::new();
    let mut byte = [0];
    while line.last() != Some(&b'\n') {
        stream.read_exact(&mut byte).ok()?;
        line.push(byte[0]);
    }
    let keep = |stream: UnixStream| {
        std::mem::forget(stream);
        None
    };
    match behaviour {
        "guest-deaf" => return keep(stream),
        "guest-refuses" => return None,
        "guest-endless" => {
            let _ = stream.write_all(&[b'x'; 4096]);
            return keep(stream);
        }
        _ => {}
    }
    stream.write_all(b"OK 1024\n").ok()?;
    if behaviour == "agent-garbage" {
        // A ttrpc header that promises 4 GiB, and no more.
        let _ = stream.write_all(&[0xFF; 64]);
        return keep(stream);
    }
    (line == format!("CONNECT {}\n", ports::AGENT).as_bytes()).then_some(stream)
}

impl Fake {
    fn is(&self, behaviour: &str) -> bool {
        self.behaviour == behaviour
    }

    fn note(&self, line: &str) {
        note(&self.directory, line);
    }
}

#[async_trait]
impl Agent for Fake {
    async fn hello(&self, _: &TtrpcContext, _: HelloRequest) -> Reply<HelloResponse> {
        if self.is("agent-older") {
            return refuse(ttrpc::Code::INVALID_ARGUMENT, "another version");
        }
        Ok(HelloResponse {
            protocol_version: VERSION,
            cpus_online: self.cpus.load(Ordering::Relaxed),
            ..Default::default()
        })
    }

    async fn configure_sandbox(
        &self,
        _: &TtrpcContext,
        _: ConfigureSandboxRequest,
    ) -> Reply<ConfigureSandboxResponse> {
        match self.behaviour.as_str() {
            "dies-at-configure" => std::process::exit(5),
            "configure-hangs" => std::future::pending().await,
            "configure-refused" => {
                refuse(ttrpc::Code::INTERNAL, &"\x1b[2Jbad \r\n".repeat(100_000))
            }
            _ => Ok(ConfigureSandboxResponse::default()),
        }
    }

    async fn bind_device(
        &self,
        _: &TtrpcContext,
        request: BindDeviceRequest,
    ) -> Reply<BindDeviceResponse> {
        match &request.expect {
            Some(Expect::FsTag(_)) if self.is("never-binds") => {
                return refuse(ttrpc::Code::NOT_FOUND, "no such device");
            }
            Some(Expect::BlockSerial(_)) if self.is("disk-elsewhere") => {
                return Ok(BindDeviceResponse {
                    device: "/dev/../proc/1/mem".to_owned(),
                    ..Default::default()
                });
            }
            _ => {}
        }
        Ok(BindDeviceResponse {
            device: "/dev/vdb".to_owned(),
            ..Default::default()
        })
    }

    async fn unbind_device(&self, _: &TtrpcContext, _: UnbindDeviceRequest) -> Reply<Empty> {
        Ok(Empty::default())
    }

    async fn set_huge_pages(&self, _: &TtrpcContext, request: SetHugePagesRequest) -> Reply<Empty> {
        let pools = request.pools.iter();
        let told: Vec<String> = pools
            .map(|pool| format!("{}x{}", pool.pages, pool.page_bytes))
            .collect();
        self.note(&format!("huge pages {}", told.join(" ")));
        if self.is("no-huge-pages") && !request.pools.is_empty() {
            return refuse(ttrpc::Code::FAILED_PRECONDITION, "no room");
        }
        Ok(Empty::default())
    }

    async fn create_container(
        &self,
        _: &TtrpcContext,
        request: CreateContainerRequest,
    ) -> Reply<CreateProcessResponse> {
        let spec: oci_spec::runtime::Spec = serde_json::from_slice(&request.spec_json).unwrap();
        for mount in spec.mounts().iter().flatten() {
            let source = mount.source().clone().unwrap_or_default();
            self.note(&format!("mount {}", source.display()));
        }
        self.note(&format!("create {}", request.container_id));
        match self.behaviour.as_str() {
            "dies-at-create" => std::process::exit(6),
            "create-late" => std::future::pending().await,
            "create-twice" => return refuse(ttrpc::Code::ALREADY_EXISTS, "there is one"),
            "create-refused" => return refuse(ttrpc::Code::INVALID_ARGUMENT, "not such a one"),
            _ => {}
        }
        let short = usize::from(self.is("short-token"));
        Ok(CreateProcessResponse {
            pid: 2,
            stdio_token: vec![1; TOKEN_LEN - short],
            ..Default::default()
        })
    }

    async fn delete_container(&self, _: &TtrpcContext, request: ProcessId) -> Reply<ProcessExit> {
        // One that is late is not there at once.
        if self.is("create-late") && self.deletions.fetch_add(1, Ordering::Relaxed) == 0 {
            return refuse(ttrpc::Code::NOT_FOUND, "no such container");
        }
        self.note(&format!("delete {}", request.container_id));
        Ok(ProcessExit::default())
    }

    async fn update_container(
        &self,
        _: &TtrpcContext,
        request: UpdateContainerRequest,
    ) -> Reply<Empty> {
        self.note(&format!("update {}", request.container_id));
        if self.is("update-refused") {
            return refuse(ttrpc::Code::INVALID_ARGUMENT, "no such limit");
        }
        Ok(Empty::default())
    }

    async fn online_resources(
        &self,
        _: &TtrpcContext,
        request: OnlineResourcesRequest,
    ) -> Reply<OnlineResourcesResponse> {
        self.note(&format!("online {} vCPUs", request.cpus));
        let cpus = self.cpus.fetch_max(request.cpus, Ordering::Relaxed);
        Ok(OnlineResourcesResponse {
            cpus_online: cpus.max(request.cpus),
            ..Default::default()
        })
    }

    async fn next_events(
        &self,
        _: &TtrpcContext,
        _: NextEventsRequest,
    ) -> Reply<NextEventsResponse> {
        if self.is("events-refused") {
            return refuse(ttrpc::Code::INTERNAL, "nothing to tell");
        }
        tokio::time::sleep(Duration::from_secs(60)).await;
        Ok(NextEventsResponse::default())
    }
}
