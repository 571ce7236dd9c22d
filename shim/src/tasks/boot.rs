//! The pod's microVM, which boots with the first task, or before there is any.

use std::sync::Arc;

use caisson_sandbox::{
    InterfaceLimits, NetworkNamespace, RootfsSource, SandboxSpec, Size, cgroup_parent, pod_of,
};
use oci_spec::runtime::{LinuxNamespaceType, Spec};

use super::Tasks;
use crate::{error::Error, figures, pod::Pod};

impl Tasks {
    /// The pod, booted for the first container.
    pub(super) async fn booted(
        self: &Arc<Self>,
        spec: &Spec,
        rootfs: &RootfsSource,
    ) -> Result<Arc<dyn Pod>, Error> {
        // What a pod's later containers want is not known yet.
        let shares = pod_of(spec).is_some() || rootfs.shares_directories(spec);
        self.pod_or(|| self.sandbox_of(spec, shares)).await
    }

    /// The sandbox that a specification asks for: of a container, or of the pod itself.
    ///
    /// # Errors
    /// It wants the host's network, or limits that are none.
    pub fn sandbox_of(&self, spec: &Spec, shares_directories: bool) -> Result<SandboxSpec, Error> {
        let size = Size::of(&self.config, spec);
        let linux = spec.linux().as_ref();
        let cgroups_path = linux.and_then(|linux| linux.cgroups_path().as_ref());
        Ok(SandboxSpec {
            id: self.identity.sandbox.clone(),
            hostname: spec.hostname().clone().unwrap_or_default(),
            vcpus: size.vcpus,
            memory_mib: size.memory_mib,
            cgroup_parent: cgroups_path.and_then(|path| cgroup_parent(path)),
            network: network_namespace(spec)?,
            dns_servers: words(spec, "caisson.dns.servers"),
            dns_searches: words(spec, "caisson.dns.searches"),
            dns_options: words(spec, "caisson.dns.options"),
            extra_hosts: annotation(spec, "caisson.hosts")
                .lines()
                .map(str::to_owned)
                .collect(),
            limits: spec.annotations().as_ref().map_or_else(
                || Ok(InterfaceLimits::default()),
                InterfaceLimits::of_annotations,
            )?,
            shares_directories,
            ..Default::default()
        })
    }

    /// The pod, booted for no container.
    ///
    /// # Errors
    /// It cannot boot; nothing is left on the host then.
    pub async fn boot(self: &Arc<Self>, request: SandboxSpec) -> Result<Arc<dyn Pod>, Error> {
        self.pod_or(|| Ok(request)).await
    }

    /// The pod; one that `request` asks for when there is none.
    async fn pod_or(
        self: &Arc<Self>,
        request: impl FnOnce() -> Result<SandboxSpec, Error>,
    ) -> Result<Arc<dyn Pod>, Error> {
        let mut place = self.pod.lock().await;
        if *self.stopping.borrow() {
            return Err(Error::Stopping);
        }
        if let Some(pod) = place.as_ref() {
            return match pod.gone() {
                None => Ok(pod.clone()),
                Some(gone) => Err(caisson_sandbox::Error::Gone(gone).into()),
            };
        }
        let request = request()?;
        let mut stopping = self.stopping.subscribe();
        let booted = tokio::select! {
            booted = self.pods.boot(request) => Some(booted?),
            _ = stopping.wait_for(|stopping| *stopping) => None,
        };
        let Some((pod, events)) = booted else {
            // Given up on its way, it has left what its record tells.
            self.pods.cleanup(&self.identity.sandbox).await?;
            return Err(Error::Stopping);
        };
        *place = Some(pod.clone());
        let path = caisson_sandbox::figures::socket(&self.config, &self.identity.sandbox);
        let name = (
            self.identity.sandbox.clone(),
            self.identity.namespace.clone(),
        );
        if let Err(error) = figures::serve(&pod, &path, name) {
            log::warn!("the pod's figures are told to nobody: {error}");
        }
        tokio::spawn(self.clone().follow(events));
        Ok(pod)
    }
}

/// Of a client that does not mount resolv.conf and hosts from the host: the command line.
fn annotation<'a>(spec: &'a Spec, name: &str) -> &'a str {
    let annotations = spec.annotations().as_ref();
    annotations
        .and_then(|annotations| annotations.get(name))
        .map(String::as_str)
        .unwrap_or_default()
}

fn words(spec: &Spec, name: &str) -> Vec<String> {
    annotation(spec, name)
        .split_whitespace()
        .map(str::to_owned)
        .collect()
}

/// Where the pod's interfaces are, as its first container says.
fn network_namespace(spec: &Spec) -> Result<NetworkNamespace, Error> {
    let namespaces = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.namespaces().as_ref());
    let network = namespaces
        .into_iter()
        .flatten()
        .find(|namespace| namespace.typ() == LinuxNamespaceType::Network);
    match network {
        Some(namespace) => Ok(match namespace.path() {
            Some(path) => NetworkNamespace::Path(path.clone()),
            None => NetworkNamespace::Vmm,
        }),
        None => Err(caisson_sandbox::Error::Unsupported(
            "the container wants the host's network: a microVM has a network of its own, so run it with \
             another runtime, or without host networking".to_owned()).into()),
    }
}
