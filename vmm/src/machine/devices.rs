//! Devices from their configurations.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use caisson_vmm_api::{BlockConfig, BlockContents, DeviceConfig, NetConfig};

use super::{Fds, Machine, MachineError, Notice, Notices};
use crate::{
    balloon::{Balloon, BalloonHandle},
    block::{Block, Contents},
    console::Console,
    deadline,
    fs::Fs,
    mem::{Mem, MemHandle},
    memory::{GuestRegion, MemoryLayout},
    net::Net,
    pmem::Pmem,
    rng::Rng,
    virtio::{Device, DeviceError},
    vsock::Vsock,
};

/// For each answer of a vhost-user back end, unscaled.
const BACK_END_DEADLINE: Duration = Duration::from_secs(5);
/// For each next step of a vsock connection, unscaled.
const VSOCK_PATIENCE: Duration = Duration::from_secs(5);

/// What changes devices from outside.
#[derive(Default)]
pub(super) struct Controls {
    pub(super) balloon: Option<BalloonHandle>,
    pub(super) mem: Option<MemHandle>,
}

/// Tells the parent that a device's back end failed.
pub(super) struct Reporter {
    pub(super) notices: Arc<Notices>,
    pub(super) slot: u32,
    pub(super) name: &'static str,
}

impl Reporter {
    fn tell(&self, message: &str) {
        let Self { slot, name, .. } = self;
        self.notices.push(Notice::DeviceFailed {
            slot: *slot,
            message: format!("device \"{name}\" in slot {slot}: {message}"),
        });
    }

    /// For messages.
    pub(super) fn by_message(self) -> Box<dyn Fn(String) + Send> {
        Box::new(move |message| self.tell(&message))
    }

    /// For errors of [`Device::run`].
    pub(super) fn by_error(self) -> Box<dyn Fn(&DeviceError) + Send + Sync> {
        Box::new(move |error| self.tell(&error.to_string()))
    }
}

impl Machine {
    /// Builds the device that `config` describes over the descriptors in `fds`, for `slot`.
    pub(super) fn build_device(
        &mut self,
        config: &DeviceConfig,
        fds: &mut Fds,
        slot: u32,
    ) -> Result<Box<dyn Device>, MachineError> {
        Ok(match config {
            DeviceConfig::Block(config) => Box::new(self.build_block(config, fds, slot)?),
            DeviceConfig::Vsock {
                cid,
                listener,
                acceptor,
            } => {
                let listener = fds.take(*listener, "vsock listener")?;
                let acceptor = acceptor
                    .map(|fd| fds.take(fd, "vsock acceptor"))
                    .transpose()?;
                let patience = deadline::scaled(VSOCK_PATIENCE);
                let device = Vsock::new(*cid, listener, acceptor, patience);
                Box::new(device.map_err(|error| MachineError::Invalid(error.to_string()))?)
            }
            DeviceConfig::Console { output } => {
                let output = output
                    .map(|fd| fds.take(fd, "console output"))
                    .transpose()?;
                Box::new(Console::new(self.tail.clone(), output))
            }
            DeviceConfig::Rng => Box::new(Rng),
            DeviceConfig::Balloon => Box::new(self.build_balloon()?),
            DeviceConfig::Fs {
                tag,
                socket,
                queues,
            } => {
                let socket = fds.take(*socket, "file server's socket")?;
                let report = self.reporter(slot, "fs").by_message();
                let deadline = deadline::scaled(BACK_END_DEADLINE);
                let device = Fs::new(tag, socket, *queues, &self.memory, deadline, report);
                Box::new(device.map_err(MachineError::device("fs"))?)
            }
            DeviceConfig::Mem => Box::new(self.build_mem()?),
            DeviceConfig::Pmem { .. } => Box::new(self.pmem.pop_front().ok_or_else(|| {
                MachineError::Invalid(
                    "persistent memory can only be given at boot: guest memory does not change \
                     later; attach the file as a block device"
                        .into(),
                )
            })?),
            DeviceConfig::Net(config) => Box::new(self.build_net(config, fds, slot)?),
        })
    }

    fn build_block(
        &self,
        config: &BlockConfig,
        fds: &mut Fds,
        slot: u32,
    ) -> Result<Block, MachineError> {
        let contents = match &config.contents {
            BlockContents::File(fd) => Contents::File(fds.take(*fd, "block file")?),
            BlockContents::Partitions(files) => Contents::Partitions(
                files
                    .iter()
                    .map(|fd| fds.take(*fd, "block partition"))
                    .collect::<Result<_, _>>()?,
            ),
        };
        Block::new(
            config.serial.clone(),
            contents,
            config.read_only,
            config.rate_limit.as_ref(),
            self.reporter(slot, "block").by_message(),
        )
        .map_err(|error| MachineError::Invalid(error.to_string()))
    }

    fn build_net(&self, config: &NetConfig, fds: &mut Fds, slot: u32) -> Result<Net, MachineError> {
        let taps = config
            .taps
            .iter()
            .map(|fd| fds.take(*fd, "tap"))
            .collect::<Result<_, _>>()?;
        let vhosts = config
            .vhost_nets
            .iter()
            .map(|fd| fds.take(*fd, "vhost-net"))
            .collect::<Result<_, _>>()?;
        Net::new(
            taps,
            vhosts,
            config.mac,
            config.mtu,
            config.rx_rate_limit.as_ref(),
            config.tx_rate_limit.as_ref(),
            self.reporter(slot, "net").by_message(),
        )
        .map_err(MachineError::device("net"))
    }

    fn build_mem(&mut self) -> Result<Mem, MachineError> {
        let (start, bytes) = self.layout.hotplug.ok_or_else(|| {
            MachineError::Invalid(
                "virtio-mem needs `memory.hotplug_mib` in the boot configuration".into(),
            )
        })?;
        if self.controls.mem.is_some() {
            return Err(MachineError::Invalid(
                "a microVM has one virtio-mem device at most".into(),
            ));
        }
        let mem = Mem::new(start, bytes).map_err(MachineError::device("mem"))?;
        self.controls.mem = Some(mem.handle());
        Ok(mem)
    }

    fn build_balloon(&mut self) -> Result<Balloon, MachineError> {
        if self.controls.balloon.is_some() {
            return Err(MachineError::Invalid(
                "a microVM has one balloon at most".into(),
            ));
        }
        let balloon = Balloon::new(
            self.layout
                .ram
                .iter()
                .copied()
                .chain(self.layout.hotplug)
                .collect(),
        )
        .map_err(MachineError::device("balloon"))?;
        self.controls.balloon = Some(balloon.handle());
        Ok(balloon)
    }

    pub(super) fn reporter(&self, slot: u32, name: &'static str) -> Reporter {
        Reporter {
            notices: self.notices.clone(),
            slot,
            name,
        }
    }
}

/// Maps the files of all persistent memory in `configs`: regions for guest memory, and devices.
pub(super) fn map_pmem(
    configs: &[DeviceConfig],
    layout: &mut MemoryLayout,
    fds: &mut Fds,
) -> Result<(Vec<GuestRegion>, VecDeque<Pmem>), MachineError> {
    let mut regions = Vec::new();
    let mut devices = VecDeque::new();
    for config in configs {
        if let DeviceConfig::Pmem { file, read_only } = config {
            let file = fds.take(*file, "persistent memory")?;
            let (region, device) = Pmem::map(file, *read_only, |bytes| layout.allocate_pmem(bytes))
                .map_err(MachineError::device("pmem"))?;
            regions.push(region);
            devices.push_back(device);
        }
    }
    Ok((regions, devices))
}
