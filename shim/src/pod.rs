//! The pod's microVM as [`crate::tasks`] needs it: [`caisson_sandbox::Sandbox`], or a fake.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use caisson_sandbox::figures::Figures;
use caisson_sandbox::{
    Config, ContainerSpec, Created, Error, Event, Gone, ProcessInfo, Sandbox, SandboxSpec,
    StatsResponse, Stdio,
};
use tokio::sync::mpsc;

/// Boots pods.
#[async_trait]
pub trait Pods: Send + Sync {
    /// Boots one; what happens in it arrives at the receiver.
    async fn boot(&self, spec: SandboxSpec)
    -> Result<(Arc<dyn Pod>, mpsc::Receiver<Event>), Error>;

    /// Removes what is left of one whose boot was given up.
    async fn cleanup(&self, id: &str) -> Result<(), Error>;
}

/// A booted pod. The methods are those of [`Sandbox`]; each has a deadline.
#[async_trait]
pub trait Pod: Send + Sync {
    /// See [`Sandbox::vmm_pid`].
    fn vmm_pid(&self) -> u32;
    /// See [`Sandbox::gone`].
    fn gone(&self) -> Option<Gone>;
    /// See [`Sandbox::create_container`].
    async fn create_container(&self, request: ContainerSpec) -> Result<Created, Error>;
    /// See [`Sandbox::create_exec`].
    async fn create_exec(
        &self,
        container: &str,
        exec: &str,
        process_json: Vec<u8>,
        stdio: &Stdio,
    ) -> Result<Created, Error>;
    /// See [`Sandbox::start_process`].
    async fn start_process(&self, container: &str, exec: &str) -> Result<u32, Error>;
    /// See [`Sandbox::delete_process`].
    async fn delete_process(&self, container: &str, exec: &str) -> Result<(), Error>;
    /// See [`Sandbox::signal`].
    async fn signal(
        &self,
        container: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), Error>;
    /// See [`Sandbox::resize`].
    async fn resize(
        &self,
        container: &str,
        exec: &str,
        rows: u32,
        columns: u32,
    ) -> Result<(), Error>;
    /// See [`Sandbox::pause`].
    async fn pause(&self, container: &str, paused: bool) -> Result<(), Error>;
    /// See [`Sandbox::processes`].
    async fn processes(&self, container: &str) -> Result<Vec<ProcessInfo>, Error>;
    /// See [`Sandbox::update`].
    async fn update(&self, container: &str, resources_json: Vec<u8>) -> Result<(), Error>;
    /// See [`Sandbox::stats`].
    async fn stats(&self, container: &str) -> Result<StatsResponse, Error>;
    /// See [`Sandbox::figures`].
    async fn figures(&self, name: &str, manager: &str) -> Result<Figures, Error>;
    /// See [`Sandbox::stop`].
    async fn stop(&self, grace: Duration) -> Result<(), Error>;
}

/// MicroVMs of this host.
pub struct MicroVms {
    config: Config,
}

impl MicroVms {
    /// With the host's configuration.
    pub fn new(config: Config) -> Self {
        Self { config }
    }
}

#[async_trait]
impl Pods for MicroVms {
    async fn boot(
        &self,
        spec: SandboxSpec,
    ) -> Result<(Arc<dyn Pod>, mpsc::Receiver<Event>), Error> {
        let (sandbox, events) = Sandbox::start(&self.config, spec).await?;
        let sandbox = Arc::new(sandbox);
        sandbox.watch_network().await;
        Ok((sandbox, events))
    }

    async fn cleanup(&self, id: &str) -> Result<(), Error> {
        let (config, id) = (self.config.clone(), id.to_owned());
        tokio::task::spawn_blocking(move || caisson_sandbox::cleanup(&config, &id))
            .await
            .unwrap_or_else(|error| {
                Err(Error::Io {
                    what: "clean up".to_owned(),
                    source: std::io::Error::other(error),
                })
            })
    }
}

#[async_trait]
impl Pod for Sandbox {
    fn vmm_pid(&self) -> u32 {
        Sandbox::vmm_pid(self)
    }

    fn gone(&self) -> Option<Gone> {
        Sandbox::gone(self)
    }

    async fn create_container(&self, request: ContainerSpec) -> Result<Created, Error> {
        Sandbox::create_container(self, request).await
    }

    async fn create_exec(
        &self,
        container: &str,
        exec: &str,
        process_json: Vec<u8>,
        stdio: &Stdio,
    ) -> Result<Created, Error> {
        Sandbox::create_exec(self, container, exec, process_json, stdio).await
    }

    async fn start_process(&self, container: &str, exec: &str) -> Result<u32, Error> {
        Sandbox::start_process(self, container, exec).await
    }

    async fn delete_process(&self, container: &str, exec: &str) -> Result<(), Error> {
        Sandbox::delete_process(self, container, exec)
            .await
            .map(drop)
    }

    async fn signal(
        &self,
        container: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), Error> {
        Sandbox::signal(self, container, exec, signal, all).await
    }

    async fn resize(
        &self,
        container: &str,
        exec: &str,
        rows: u32,
        columns: u32,
    ) -> Result<(), Error> {
        Sandbox::resize(self, container, exec, rows, columns).await
    }

    async fn pause(&self, container: &str, paused: bool) -> Result<(), Error> {
        Sandbox::pause(self, container, paused).await
    }

    async fn processes(&self, container: &str) -> Result<Vec<ProcessInfo>, Error> {
        Sandbox::processes(self, container).await
    }

    async fn update(&self, container: &str, resources_json: Vec<u8>) -> Result<(), Error> {
        Sandbox::update(self, container, resources_json).await
    }

    async fn stats(&self, container: &str) -> Result<StatsResponse, Error> {
        Sandbox::stats(self, container).await
    }

    async fn figures(&self, name: &str, manager: &str) -> Result<Figures, Error> {
        Sandbox::figures(self, name, manager).await
    }

    async fn stop(&self, grace: Duration) -> Result<(), Error> {
        Sandbox::stop(self, grace).await
    }
}
