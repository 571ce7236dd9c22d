//! A microVM put together: KVM's VM, memory, vCPUs, and devices in slots.

mod bus;
mod devices;
mod error;
mod fds;
mod kvm;
mod lines;
mod notice;
mod saving;
mod stages;

use std::{
    collections::{BTreeMap, VecDeque},
    fs::File,
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use caisson_vmm_api::{
    BootConfig, Description, DeviceConfig, MemoryConfig, RunState, SlotDescription, VcpuConfig,
};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VmFd};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

pub use bus::{Bus, PortWrite, SLOT_COUNT};
pub use error::MachineError;
pub use fds::Fds;
pub use notice::{Notice, Notices};
pub use stages::Stages;

use devices::{Controls, map_pmem};
use lines::Lines;

use crate::{
    arch,
    balloon::BalloonHandle,
    console::Tail,
    mem::MemHandle,
    memory::{GuestMemory, MemoryLayout},
    pmem::Pmem,
    vcpu::{RunningVcpu, Vcpu},
    virtio::{Device, INTERRUPT_ACK, QUEUE_NOTIFY, Transport, TransportState, View},
};

/// Most vCPUs of a guest (`CONFIG_NR_CPUS` of the guest kernel).
const MAX_VCPUS: u8 = 64;

/// The processors: running in their threads, or here.
enum Processors {
    Running(Vec<RunningVcpu>),
    Paused(Vec<Vcpu>),
}

/// One microVM.
pub struct Machine {
    kvm: Kvm,
    vm: VmFd,
    layout: MemoryLayout,
    memory: GuestMemory,
    vcpu_config: VcpuConfig,
    memory_config: MemoryConfig,
    bus: Arc<Bus>,
    /// The devices in slots; looking at one here waits for no vCPU.
    filled: BTreeMap<u32, View>,
    lines: Lines,
    notices: Arc<Notices>,
    tail: Tail,
    controls: Controls,
    /// Mapped with guest memory, until the slots are filled.
    pmem: VecDeque<Pmem>,
    processors: Processors,
    exits: Vec<Arc<AtomicU64>>,
}

impl Machine {
    /// Builds a microVM and starts it from its kernel. Returns it with the slots of its devices.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn boot(
        config: BootConfig,
        mut fds: Fds,
        notices: Arc<Notices>,
        stages: &mut Stages,
    ) -> Result<(Self, Vec<u32>), MachineError> {
        check_vcpus(&config.vcpus)?;
        let kvm = kvm::open(fds.take(config.kvm, "kvm")?)?;
        let kernel = File::from(fds.take(config.kernel, "kernel")?);
        let mut layout = MemoryLayout::new(&config.memory)?;
        let (regions, pmem) = map_pmem(&config.devices, &mut layout, &mut fds)?;
        let memory = kvm::map_memory(&layout, config.memory.shared, regions)?;
        stages.reached("memory mapped");
        let cmdline = complete_cmdline(&config);
        let entry = arch::load_kernel(&memory, &layout, &kernel, &cmdline)?;
        arch::write_mp_table(&memory, config.vcpus.max)?;
        stages.reached("kernel loaded");

        let vm = kvm::create_vm(&kvm, &memory)?;
        let vcpus = kvm::create_vcpus(&kvm, &vm, config.vcpus.max)?;
        if let Some(first) = vcpus.first() {
            arch::set_boot_registers(&first.fd, &memory, entry)?;
        }
        for vcpu in &vcpus {
            arch::set_boot_msrs(&vcpu.fd);
            arch::set_lapic_lines(&vcpu.fd)?;
        }
        stages.reached("vCPUs created");
        let mut machine = Self::assemble(
            (kvm, vm),
            (layout, memory),
            (config.vcpus, config.memory),
            vcpus,
            notices,
        );
        machine.pmem = pmem;
        let slots = machine.fill_slots(&config.devices, &mut fds)?;
        stages.reached("devices built");
        machine.resume()?;
        stages.reached("vCPUs running");
        Ok((machine, slots))
    }

    fn assemble(
        (kvm, vm): (Kvm, VmFd),
        (layout, memory): (MemoryLayout, GuestMemory),
        (vcpu_config, memory_config): (VcpuConfig, MemoryConfig),
        vcpus: Vec<Vcpu>,
        notices: Arc<Notices>,
    ) -> Self {
        let tail = Tail::default();
        Self {
            kvm,
            vm,
            layout,
            vcpu_config,
            memory_config,
            bus: Arc::new(Bus::new(tail.clone(), read_only_memory(&memory))),
            memory,
            filled: BTreeMap::new(),
            lines: Lines::default(),
            notices,
            tail,
            controls: Controls::default(),
            pmem: VecDeque::new(),
            exits: vcpus.iter().map(|vcpu| vcpu.exits.clone()).collect(),
            processors: Processors::Paused(vcpus),
        }
    }

    /// Fills a free slot with a new device.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn attach(&mut self, config: &DeviceConfig, mut fds: Fds) -> Result<u32, MachineError> {
        self.add(config, &mut fds)
    }

    /// Empties a slot whose driver is unbound.
    ///
    /// # Errors
    /// [`MachineError::Invalid`] when there is no such device, [`MachineError::State`] while its
    /// driver is bound.
    pub fn detach(&mut self, slot: u32) -> Result<(), MachineError> {
        let absent = || MachineError::Invalid(format!("slot {slot} holds no device"));
        let view = self.filled.get(&slot).ok_or_else(absent)?;
        let bound = || {
            MachineError::State(format!(
                "slot {slot}: the guest's driver still uses the device \"{}\"; unbind it first",
                view.name()
            ))
        };
        // Looked at before the slot is locked: the driver may be waiting there for its reset.
        if !view.is_unbound() {
            return Err(bound());
        }
        let transport = self
            .bus
            .slot(slot)
            .and_then(|mut content| content.take_if(|transport| transport.view().is_unbound()))
            .ok_or_else(bound)?;
        self.filled.remove(&slot);
        match transport.name() {
            "balloon" => self.controls.balloon = None,
            "mem" => self.controls.mem = None,
            _ => {}
        }
        self.unwire(slot, &transport)
    }

    /// Stops vCPUs and devices where state is whole. Nothing happens when they are stopped.
    ///
    /// # Errors
    /// [`MachineError::State`] when a vCPU is lost.
    pub fn pause(&mut self) -> Result<(), MachineError> {
        let Processors::Running(running) = &mut self.processors else {
            return Ok(());
        };
        for vcpu in running.iter() {
            vcpu.request_stop();
        }
        let mut vcpus = Vec::with_capacity(running.len());
        for vcpu in running.drain(..) {
            vcpus.push(
                vcpu.join()
                    .ok_or_else(|| MachineError::State("a vCPU's thread panicked".into()))?,
            );
        }
        self.processors = Processors::Paused(vcpus);
        self.for_each_device(|_, transport| transport.pause());
        Ok(())
    }

    /// Lets devices and vCPUs run. Nothing happens when they do.
    ///
    /// # Errors
    /// [`MachineError::Io`] when a thread cannot be started.
    pub fn resume(&mut self) -> Result<(), MachineError> {
        if matches!(self.processors, Processors::Running(_)) {
            return Ok(());
        }
        self.for_each_device(|_, transport| transport.resume());
        let Processors::Paused(vcpus) =
            std::mem::replace(&mut self.processors, Processors::Running(Vec::new()))
        else {
            return Ok(());
        };
        let mut running = Vec::with_capacity(vcpus.len());
        for vcpu in vcpus {
            running.push(
                vcpu.start(self.bus.clone(), self.notices.clone())
                    .map_err(MachineError::io("starting a vCPU's thread"))?,
            );
        }
        self.processors = Processors::Running(running);
        Ok(())
    }

    /// Sets the size of the balloon.
    ///
    /// # Errors
    /// [`MachineError::State`] without a balloon, and those of [`BalloonHandle::set_mib`].
    pub fn set_balloon(&self, mib: u32) -> Result<(), MachineError> {
        let balloon = self.controls.balloon.as_ref();
        balloon
            .ok_or_else(|| MachineError::State("the microVM has no balloon device".into()))?
            .set_mib(mib)
            .map_err(MachineError::device("balloon"))
    }

    /// Asks the guest to have `mib` MiB of hotpluggable memory plugged.
    ///
    /// # Errors
    /// [`MachineError::State`] without a virtio-mem device, [`MachineError::Device`] when the
    /// size is not possible.
    pub fn set_hotplug_memory(&self, mib: u32) -> Result<(), MachineError> {
        let mem = self.controls.mem.as_ref();
        mem.ok_or_else(|| MachineError::State("the microVM has no virtio-mem device".into()))?
            .set_mib(mib)
            .map_err(MachineError::device("mem"))
    }

    /// The last words of the guest.
    pub fn console_tail(&self) -> String {
        self.tail.text()
    }

    /// What the API tells of the microVM.
    pub fn describe(&self, stages: Vec<(String, u64)>) -> Description {
        let slots = self.filled.iter().map(|(slot, device)| SlotDescription {
            slot: *slot,
            device: device.name().into(),
            active: device.is_active(),
            requests: device.completed(),
        });
        let exits = self.exits.iter();
        Description {
            version: env!("CARGO_PKG_VERSION").into(),
            state: match self.processors {
                Processors::Running(_) => RunState::Running,
                Processors::Paused(_) => RunState::Paused,
            },
            vcpus: self.vcpu_config,
            memory: self.memory_config,
            slots: slots.collect(),
            slot_count: SLOT_COUNT,
            balloon_mib: self
                .controls
                .balloon
                .as_ref()
                .map_or(0, BalloonHandle::actual_mib),
            hotplugged_mib: self.controls.mem.as_ref().map_or(0, MemHandle::plugged_mib),
            vm_exits: exits.map(|exits| exits.load(Ordering::Relaxed)).sum(),
            stages,
        }
    }

    fn fill_slots(
        &mut self,
        devices: &[DeviceConfig],
        fds: &mut Fds,
    ) -> Result<Vec<u32>, MachineError> {
        let mut slots = Vec::with_capacity(devices.len());
        for config in devices {
            slots.push(self.add(config, fds)?);
        }
        Ok(slots)
    }

    /// Builds a device and puts it into the first free slot.
    fn add(&mut self, config: &DeviceConfig, fds: &mut Fds) -> Result<u32, MachineError> {
        let slot = self.free_slot()?;
        let device = self.build_device(config, fds, slot)?;
        self.fill(slot, device, None)?;
        Ok(slot)
    }

    fn free_slot(&self) -> Result<u32, MachineError> {
        (0..SLOT_COUNT)
            .find(|slot| !self.filled.contains_key(slot))
            .ok_or_else(|| {
                MachineError::Exhausted(format!("all {SLOT_COUNT} device slots are filled"))
            })
    }

    /// Puts a device into a slot and connects it to KVM; `saved` is taken over first.
    fn fill(
        &mut self,
        slot: u32,
        device: Box<dyn Device>,
        saved: Option<&TransportState>,
    ) -> Result<(), MachineError> {
        let name = device.name();
        let free = self.bus.slot(slot).filter(|slot| slot.is_none());
        let mut content =
            free.ok_or_else(|| MachineError::Invalid(format!("slot {slot} is not free")))?;
        let on_failure = self.reporter(slot, name).by_error();
        let line = self.lines.of(slot, &self.vm)?;
        let mut transport = Transport::new(device, self.memory.clone(), line, on_failure)
            .map_err(MachineError::io("making a device's events and thread"))?;
        self.wire(slot, &transport)?;
        if let Some(saved) = saved {
            transport
                .restore(saved)
                .map_err(MachineError::device(name))?;
        }
        self.filled.insert(slot, transport.view());
        self.notices.forget(slot);
        *content = Some(transport);
        Ok(())
    }

    fn wire(&self, slot: u32, transport: &Transport) -> Result<(), MachineError> {
        let notify = IoEventAddress::Mmio(bus::slot_address(slot) + QUEUE_NOTIFY);
        for (queue, kick) in (0u32..).zip(transport.kicks()) {
            self.vm
                .register_ioevent(kick, &notify, queue)
                .map_err(MachineError::kvm("KVM_IOEVENTFD"))?;
        }
        let acknowledge = IoEventAddress::Mmio(bus::slot_address(slot) + INTERRUPT_ACK);
        self.vm
            .register_ioevent(transport.acknowledged(), &acknowledge, NoDatamatch)
            .map_err(MachineError::kvm("KVM_IOEVENTFD"))
    }

    fn unwire(&self, slot: u32, transport: &Transport) -> Result<(), MachineError> {
        let notify = IoEventAddress::Mmio(bus::slot_address(slot) + QUEUE_NOTIFY);
        for (queue, kick) in (0u32..).zip(transport.kicks()) {
            self.vm
                .unregister_ioevent(kick, &notify, queue)
                .map_err(MachineError::kvm("KVM_IOEVENTFD (deassign)"))?;
        }
        let acknowledge = IoEventAddress::Mmio(bus::slot_address(slot) + INTERRUPT_ACK);
        self.vm
            .unregister_ioevent(transport.acknowledged(), &acknowledge, NoDatamatch)
            .map_err(MachineError::kvm("KVM_IOEVENTFD (deassign)"))
    }

    fn for_each_device(&self, mut visit: impl FnMut(u32, &mut Transport)) {
        for slot in 0..SLOT_COUNT {
            if let Some(mut content) = self.bus.slot(slot)
                && let Some(transport) = content.as_mut()
            {
                visit(slot, transport);
            }
        }
    }
}

/// What KVM lets the guest only read.
fn read_only_memory(memory: &GuestMemory) -> Vec<Range<u64>> {
    memory
        .iter()
        .filter(|region| region.prot() & libc::PROT_WRITE == 0)
        .map(|region| region.start_addr().0..region.start_addr().0 + region.len())
        .collect()
}

fn check_vcpus(config: &VcpuConfig) -> Result<(), MachineError> {
    if config.boot == 0 || config.boot > config.max || config.max > MAX_VCPUS {
        return Err(MachineError::Invalid(format!(
            "{} vCPUs at boot of at most {}: need 1 <= boot <= max <= {MAX_VCPUS}",
            config.boot, config.max
        )));
    }
    Ok(())
}

/// The parent's command line with what only the VMM knows.
fn complete_cmdline(config: &BootConfig) -> String {
    let mut cmdline = config.cmdline.clone();
    if config.vcpus.boot < config.vcpus.max {
        cmdline.push_str(&format!(" maxcpus={}", config.vcpus.boot));
    }
    cmdline.push_str(&bus::slots_cmdline());
    cmdline
}
