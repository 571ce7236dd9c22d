//! Containers and execs come to be.

use std::{collections::HashMap, os::fd::OwnedFd, sync::Arc};

use caisson_protocol::agent::{self, StdioRequest};
use oci_spec::runtime::{Process as ProcessSpec, Spec};
use serde::Deserialize;
use tokio::time::Instant;

use super::{
    Created, Layer, Manager, Rootfs, Upper, init,
    request::{ContainerRequest, Request},
    spawn,
    table::{Container, Pending, Process, State},
};
use crate::{
    cgroup::Cgroup,
    failure::{During, Failure, Kind, Result},
    huge_pages,
    stdio::Token,
};

/// Annotation with "USER[:GROUP]" for a client that cannot see the image's passwd file.
const USER_ANNOTATION: &str = "caisson.user";

impl Manager {
    /// Makes a container whose first process waits to execute its program.
    ///
    /// # Errors
    /// It exists, its specification is not supported, or a step failed, or was not done at
    /// `deadline`; nothing is left then.
    pub async fn create(
        &self,
        request: agent::CreateContainerRequest,
        deadline: Instant,
    ) -> Result<Created> {
        let id = request.container_id;
        check_id("container", &id)?;
        let spec: Spec = serde_json::from_slice(&request.spec_json).map_err(|error| {
            Failure::invalid(format!("malformed container specification: {error}"))
        })?;
        let rootfs = rootfs_of(request.rootfs.into_option())?;
        let writable_layer = match &rootfs.upper {
            Upper::Ext4(device) => Some(device.clone()),
            _ => None,
        };
        if self.table().containers.contains_key(&id) {
            return Err(Failure::new(
                Kind::AlreadyExists,
                format!("container {id} exists already"),
            ));
        }
        let pid_namespace_of = request
            .join_pod_pid_namespace
            .then(|| self.table().pid_namespace_of_pod())
            .transpose()?;
        huge_pages::make(&request.huge_directories)?;
        let linux = spec.linux().as_ref();
        let limits = linux.and_then(|linux| linux.resources().clone());
        let cgroup = Arc::new(Cgroup::create(&id, limits.as_ref())?);
        if let Err(failure) = self
            .oom_watch
            .add(&cgroup.path().join("memory.events"), &id)
        {
            log::warn!("container {id}: {failure}");
        }
        let stdio = request.stdio.unwrap_or_default();
        let seccomp = linux.and_then(|linux| linux.seccomp().clone());
        let oom_score = init::oom_score(&spec);
        let user = spec
            .annotations()
            .as_ref()
            .and_then(|annotations| annotations.get(USER_ANNOTATION).cloned());
        let request = Request::Container(Box::new(ContainerRequest {
            id: id.clone(),
            spec,
            rootfs,
            pod_files: request.bind_pod_files,
            pid_namespace_of,
            user,
            terminal: stdio.terminal.then(|| size_of_terminal(&stdio)),
            cgroup: cgroup.path().to_owned(),
        }));
        let _birth = self.table().birth();
        let born = self.give_birth(&request, &stdio, deadline).await;
        let restricted = born.and_then(|born| match cgroup.restrict_devices(limits.as_ref()) {
            Ok(()) => Ok(born),
            Err(failure) => {
                self.streams.forget(&born.0.token);
                Err(failure)
            }
        });
        let (process, created) = match restricted {
            Ok(born) => born,
            Err(failure) => {
                let _ = cgroup.remove().await;
                return Err(failure);
            }
        };
        let container = Container {
            cgroup,
            init: process,
            execs: HashMap::new(),
            seccomp,
            oom_score,
            oom_kills: 0,
            paused: false,
            deleting: false,
            writable_layer,
        };
        let mut table = self.table();
        table.containers.insert(id.clone(), container);
        table.first.get_or_insert_with(|| id.clone());
        let early = table.early_end(created.pid);
        drop(table);
        if let Some(exit) = early {
            self.ended(exit.pid, exit.exit_status);
        }
        Ok(created)
    }

    /// Starts an init process for `request`.
    async fn give_birth(
        &self,
        request: &Request,
        stdio: &StdioRequest,
        deadline: Instant,
    ) -> Result<(Process, Created)> {
        let prepared = self.streams.prepare(stdio)?;
        let token = prepared.token;
        let close_stdin = prepared.close_stdin.clone();
        let born = spawn::spawn(request, prepared, deadline)
            .await
            .and_then(|mut waiting| {
                let terminal = self.take_terminal(token, &mut waiting)?;
                Ok((waiting, terminal))
            });
        let (waiting, terminal) = born.inspect_err(|_| self.streams.forget(&token))?;
        let created = Created {
            pid: waiting.pid,
            token,
        };
        let process = Process {
            state: State::Created(Some(Box::new(waiting))),
            token,
            close_stdin,
            terminal,
            size: (0, 0),
            pending: None,
        };
        Ok((process, created))
    }

    /// Offers the host one descriptor of a terminal and keeps another for its size.
    pub(super) fn take_terminal(
        &self,
        token: Token,
        waiting: &mut spawn::Waiting,
    ) -> Result<Option<OwnedFd>> {
        let Some(master) = waiting.terminal.take() else {
            return Ok(None);
        };
        let kept = master
            .try_clone()
            .during(|| "keep the terminal".to_owned())?;
        self.streams.offer_terminal(token, master);
        Ok(Some(kept))
    }

    /// Registers a process to be started in a running container.
    ///
    /// # Errors
    /// No such container, it is not running, or the exec exists.
    pub fn create_exec(&self, request: agent::CreateExecRequest) -> Result<Created> {
        check_id("exec", &request.exec_id)?;
        let Wanted { process, archive } =
            serde_json::from_slice(&request.process_json).map_err(|error| {
                Failure::invalid(format!("malformed process specification: {error}"))
            })?;
        let stdio = request.stdio.unwrap_or_default();
        let mut table = self.table();
        let container = table.container(&request.container_id)?;
        if container.execs.contains_key(&request.exec_id) {
            return Err(Failure::new(
                Kind::AlreadyExists,
                format!("exec {} exists already", request.exec_id),
            ));
        }
        container.running(&request.container_id)?;
        let streams = self.streams.prepare(&stdio)?;
        let token = streams.token;
        let user = Some(process.user().username().clone().unwrap_or_default())
            .filter(|name| !name.is_empty());
        let exec = Process {
            state: State::Created(None),
            token,
            close_stdin: streams.close_stdin.clone(),
            terminal: None,
            size: size_of_terminal(&stdio),
            pending: Some(Pending {
                process,
                archive,
                user,
                streams,
                terminal: stdio.terminal,
            }),
        };
        container.execs.insert(request.exec_id, exec);
        Ok(Created { pid: 0, token })
    }
}

/// An exec: a program, or what the agent does in its place.
#[derive(Deserialize)]
struct Wanted {
    #[serde(flatten)]
    process: ProcessSpec,
    #[serde(rename = "x-caisson.archive")]
    archive: Option<caisson_archive::Request>,
}

/// IDs become names of directories.
fn check_id(what: &str, id: &str) -> Result<()> {
    let valid = !id.is_empty()
        && id.len() <= 128
        && id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_.-+".contains(&byte))
        && !id.starts_with('.');
    if valid {
        Ok(())
    } else {
        Err(Failure::invalid(format!("\"{id}\" is no {what} id")))
    }
}

fn size_of_terminal(stdio: &StdioRequest) -> (u16, u16) {
    let clip = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
    (clip(stdio.rows), clip(stdio.columns))
}

fn rootfs_of(rootfs: Option<agent::Rootfs>) -> Result<Rootfs> {
    use agent::{layer::Source, rootfs::Upper as Wire};
    let rootfs = rootfs.ok_or_else(|| Failure::invalid("a container needs a root file system"))?;
    let layers = rootfs
        .layers
        .into_iter()
        .map(|layer| match layer.source {
            Some(Source::ErofsDevice(device)) => Ok(Layer::Erofs(device)),
            Some(Source::Share(entry)) => Ok(Layer::Share(without_prefix(&entry))),
            _ => Err(Failure::invalid("a layer without a source")),
        })
        .collect::<Result<_>>()?;
    let upper = match rootfs.upper {
        Some(Wire::TmpfsBytes(bytes)) => Upper::Tmpfs(bytes),
        Some(Wire::Ext4Device(device)) => Upper::Ext4(device),
        Some(Wire::ReadOnly(_)) => Upper::ReadOnly,
        Some(Wire::Share(entry)) => Upper::Share(without_prefix(&entry)),
        Some(Wire::Ext4Root(device)) => Upper::Disk {
            device,
            read_only: false,
        },
        Some(Wire::Ext4RootReadOnly(device)) => Upper::Disk {
            device,
            read_only: true,
        },
        _ => {
            return Err(Failure::invalid(
                "a root file system without a kind of upper layer",
            ));
        }
    };
    Ok(Rootfs { layers, upper })
}

fn without_prefix(entry: &str) -> String {
    entry
        .strip_prefix(caisson_protocol::SHARE_PREFIX)
        .unwrap_or(entry)
        .to_owned()
}
