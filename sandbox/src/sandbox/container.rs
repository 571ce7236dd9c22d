//! Containers and their root file systems.

use std::{fs::File, os::fd::AsFd, path::Path, sync::PoisonError, time::Duration};

use caisson_fs::{ReadOnly, Share};
use caisson_protocol::{
    PUBLISHED_PREFIX, SHARE_PREFIX,
    agent::{CreateContainerRequest, Layer, Rootfs, layer::Source, rootfs::Upper as WireUpper},
};
use caisson_vmm_api::{BlockContents, Fd};

use super::{
    ContainerSpec, Created, Holdings, RootfsSource, Sandbox, Stdio, Upper, blocking,
    process::stdio_message, resolver::resolv_conf,
};
use crate::{
    deadline::scaled,
    disk,
    error::{AgentErrorKind, Error},
    huge_pages::Volume,
    mount_table, published,
    size::Limits,
    spec::{self, HostBind},
};

/// Whether something is mounted below the directory. What cannot be found is told when it is shared.
fn has_mounts(path: &Path) -> bool {
    mount_table::below(path).is_ok_and(|mounts| !mounts.is_empty())
}

/// Longest that a container which could not be created is sought in the guest to delete it: the agent
/// goes on with what is late, but not for so long.
const DISCARD_LIMIT: Duration = Duration::from_secs(5);

/// Between two looks for it.
const DISCARD_PAUSE: Duration = Duration::from_millis(500);

/// Most layers of an image (the GPT the VMM makes up has room for so many).
const MAX_LAYERS: usize = 120;

impl Sandbox {
    /// Creates a container; its program waits for [`Sandbox::start_process`].
    ///
    /// # Errors
    /// [`Error`]; nothing of the container is left then.
    pub async fn create_container(&self, request: ContainerSpec) -> Result<Created, Error> {
        let mut spec = spec::parse(&request.spec_json)?;
        let limits = Limits::of(&spec)?.map(|limits| self.within_pod(limits));
        let joins_pod = spec::translate(&mut spec, self.vmm_pid())?;
        self.make_room(&request.id, limits).await?;
        let mut holdings = Holdings::default();
        match self
            .create_with(&request, spec, joins_pod, &mut holdings)
            .await
        {
            Ok(created) => {
                let mut containers = self
                    .containers
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                containers.insert(request.id, holdings);
                Ok(created)
            }
            Err(error) => {
                self.release(holdings).await;
                self.take_room(&request.id).await;
                Err(error)
            }
        }
    }

    async fn create_with(
        &self,
        request: &ContainerSpec,
        mut spec: oci_spec::runtime::Spec,
        joins_pod: bool,
        holdings: &mut Holdings,
    ) -> Result<Created, Error> {
        holdings.resolv_conf = resolv_conf(&spec);
        let mut huge_directories = Vec::new();
        for bind in spec::host_binds(&spec) {
            if let Some(volume) = Volume::at(&bind.source)? {
                spec::use_source(&mut spec, bind.mount, volume.guest_source());
                huge_directories.push(volume.to_proto());
                continue;
            }
            if let Some(number) = self.publish_if_fit(&bind, holdings).await? {
                spec::use_source(&mut spec, bind.mount, format!("{PUBLISHED_PREFIX}{number}"));
                continue;
            }
            let follows = bind.follows && bind.source.is_dir();
            let share = Share {
                recursive: bind.recursive && !follows,
                read_only: bind.read_only,
                set_id: false,
            };
            let entry = self.share(&bind.source, share, holdings).await?;
            if follows {
                self.follow_mounts(bind.source.clone(), share, holdings)
                    .await?;
            }
            let mounts_below = follows || bind.recursive && has_mounts(&bind.source);
            if bind.read_only == ReadOnly::Mount && mounts_below {
                spec::leave_read_only_to_host(&mut spec, bind.mount);
            }
            spec::use_source(&mut spec, bind.mount, format!("{SHARE_PREFIX}{entry}"));
        }
        self.attach_volumes(&mut spec, holdings).await?;
        let rootfs = self.rootfs(&request.rootfs, holdings).await?;
        let spec_json =
            serde_json::to_vec(&spec).map_err(|error| Error::Invalid(error.to_string()))?;
        let message = CreateContainerRequest {
            container_id: request.id.clone(),
            spec_json,
            rootfs: Some(rootfs).into(),
            stdio: Some(stdio_message(&request.stdio)).into(),
            bind_pod_files: request.pod_files,
            join_pod_pid_namespace: joins_pod,
            huge_directories,
            ..Default::default()
        };
        let created = self.create_in_guest(message, &request.stdio).await;
        if let Err(error) = &created {
            self.discard(&request.id, error).await;
        }
        created
    }

    async fn create_in_guest(
        &self,
        message: CreateContainerRequest,
        stdio: &Stdio,
    ) -> Result<Created, Error> {
        let response = self
            .agent
            .call("create the container", |client, context| async move {
                client.create_container(context, &message).await
            })
            .await?;
        let streams = self.connect(&response.stdio_token, stdio).await?;
        Ok(Created {
            pid: response.pid,
            streams,
        })
    }

    /// Removes what the guest may have of a container whose creation has failed so: its disks and
    /// shares are about to go.
    async fn discard(&self, id: &str, error: &Error) {
        let kind = AgentErrorKind::AlreadyExists;
        if matches!(error, Error::Agent { kind: found, .. } if *found == kind) {
            // That is another one.
            return;
        }
        // It may come to be until the agent has given up as well.
        let late = matches!(error, Error::Late { .. });
        let deleted = async {
            while let Err(failed) = self.delete_in_guest(id).await
                && late
                && !matches!(failed, Error::Gone(_))
            {
                tokio::time::sleep(scaled(DISCARD_PAUSE)).await;
            }
        };
        let limit = scaled(DISCARD_LIMIT);
        if tokio::time::timeout(limit, deleted).await.is_err() {
            log::warn!("the guest may have something of container {id}, which was not created");
        }
    }

    /// Publishes what the container may only read and has nothing mounted below, if it is one of
    /// the directories that are published.
    async fn publish_if_fit(
        &self,
        bind: &HostBind,
        holdings: &mut Holdings,
    ) -> Result<Option<u32>, Error> {
        let fit = bind.read_only != ReadOnly::Nothing
            && published::has_link(&bind.source)
            && !has_mounts(&bind.source);
        if fit {
            self.publish(&bind.source, holdings).await
        } else {
            Ok(None)
        }
    }

    /// Limits of a container in the light of those that the host has set for its pod.
    fn within_pod(&self, limits: Limits) -> Limits {
        let record = self.record.lock().unwrap_or_else(PoisonError::into_inner);
        match record.cgroup().and_then(Path::parent) {
            Some(pod) => limits.within_pod(pod),
            None => limits,
        }
    }

    /// Disks of the root file system; what they take is added to `holdings`.
    async fn rootfs(
        &self,
        source: &RootfsSource,
        holdings: &mut Holdings,
    ) -> Result<Rootfs, Error> {
        let mut rootfs = Rootfs::default();
        match source {
            RootfsSource::Directory(path) => {
                let share = Share {
                    recursive: true,
                    read_only: ReadOnly::Nothing,
                    set_id: true,
                };
                let entry = self.share(path, share, holdings).await?;
                rootfs.upper = Some(WireUpper::Share(format!("{SHARE_PREFIX}{entry}")));
            }
            RootfsSource::Disk { path, read_only } => {
                // The guest mounts only what it is told is ext4, and the host never does.
                let file = File::options()
                    .read(true)
                    .write(!read_only)
                    .open(path)
                    .map_err(Error::io(format!("open the disk {}", path.display())))?;
                let contents = BlockContents::File(Fd(0));
                let disk = self
                    .attach_disk(
                        "root",
                        contents,
                        *read_only,
                        &[file.as_fd()],
                        &mut holdings.slots,
                    )
                    .await?
                    .device;
                rootfs.upper = Some(if *read_only {
                    WireUpper::Ext4RootReadOnly(disk)
                } else {
                    WireUpper::Ext4Root(disk)
                });
            }
            RootfsSource::Layers { erofs, upper } => {
                if erofs.is_empty() || erofs.len() > MAX_LAYERS {
                    return Err(Error::Invalid(format!(
                        "an image has 1 to {MAX_LAYERS} layers, not {}",
                        erofs.len()
                    )));
                }
                let files = erofs
                    .iter()
                    .map(|path| {
                        File::open(path)
                            .map_err(Error::io(format!("open the layer {}", path.display())))
                    })
                    .collect::<Result<Vec<_>, _>>()?;
                let descriptors: Vec<_> = files.iter().map(AsFd::as_fd).collect();
                let indexes = (0..descriptors.len())
                    .map(|index| Fd(u32::try_from(index).unwrap_or(u32::MAX)));
                let contents = BlockContents::Partitions(indexes.collect());
                let disk = self
                    .attach_disk("layers", contents, true, &descriptors, &mut holdings.slots)
                    .await?
                    .device;
                for number in 1..=files.len() {
                    rootfs.layers.push(Layer {
                        source: Some(Source::ErofsDevice(format!("{disk}{number}"))),
                        ..Default::default()
                    });
                }
                rootfs.upper = Some(match upper {
                    Upper::ReadOnly => WireUpper::ReadOnly(true),
                    Upper::Tmpfs(bytes) => WireUpper::TmpfsBytes(*bytes),
                    Upper::Disk(mib) => {
                        let (directory, mib) = (self.config.state_dir.join("uppers"), *mib);
                        let upper = blocking(move || disk::fresh(&directory, mib)).await?;
                        let contents = BlockContents::File(Fd(0));
                        let disk = self
                            .attach_disk(
                                "upper",
                                contents,
                                false,
                                &[upper.as_fd()],
                                &mut holdings.slots,
                            )
                            .await?;
                        WireUpper::Ext4Device(disk.device)
                    }
                });
            }
        }
        Ok(rootfs)
    }
}
