//! The pod as containerd's sandbox API has it (`sandboxer = "shim"`): a microVM that is booted for
//! no container, and whose life is not that of its containers.
//!
//! [`config`] reads what the caller wants, [`service`] is the ttrpc side.

mod config;
mod service;

#[cfg(test)]
mod tests;

use std::{
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use caisson_sandbox::{Config, SandboxSpec, StatsResponse};
use containerd_shim_protos::protobuf::well_known_types::any::Any;

pub use service::Service;

use self::config::PodSandboxConfig;
use crate::{error::Error, process::Exit, start::read_spec, tasks::Tasks};

/// A pod's sandbox.
pub struct Sandbox {
    config: Config,
    tasks: Arc<Tasks>,
    life: Mutex<Life>,
}

/// What was asked for, until it is there.
#[derive(Default)]
enum Life {
    #[default]
    None,
    Created(Box<SandboxSpec>),
    Starting,
    Started(Started),
}

/// Of a sandbox that has been started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Started {
    /// Process of the host that is its machine.
    pub pid: u32,
    /// When.
    pub at: SystemTime,
}

/// What `SandboxStatus` tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Status {
    /// Once it has been started.
    pub started: Option<Started>,
    /// Once its machine has ended.
    pub exit: Option<Exit>,
}

impl Sandbox {
    /// None yet. Its containers are `tasks`.
    pub fn new(config: Config, tasks: Arc<Tasks>) -> Self {
        Self {
            config,
            tasks,
            life: Mutex::default(),
        }
    }

    fn life(&self) -> MutexGuard<'_, Life> {
        self.life.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses every name but the sandbox's own.
    fn check(&self, id: &str) -> Result<(), Error> {
        if self.tasks.is_pod(id) {
            Ok(())
        } else {
            Err(Error::NotFound(format!("no such sandbox: {id}")))
        }
    }

    /// Registers what is to be started: what CRI's `options` say or, where there are none, the
    /// specification in the bundle, if there is one.
    ///
    /// # Errors
    /// There is one, or it cannot be had.
    pub fn create(
        &self,
        id: &str,
        bundle: &Path,
        options: Option<&Any>,
        network: &str,
    ) -> Result<(), Error> {
        self.check(id)?;
        let spec = match (
            options.filter(|any| !any.type_url.is_empty()),
            read_spec(bundle)?,
        ) {
            (None, Some(spec)) => self.tasks.sandbox_of(&spec, true)?,
            (options, _) => PodSandboxConfig::of(options)?.sandbox(
                &self.config,
                self.tasks.sandbox_name().to_owned(),
                network,
            )?,
        };
        let mut life = self.life();
        if !matches!(*life, Life::None) || !self.tasks.hold() {
            return Err(Error::AlreadyExists(format!("sandbox {id} exists already")));
        }
        *life = Life::Created(Box::new(spec));
        Ok(())
    }

    /// Boots its machine.
    ///
    /// # Errors
    /// There is none, or it has been started, or it cannot boot.
    pub async fn start(&self, id: &str) -> Result<Started, Error> {
        self.check(id)?;
        let spec = {
            let mut life = self.life();
            match std::mem::replace(&mut *life, Life::Starting) {
                Life::Created(spec) => spec,
                Life::None => {
                    *life = Life::None;
                    return Err(Error::NotFound(format!("no such sandbox: {id}")));
                }
                other => {
                    *life = other;
                    return Err(Error::FailedPrecondition(format!(
                        "sandbox {id} was started already"
                    )));
                }
            }
        };
        let pod = self.tasks.boot(*spec).await?;
        let started = Started {
            pid: pod.vmm_pid(),
            at: SystemTime::now(),
        };
        *self.life() = Life::Started(started);
        Ok(started)
    }

    /// How it is.
    ///
    /// # Errors
    /// There is none.
    pub fn status(&self, id: &str) -> Result<Status, Error> {
        self.check(id)?;
        let started = match *self.life() {
            Life::None => return Err(Error::NotFound(format!("no such sandbox: {id}"))),
            Life::Started(started) => Some(started),
            Life::Created(_) | Life::Starting => None,
        };
        Ok(Status {
            started,
            exit: self.tasks.machine_end(),
        })
    }

    /// Whether its machine lives.
    ///
    /// # Errors
    /// It does not.
    pub fn ping(&self, id: &str) -> Result<(), Error> {
        let status = self.status(id)?;
        if status.started.is_some() && status.exit.is_none() {
            Ok(())
        } else {
            Err(Error::FailedPrecondition(format!(
                "sandbox {id} does not run"
            )))
        }
    }

    /// Waits for its machine's end.
    ///
    /// # Errors
    /// There is none.
    pub async fn wait(&self, id: &str) -> Result<Exit, Error> {
        self.status(id)?;
        self.tasks.wait_machine().await
    }

    /// Ends its machine and removes all that is of it on the host; its containers have ended then.
    /// They get SIGTERM and `grace` to end when it is not zero. Can be repeated.
    ///
    /// # Errors
    /// There is none.
    pub async fn stop(&self, id: &str, grace: Duration) -> Result<(), Error> {
        self.status(id)?;
        self.tasks.stop_machine(grace).await;
        Ok(())
    }

    /// What its containers use together, with what the guest itself does.
    ///
    /// # Errors
    /// It does not run.
    pub async fn stats(&self, id: &str) -> Result<StatsResponse, Error> {
        self.ping(id)?;
        self.tasks.pod_stats().await
    }
}
