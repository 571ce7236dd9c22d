//! The microVM grows with its containers, and gives back when they go.

use std::{collections::HashMap, path::PathBuf, sync::Arc, time::Duration};

use caisson_protocol::agent::{
    OnlineResourcesRequest, SetHugePagesRequest, UpdateContainerRequest,
};
use caisson_vmm_api::{Request, Response};
use oci_spec::runtime::LinuxResources;
use tokio::{sync::Mutex, time::Instant};

use super::{Sandbox, unexpected};
use crate::{
    cgroup,
    config::Config,
    cpuset::CpuSet,
    deadline::scaled,
    error::{AgentErrorKind, Error},
    huge_pages::Pools,
    size::{Limits, Needed, Room},
    spec,
    vmm::Vmm,
};

/// Longest for a guest to plug any memory, and for each GiB of it.
const PLUG_LIMIT: Duration = Duration::from_secs(5);
const PLUG_LIMIT_PER_GIB: Duration = Duration::from_secs(1);

/// How long a guest is watched while it unplugs.
const UNPLUG_LIMIT: Duration = Duration::from_secs(60);

/// Between two looks at what is plugged.
const LOOK: Duration = Duration::from_millis(2);
const SLOW_LOOK: Duration = Duration::from_millis(200);

/// The size of a sandbox's microVM.
pub(super) struct Sizing {
    room: Room,
    host: Host,
    state: Arc<Mutex<State>>,
}

struct State {
    /// Limits of the containers that need anything.
    containers: HashMap<String, Limits>,
    vcpus: u8,
    /// What the guest was last told to have plugged, MiB.
    plugged_mib: u32,
    /// Changes of it.
    generation: u64,
    /// What the guest keeps.
    huge_pages: Pools,
    host_sets: HostSets,
}

/// Processors and memory nodes of the host; None: all.
type HostSets = (Option<CpuSet>, Option<CpuSet>);

/// Limits of the sandbox's processes.
#[derive(Clone)]
struct Host {
    cgroup: Option<PathBuf>,
    overhead_mib: u32,
    overhead_millicpus: u32,
}

impl Host {
    fn limit_memory(&self, guest_mib: u32) {
        let Some(cgroup) = &self.cgroup else { return };
        let mib = u64::from(guest_mib) + u64::from(self.overhead_mib);
        if let Err(error) = cgroup::limit_memory(cgroup, mib) {
            log::warn!(
                "no memory limit on the host ({}): {error}",
                cgroup.display()
            );
        }
    }

    fn limit_cpu(&self, millicpus: u64) {
        let Some(cgroup) = &self.cgroup else { return };
        let millicpus = millicpus.saturating_add(self.overhead_millicpus.into());
        if let Err(error) = cgroup::limit_cpu(cgroup, millicpus) {
            log::warn!("no CPU limit on the host ({}): {error}", cgroup.display());
        }
    }

    fn bind(&self, (cpus, nodes): &HostSets) {
        let Some(cgroup) = &self.cgroup else { return };
        if let Err(error) = cgroup::bind(cgroup, cpus.as_ref(), nodes.as_ref()) {
            log::warn!(
                "not bound to processors of the host ({}): {error}",
                cgroup.display()
            );
        }
    }
}

impl Sizing {
    /// vCPUs that the guest uses.
    pub(super) async fn vcpus(&self) -> u8 {
        self.state.lock().await.vcpus
    }

    /// Of a microVM that has just booted. `cgroup` is where its limits on the host are set.
    pub(super) fn new(config: &Config, room: Room, cgroup: Option<PathBuf>) -> Self {
        let host = Host {
            cgroup,
            overhead_mib: config.host_overhead_mib,
            overhead_millicpus: config.host_overhead_millicpus,
        };
        host.limit_memory(room.boot_mib);
        Self {
            room,
            host,
            state: Arc::new(Mutex::new(State {
                containers: HashMap::new(),
                vcpus: room.boot_vcpus,
                plugged_mib: 0,
                generation: 0,
                huge_pages: Pools::default(),
                host_sets: (None, None),
            })),
        }
    }
}

impl Sandbox {
    /// Makes room for a container; None: it needs none.
    ///
    /// # Errors
    /// The microVM cannot grow so far; it is as it was then.
    pub(super) async fn make_room(&self, id: &str, limits: Option<Limits>) -> Result<(), Error> {
        let Some(limits) = limits else { return Ok(()) };
        let mut state = self.sizing.state.lock().await;
        let mut containers = state.containers.clone();
        if containers.insert(id.to_owned(), limits).is_some() {
            return Err(Error::Agent {
                kind: AgentErrorKind::AlreadyExists,
                message: format!("container {id} exists already"),
            });
        }
        self.fit(&mut state, containers).await
    }

    /// Takes the room of a container that is gone.
    pub(super) async fn take_room(&self, id: &str) {
        let mut state = self.sizing.state.lock().await;
        let mut containers = state.containers.clone();
        if containers.remove(id).is_some()
            && let Err(error) = self.fit(&mut state, containers).await
        {
            log::warn!("the microVM keeps the size it has: {error}");
        }
    }

    /// Changes limits of a container (OCI `linux.resources`). The microVM grows before, or gives
    /// back after.
    ///
    /// # Errors
    /// A limit that cannot be set, or for which the microVM cannot grow; all is as it was then.
    pub async fn update(&self, container: &str, resources_json: Vec<u8>) -> Result<(), Error> {
        let mut resources = serde_json::from_slice(&resources_json).map_err(|error| {
            Error::Invalid(format!("these are no linux.resources of OCI: {error}"))
        })?;
        let mut state = self.sizing.state.lock().await;
        let before = state.containers.clone();
        let Some(old) = before.get(container).cloned() else {
            // One that holds a pod needs no room; of one that is not there the agent tells.
            spec::take_host_sets(&mut resources);
            return self.update_in_guest(container, &resources).await;
        };
        let new = old.updated(&resources)?;
        spec::take_host_sets(&mut resources);
        // Until the guest has taken the new limits, both may be used.
        let during = old.either(&new);
        let with = |limits| {
            let mut containers = before.clone();
            containers.insert(container.to_owned(), limits);
            containers
        };
        self.fit(&mut state, with(during)).await?;
        let updated = self.update_in_guest(container, &resources).await;
        let after = if updated.is_ok() { new } else { old };
        if let Err(error) = self.fit(&mut state, with(after)).await {
            log::warn!("the microVM keeps the size it has: {error}");
        }
        updated
    }

    async fn update_in_guest(
        &self,
        container: &str,
        resources: &LinuxResources,
    ) -> Result<(), Error> {
        let resources_json =
            serde_json::to_vec(resources).map_err(|error| Error::Invalid(error.to_string()))?;
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

    /// Gives the microVM the size for `containers`. After an error it is as before.
    async fn fit(
        &self,
        state: &mut State,
        containers: HashMap<String, Limits>,
    ) -> Result<(), Error> {
        let room = self.sizing.room;
        let needed = room.needed(&self.config, containers.values())?;
        let plugged = room.plugged_mib(needed.memory_mib);
        if plugged > state.plugged_mib {
            self.grow_memory(state, plugged).await?;
        }
        if needed.vcpus > state.vcpus {
            let online = self.bring_online(needed.vcpus).await;
            if let Err(error) = online {
                if plugged > state.plugged_mib {
                    self.shrink_memory(state, state.plugged_mib).await;
                }
                return Err(error);
            }
            state.vcpus = needed.vcpus;
        }
        // In memory that has just come, and before any is asked back.
        if needed.huge_pages != state.huge_pages {
            if let Err(error) = self.keep_huge_pages(&needed.huge_pages).await {
                if let Err(error) = self.keep_huge_pages(&state.huge_pages).await {
                    log::warn!("the guest keeps huge pages that it does not need: {error}");
                }
                if plugged > state.plugged_mib {
                    self.shrink_memory(state, state.plugged_mib).await;
                }
                return Err(error);
            }
            state.huge_pages = needed.huge_pages.clone();
        }
        if plugged < state.plugged_mib {
            self.shrink_memory(state, plugged).await;
        }
        state.plugged_mib = plugged;
        state.containers = containers;
        self.sizing.host.limit_cpu(needed.millicpus);
        let sets = (needed.cpus.clone(), needed.nodes.clone());
        if sets != state.host_sets {
            self.sizing.host.bind(&sets);
            state.host_sets = sets;
        }
        log_size(&needed, room);
        Ok(())
    }

    /// Has the guest plug memory until it is `mib` MiB; what it had before after an error.
    async fn grow_memory(&self, state: &mut State, mib: u32) -> Result<(), Error> {
        state.generation += 1;
        self.sizing
            .host
            .limit_memory(self.sizing.room.boot_mib + mib);
        let limit = scaled(PLUG_LIMIT + PLUG_LIMIT_PER_GIB * (mib >> 10));
        let grown = match set_plugged(&self.vmm, mib).await {
            Ok(()) => tokio::time::timeout(limit, self.wait_plugged(mib))
                .await
                .unwrap_or_else(|_| {
                    Err(Error::Late {
                        what: format!("plug {mib} MiB of memory"),
                        seconds: limit.as_secs(),
                    })
                }),
            Err(error) => Err(error),
        };
        if grown.is_err() {
            self.shrink_memory(state, state.plugged_mib).await;
        }
        grown
    }

    async fn wait_plugged(&self, mib: u32) -> Result<(), Error> {
        while plugged(&self.vmm).await? < mib {
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// Asks the guest to unplug memory until it is `mib` MiB. It does so as far as it can, and as
    /// fast; the limit on the host follows what it has given back.
    async fn shrink_memory(&self, state: &mut State, mib: u32) {
        state.generation += 1;
        if let Err(error) = set_plugged(&self.vmm, mib).await {
            log::warn!("the guest keeps memory that it does not need: {error}");
            return;
        }
        let watch = Watch {
            vmm: self.vmm.clone(),
            host: self.sizing.host.clone(),
            state: self.sizing.state.clone(),
            generation: state.generation,
            boot_mib: self.sizing.room.boot_mib,
            target: mib,
        };
        tokio::spawn(watch.run());
    }

    async fn bring_online(&self, vcpus: u8) -> Result<(), Error> {
        let request = OnlineResourcesRequest {
            cpus: vcpus.into(),
            ..Default::default()
        };
        let response = self
            .agent
            .call("bring vCPUs online", |client, context| async move {
                client.online_resources(context, &request).await
            })
            .await?;
        if response.cpus_online < u32::from(vcpus) {
            return Err(super::lie("did not bring the vCPUs online"));
        }
        Ok(())
    }

    /// Has the guest keep huge pages for its containers.
    async fn keep_huge_pages(&self, pools: &Pools) -> Result<(), Error> {
        let request = SetHugePagesRequest {
            pools: pools.to_proto(),
            ..Default::default()
        };
        self.agent
            .call("keep huge pages", |client, context| async move {
                client.set_huge_pages(context, &request).await
            })
            .await
            .map(drop)
    }
}

/// Follows a guest that unplugs.
struct Watch {
    vmm: Arc<Vmm>,
    host: Host,
    state: Arc<Mutex<State>>,
    generation: u64,
    boot_mib: u32,
    target: u32,
}

impl Watch {
    async fn run(self) {
        let deadline = Instant::now() + scaled(UNPLUG_LIMIT);
        while Instant::now() < deadline {
            {
                let state = self.state.lock().await;
                // Somebody else has set another size, and the limit with it.
                if state.generation != self.generation {
                    return;
                }
                let Ok(plugged) = plugged(&self.vmm).await else {
                    return;
                };
                self.host
                    .limit_memory(self.boot_mib + plugged.max(self.target));
                if plugged <= self.target {
                    return;
                }
            }
            tokio::time::sleep(SLOW_LOOK).await;
        }
        log::info!("the guest has not unplugged all that it was asked to");
    }
}

async fn set_plugged(vmm: &Vmm, mib: u32) -> Result<(), Error> {
    let what = "change the guest's memory";
    match vmm
        .call(what, Request::SetHotplugMemory { mib }, &[])
        .await?
    {
        Response::Done => Ok(()),
        other => Err(unexpected(what, &other)),
    }
}

async fn plugged(vmm: &Vmm) -> Result<u32, Error> {
    match vmm.call("describe itself", Request::Describe, &[]).await? {
        Response::Description(description) => Ok(description.hotplugged_mib),
        other => Err(unexpected("describe itself", &other)),
    }
}

fn log_size(needed: &Needed, room: Room) {
    if needed.memory_mib > room.boot_mib || needed.vcpus > room.boot_vcpus {
        log::info!("{} vCPUs and {} MiB", needed.vcpus, needed.memory_mib);
    }
}
