//! A running sandbox and the containers in it.

mod boot;
mod container;
mod devices;
mod events;
mod figures;
mod network;
mod process;
mod propagation;
mod publications;
mod resolver;
mod sizing;
mod trouble;
mod types;
mod volumes;

use std::{
    collections::HashMap,
    io,
    path::PathBuf,
    sync::{Arc, Mutex as StdMutex, PoisonError, atomic::AtomicU32},
    time::Duration,
};

use caisson_protocol::agent::{HelloResponse, ShutdownRequest};
use caisson_vmm_api::{Description, Request, Response};
use tokio::sync::{Mutex, mpsc};

pub use network::NetworkNamespace;
pub use types::{
    ContainerSpec, Created, Event, Exit, ProcessInfo, RootfsSource, SandboxSpec, State, Status,
    Stdio, Streams, Upper,
};

use crate::{
    agent::Agent,
    config::Config,
    deadline::scaled,
    error::{AgentErrorKind, Error},
    network::{InterfaceLimits, Network},
    record::{self, Record, Resource},
    shares::Shares,
    size::Room,
    vmm::{Gone, Vmm},
    watches::Watches,
};
use boot::{Assets, Booted, boot};
use events::forward_events;
use figures::BootFigures;
use publications::Publication;
use sizing::Sizing;
use volumes::{Attached, Volume};

/// Events that may wait for the sandbox's owner.
const EVENT_QUEUE: usize = 256;

/// What a container has of the sandbox's devices and shares.
#[derive(Debug, Default)]
struct Holdings {
    /// Slots of its own disks.
    slots: Vec<u32>,
    /// Block devices of the host, which others may have, too.
    volumes: Vec<Volume>,
    /// Entries of the share.
    shares: Vec<u32>,
    /// Of the mounts below those entries.
    followers: Vec<propagation::Follower>,
    /// Copies of published volumes.
    published: Vec<Publication>,
    /// File of the host that is its resolv.conf.
    resolv_conf: Option<PathBuf>,
}

/// A running sandbox.
pub struct Sandbox {
    config: Config,
    vmm: Arc<Vmm>,
    agent: Agent,
    record: StdMutex<Record>,
    network: Option<Mutex<Network>>,
    /// Of each of its interfaces.
    limits: InterfaceLimits,
    /// With which the guest has booted.
    vcpus: u8,
    /// See [`SandboxSpec::shares_directories`].
    shares_directories: bool,
    shares: Mutex<Option<Arc<Shares>>>,
    containers: StdMutex<HashMap<String, Holdings>>,
    /// Block devices of the host that the guest has.
    volumes: Mutex<HashMap<Volume, Attached>>,
    /// Number of the next published volume.
    publications: AtomicU32,
    /// Of the directories that they are copies of.
    watches: Watches,
    vsock: PathBuf,
    hello: HelloResponse,
    sizing: Sizing,
    boot: BootFigures,
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
        let room = Room::of(config, spec.vcpus, spec.memory_mib)?;
        let assets = Assets::open(config)?;
        let mut record = Record::create(&config.run_dir, &spec.id)?;
        let booted = async {
            let booted = boot(config, &spec, room, &assets, &mut record).await?;
            let network = spec.network.open(booted.vmm.pid(), &booted.vsock).await?;
            Ok((booted, network))
        };
        match booted.await {
            Ok((
                Booted {
                    vmm,
                    agent,
                    hello,
                    vsock,
                    sizing,
                    stages,
                },
                network,
            )) => {
                let (sender, receiver) = mpsc::channel(EVENT_QUEUE);
                tokio::spawn(forward_events(agent.clone(), vmm.clone(), sender));
                let sandbox = Self {
                    config: config.clone(),
                    vmm,
                    agent,
                    record: StdMutex::new(record),
                    network: network.map(Mutex::new),
                    limits: InterfaceLimits::of(config).and(&spec.limits),
                    vcpus: room.boot_vcpus,
                    shares_directories: spec.shares_directories,
                    shares: Mutex::new(None),
                    containers: StdMutex::default(),
                    volumes: Mutex::default(),
                    publications: AtomicU32::default(),
                    watches: Watches::default(),
                    vsock,
                    hello,
                    sizing,
                    boot: BootFigures::now(stages),
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

    /// Ends the tasks that follow what the host does to volumes.
    fn follow_no_more(&self) {
        let containers = self.containers.lock();
        let mut containers = containers.unwrap_or_else(PoisonError::into_inner);
        for holdings in containers.values_mut() {
            holdings.followers.clear();
            holdings.published.clear();
        }
    }

    /// Containers that are there.
    fn container_ids(&self) -> Vec<String> {
        let containers = self.containers.lock();
        let containers = containers.unwrap_or_else(PoisonError::into_inner);
        containers.keys().cloned().collect()
    }

    /// The VMM's process id.
    pub fn vmm_pid(&self) -> u32 {
        self.vmm.pid()
    }

    /// Why the VM has gone, if it has.
    pub fn gone(&self) -> Option<Gone> {
        self.vmm.gone()
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
        if let Some(network) = &self.network {
            network.lock().await.release_all().await;
        }
        self.follow_no_more();
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
fn process(pid: u32) -> Option<Resource> {
    record::start_time(pid).map(|start_time| Resource::Process { pid, start_time })
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
pub(crate) async fn blocking<T: Send + 'static>(
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
