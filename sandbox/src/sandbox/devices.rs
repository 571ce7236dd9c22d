//! Devices that come and go while the microVM runs.

use std::{
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    sync::{Arc, PoisonError},
};

use caisson_fs::Share;
use caisson_protocol::{
    SHARE_TAG,
    agent::{
        BindDeviceRequest, BindDeviceResponse, ForgetFilesRequest, UnbindDeviceRequest,
        bind_device_request::Expect,
    },
};
use caisson_vmm_api::{BlockConfig, BlockContents, DeviceConfig, Fd, Request, Response};

use super::{Holdings, Sandbox, blocking, lie, process, unexpected};
use crate::{
    agent::Agent,
    cgroup,
    error::Error,
    record::Resource,
    shares::{self, Shares},
};

impl Sandbox {
    /// Attaches a disk and returns what the guest calls it. Its slot is among `slots` afterwards, and
    /// can be after an error. `serial` tells the operator what it is, in at most 20 bytes.
    pub(super) async fn attach_disk(
        &self,
        serial: &str,
        contents: BlockContents,
        read_only: bool,
        fds: &[BorrowedFd<'_>],
        slots: &mut Vec<u32>,
    ) -> Result<BindDeviceResponse, Error> {
        let serial = serial.to_owned();
        let device = DeviceConfig::Block(BlockConfig {
            serial: serial.clone(),
            contents,
            read_only,
            rate_limit: None,
        });
        let slot = self.attach("attach a disk", device, fds).await?;
        slots.push(slot);
        let disk = self.bind(slot, Expect::BlockSerial(serial)).await?;
        let plain = disk.device.strip_prefix("/dev/").is_some_and(|name| {
            !name.is_empty()
                && name.len() <= 16
                && name.bytes().all(|byte| byte.is_ascii_alphanumeric())
        });
        if plain {
            Ok(disk)
        } else {
            Err(lie("named a disk that is none"))
        }
    }

    pub(super) async fn attach(
        &self,
        what: &'static str,
        device: DeviceConfig,
        fds: &[BorrowedFd<'_>],
    ) -> Result<u32, Error> {
        match self.vmm.call(what, Request::Attach(device), fds).await? {
            Response::Attached { slot } => Ok(slot),
            other => Err(unexpected(what, &other)),
        }
    }

    pub(super) async fn bind(
        &self,
        slot: u32,
        expect: Expect,
    ) -> Result<BindDeviceResponse, Error> {
        let request = BindDeviceRequest {
            slot,
            expect: Some(expect),
            ..Default::default()
        };
        self.agent
            .call("bind a device", |client, context| async move {
                client.bind_device(context, &request).await
            })
            .await
    }

    /// Takes away what a container held. What fails here ends with the VM.
    pub(super) async fn release(&self, holdings: Holdings) {
        self.detach(&holdings.slots).await;
        self.release_volumes(&holdings.volumes).await;
        self.withdraw(holdings.published).await;
        drop(holdings.followers);
        let shares = self.shares.lock().await.clone();
        if let Some(shares) = shares.filter(|_| !holdings.shares.is_empty()) {
            let entries = holdings.shares.iter().map(u32::to_string).collect();
            let removed = blocking(move || {
                for index in holdings.shares {
                    if let Err(error) = shares.remove(index) {
                        log::warn!("{error}");
                    }
                }
                Ok(())
            });
            if let Err(error) = removed.await {
                log::warn!("{error}");
            }
            // What the guest remembers keeps their file systems in use, and what was deleted on
            // their disks.
            let agent = self.agent.clone();
            tokio::spawn(async move {
                tokio::time::sleep(2 * caisson_fs::VALIDITY).await;
                if let Err(error) = forget(&agent, entries).await {
                    log::debug!("{error}");
                }
            });
        }
    }

    pub(super) async fn detach(&self, slots: &[u32]) {
        for slot in slots.iter().copied() {
            let request = UnbindDeviceRequest {
                slot,
                ..Default::default()
            };
            let unbound = self
                .agent
                .call("unbind a device", |client, context| async move {
                    client.unbind_device(context, &request).await
                })
                .await;
            if unbound.is_ok()
                && let Err(error) = self
                    .vmm
                    .call("detach a device", Request::Detach { slot }, &[])
                    .await
            {
                log::warn!("{error}");
            }
        }
    }

    /// Shares a host path with the guest and returns its name there.
    pub(super) async fn share(
        &self,
        source: &Path,
        share: Share,
        holdings: &mut Holdings,
    ) -> Result<String, Error> {
        if !self.shares_directories {
            return Err(Error::Invalid(format!(
                "{} cannot be shared: this microVM was booted for containers without host directories",
                source.display()
            )));
        }
        let shares = {
            let mut place = self.shares.lock().await;
            match place.as_ref() {
                Some(shares) => shares.clone(),
                None => {
                    let shares = Arc::new(self.start_file_server().await?);
                    *place = Some(shares.clone());
                    shares
                }
            }
        };
        let source = source.to_owned();
        let index = blocking(move || shares.add(&source, share)).await?;
        holdings.shares.push(index);
        Ok(index.to_string())
    }

    /// Starts the file server and gives it to the guest; nothing of it is left after an error.
    async fn start_file_server(&self) -> Result<Shares, Error> {
        let program = self.config.file_server.clone();
        let (shares, socket) = blocking(move || Shares::start(&program)).await?;
        self.remember(process(shares.pid()))?;
        self.adopt(shares.pid());
        let device = DeviceConfig::Fs {
            tag: SHARE_TAG.to_owned(),
            socket: Fd(0),
            queues: shares::QUEUES,
        };
        let slot = self
            .attach("attach the shared directories", device, &[socket.as_fd()])
            .await?;
        match self.bind(slot, Expect::FsTag(SHARE_TAG.to_owned())).await {
            Ok(_) => Ok(shares),
            Err(error) => {
                self.detach(&[slot]).await;
                Err(error)
            }
        }
    }

    fn remember(&self, resource: Option<Resource>) -> Result<(), Error> {
        let mut record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        resource.map_or(Ok(()), |resource| Ok(record.add(resource)?))
    }

    /// Puts a helper process into the sandbox's cgroup.
    fn adopt(&self, pid: u32) {
        let record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(path) = record.cgroup()
            && let Err(error) = cgroup::add(path, pid)
        {
            log::warn!("process {pid} stays out of the sandbox's cgroup: {error}");
        }
    }
}

/// Has the guest drop what nobody uses of entries that have gone; without any, of the whole share.
pub(super) async fn forget(agent: &Agent, entries: Vec<String>) -> Result<(), Error> {
    let request = ForgetFilesRequest {
        entries,
        ..Default::default()
    };
    agent
        .call("forget files", |client, context| async move {
            client.forget_files(context, &request).await
        })
        .await
        .map(drop)
}
