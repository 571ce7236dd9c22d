//! A microVM to files and back.

use std::sync::Arc;

use caisson_vmm_api::{DeviceConfig, Fd, RestoreConfig};
use kvm_ioctls::Kvm;

use super::{Fds, Machine, MachineError, Notices, Processors, Stages, kvm, map_pmem};
use crate::{
    mem::MemHandle,
    memory::{self, GuestMemory, GuestRegion, MemoryLayout},
    snapshot::{self, SavedDevice, SavedMachine},
};

impl Machine {
    /// Writes the paused microVM's state and memory.
    ///
    /// # Errors
    /// [`MachineError::State`] while it runs, [`MachineError::Snapshot`] when something cannot be
    /// read or written; the microVM is unchanged then.
    pub fn save(&self, state: Fd, memory: Fd, mut fds: Fds) -> Result<(), MachineError> {
        let Processors::Paused(vcpus) = &self.processors else {
            return Err(MachineError::State(
                "the microVM runs; pause it before saving".into(),
            ));
        };
        let state = fds.take(state, "state file")?;
        let memory = fds.take(memory, "memory file")?;
        let indexes = msr_indexes(&self.kvm)?;
        let mut saved = Vec::with_capacity(vcpus.len());
        for vcpu in vcpus {
            saved.push(snapshot::save_vcpu(&vcpu.fd, &indexes)?);
        }
        let document = SavedMachine::new(
            self.vcpu_config,
            self.memory_config,
            saved,
            snapshot::save_vm(&self.vm)?,
            self.save_devices()?,
            self.tail.text(),
        );
        snapshot::save_memory(&self.memory, &self.used_memory(), memory)?;
        Ok(document.write(state)?)
    }

    /// Builds a microVM from a saved one; it stays paused. Returns it with the slots of its devices.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn restore(
        config: RestoreConfig,
        mut fds: Fds,
        notices: Arc<Notices>,
        stages: &mut Stages,
    ) -> Result<(Self, Vec<u32>), MachineError> {
        let kvm = kvm::open(fds.take(config.kvm, "kvm")?)?;
        let saved = SavedMachine::read(fds.take(config.state, "state file")?)?;
        super::check_vcpus(&saved.vcpu_config)?;
        if saved.vcpus.len() != usize::from(saved.vcpu_config.max) {
            return Err(MachineError::Snapshot(format!(
                "{} vCPUs were saved of {}",
                saved.vcpus.len(),
                saved.vcpu_config.max
            )));
        }
        stages.reached("state read");
        let mut layout = MemoryLayout::new(&saved.memory_config)?;
        let (regions, pmem) = map_pmem(&config.devices, &mut layout, &mut fds)?;
        let memory = restore_memory(&layout, &saved, config.memory, regions, &mut fds)?;
        stages.reached("memory mapped");
        let vm = kvm::create_vm(&kvm, &memory)?;
        let vcpus = kvm::create_vcpus(&kvm, &vm, saved.vcpu_config.max)?;
        for (vcpu, saved) in vcpus.iter().zip(&saved.vcpus) {
            snapshot::restore_vcpu(&vcpu.fd, saved)?;
        }
        snapshot::restore_vm(&vm, &saved.vm)?;
        stages.reached("vCPUs created");
        let mut machine = Self::assemble(
            (kvm, vm),
            (layout, memory),
            (saved.vcpu_config, saved.memory_config),
            vcpus,
            notices,
        );
        machine.tail.push(saved.console_tail.as_bytes());
        machine.pmem = pmem;
        let slots = machine.restore_devices(&config.devices, &saved.devices, &mut fds)?;
        stages.reached("devices built");
        Ok((machine, slots))
    }

    fn save_devices(&self) -> Result<Vec<SavedDevice>, MachineError> {
        let mut devices = Vec::new();
        let mut failure = None;
        self.for_each_device(|slot, transport| match transport.save() {
            Ok(transport) => devices.push(SavedDevice { slot, transport }),
            Err(error) => {
                failure.get_or_insert(MachineError::device(transport.name())(error));
            }
        });
        failure.map_or(Ok(devices), Err)
    }

    fn restore_devices(
        &mut self,
        configs: &[DeviceConfig],
        saved: &[SavedDevice],
        fds: &mut Fds,
    ) -> Result<Vec<u32>, MachineError> {
        if configs.len() != saved.len() {
            return Err(MachineError::Invalid(format!(
                "{} devices are configured, but {} were saved",
                configs.len(),
                saved.len()
            )));
        }
        for (config, saved) in configs.iter().zip(saved) {
            let device = self.build_device(config, fds, saved.slot)?;
            self.fill(saved.slot, device, Some(&saved.transport))?;
        }
        Ok(saved.iter().map(|device| device.slot).collect())
    }

    /// For each region of RAM, where it can hold data: hotpluggable memory does only after some of
    /// it was plugged, and looking at all of it takes long.
    fn used_memory(&self) -> Vec<Vec<(u64, u64)>> {
        let whole = |&(_, bytes): &(u64, u64)| vec![(0, bytes)];
        let mut used: Vec<_> = self.layout.ram.iter().map(whole).collect();
        if let Some(region) = &self.layout.hotplug {
            let plugged = self.controls.mem.as_ref().map_or(0, MemHandle::plugged_mib);
            used.push(if plugged > 0 {
                whole(region)
            } else {
                Vec::new()
            });
        }
        used
    }
}

/// Every clone maps the same file privately, unless other processes have to share the memory:
/// then it is copied.
fn restore_memory(
    layout: &MemoryLayout,
    saved: &SavedMachine,
    file: Fd,
    pmem: Vec<GuestRegion>,
    fds: &mut Fds,
) -> Result<GuestMemory, MachineError> {
    let file = fds.take(file, "memory file")?;
    let ranges: Vec<_> = layout.ram.iter().chain(&layout.hotplug).copied().collect();
    let mut regions: Vec<GuestRegion> = if saved.memory_config.shared {
        let regions = ranges
            .iter()
            .map(|(start, bytes)| memory::shared(*start, *bytes))
            .collect::<Result<Vec<_>, _>>()?;
        snapshot::load_memory(&regions, &file)?;
        regions
    } else {
        snapshot::map_memory(&ranges, &file)?
    };
    regions.extend(pmem);
    kvm::collect(regions)
}

fn msr_indexes(kvm: &Kvm) -> Result<Vec<u32>, MachineError> {
    let list = kvm
        .get_msr_index_list()
        .map_err(MachineError::kvm("KVM_GET_MSR_INDEX_LIST"))?;
    Ok(list.as_slice().to_vec())
}
