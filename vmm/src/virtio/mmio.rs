//! The virtio-mmio transport (virtio 1.2 section 4.2), version 2.
//!
//! Its registers are a state machine that the guest drives; at `DRIVER_OK` the
//! configuration of queues is consumed, and later writes to it are ignored
//! until a reset.

use std::sync::{
    Arc,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{
    Active, ActiveQueue, ConfigSpace, Device, DeviceError, DeviceState, Interrupt, QueueError,
    QueueSetup, RingAddresses, View,
    worker::{OnFailure, Worker},
};
use crate::memory::GuestMemory;

/// Bytes of one slot.
pub const SLOT_BYTES: u64 = 0x1000;
/// Offset of `QueueNotify`.
pub const QUEUE_NOTIFY: u64 = 0x50;
/// Offset of `InterruptACK`, see [`Interrupt::take_status`].
pub const INTERRUPT_ACK: u64 = 0x64;

/// "virt"
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "cais"
const VENDOR: u32 = 0x7369_6163;
const CONFIG_SPACE: u64 = 0x100;

/// `VIRTIO_F_INDIRECT_DESC`.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// `VIRTIO_F_EVENT_IDX`.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// `VIRTIO_F_VERSION_1`.
pub const F_VERSION_1: u64 = 1 << 32;

const STATUS_FEATURES_OK: u32 = 8;
pub(super) const STATUS_ACKNOWLEDGE: u32 = 1;
pub(super) const STATUS_DRIVER_OK: u32 = 4;
const STATUS_NEEDS_RESET: u32 = 0x40;

/// What one queue is configured to, before `DRIVER_OK`.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
struct QueueRegisters {
    size: u16,
    ready: bool,
    rings: RingAddresses,
}

/// Everything a driver wrote.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Registers {
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueRegisters>,
}

/// Saved state of a transport with its device.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TransportState {
    /// [`Device::name`].
    pub device: String,
    registers: Registers,
    status: u32,
    interrupt_status: u32,
    completed: u64,
    /// Next available and next used index of each enabled queue, when the device was active.
    active: Option<Vec<Option<(u16, u16)>>>,
    device_state: DeviceState,
}

/// Where the device is.
enum Place {
    /// Here; no driver.
    Idle(Box<dyn Device>),
    /// In its thread.
    Running,
    /// Here; its thread stopped for a pause or by itself.
    Stopped(Box<dyn Device>, Box<Active>),
    /// Its thread is gone.
    Lost,
}

/// A device in a slot.
pub struct Transport {
    id: u32,
    name: &'static str,
    offered: u64,
    queue_sizes: Vec<u16>,
    config: Arc<dyn ConfigSpace>,
    memory: GuestMemory,
    kicks: Vec<EventFd>,
    interrupt: Interrupt,
    acknowledged: EventFd,
    stop: EventFd,
    completed: Arc<AtomicU64>,
    status: Arc<AtomicU32>,
    registers: Registers,
    worker: Worker,
    place: Place,
}

impl Transport {
    /// A transport for `device`, whose driver is not there yet. Starts the device's thread, which
    /// waits. `line` is the event of its interrupt line; `on_failure` gets the reason when the device
    /// fails.
    ///
    /// # Errors
    /// Those of eventfd(2) and of starting a thread.
    pub fn new(
        device: Box<dyn Device>,
        memory: GuestMemory,
        line: EventFd,
        on_failure: OnFailure,
    ) -> std::io::Result<Self> {
        let queue_sizes = device.queue_sizes().to_vec();
        let kicks = queue_sizes
            .iter()
            .map(|_| eventfd())
            .collect::<Result<_, _>>()?;
        let interrupt = Interrupt::new(line);
        let status = Arc::new(AtomicU32::new(0));
        let name = device.name();
        let worker = {
            let status = status.clone();
            let interrupt = interrupt.clone();
            Worker::start(
                name,
                Box::new(move |error| {
                    status.fetch_or(STATUS_NEEDS_RESET, Ordering::AcqRel);
                    interrupt.config_changed();
                    on_failure(error);
                }),
            )?
        };
        Ok(Self {
            id: device.id(),
            name,
            offered: device.features() | F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC,
            registers: Registers::for_queues(&queue_sizes),
            queue_sizes,
            config: device.config(),
            memory,
            kicks,
            interrupt,
            acknowledged: eventfd()?,
            stop: eventfd()?,
            completed: Arc::new(AtomicU64::new(0)),
            status,
            worker,
            place: Place::Idle(device),
        })
    }

    /// [`Device::name`].
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// For looking at it from outside.
    pub fn view(&self) -> View {
        View {
            name: self.name,
            status: self.status.clone(),
            completed: self.completed.clone(),
        }
    }

    /// The event of each queue's notification, for ioeventfds.
    pub fn kicks(&self) -> &[EventFd] {
        &self.kicks
    }

    /// Takes the driver's writes to `InterruptACK`, for an ioeventfd. Nobody reads it.
    pub fn acknowledged(&self) -> &EventFd {
        &self.acknowledged
    }

    /// The guest reads from the slot.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG_SPACE) {
            self.config.read(offset, data);
            return;
        }
        data.fill(0);
        if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    /// The guest writes to the slot.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIG_SPACE) {
            self.config.write(offset, data);
        } else if let Ok(data) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }

    fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    fn queue(&self) -> Option<&QueueRegisters> {
        self.registers.queues.get(self.registers.queue_sel as usize)
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => self.id,
            0x0c => VENDOR,
            // Only the low and the high word exist.
            0x10 => match self.registers.device_features_sel {
                0 => self.offered as u32,
                1 => (self.offered >> 32) as u32,
                _ => 0,
            },
            0x34 => self
                .queue_sizes
                .get(self.registers.queue_sel as usize)
                .map_or(0, |size| u32::from(*size)),
            0x44 => self.queue().map_or(0, |queue| u32::from(queue.ready)),
            0x60 => self.interrupt.take_status(),
            0x70 => self.status(),
            // There are no shared memory regions: length and base are all ones.
            0xb0 | 0xb4 | 0xb8 | 0xbc => u32::MAX,
            0xfc => self.config.generation(),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            0x14 => self.registers.device_features_sel = value,
            0x20 if self.status() & STATUS_FEATURES_OK == 0 => self.select_features(value),
            0x24 => self.registers.driver_features_sel = value,
            0x30 => self.registers.queue_sel = value,
            // Only without an ioeventfd.
            0x50 => {
                if let Some(kick) = self.kicks.get(value as usize) {
                    let _ = kick.write(1);
                }
            }
            0x70 => self.set_status(value),
            0x38..=0xa4 if self.status() & STATUS_DRIVER_OK == 0 => {
                self.configure_queue(offset, value);
            }
            _ => {}
        }
    }

    fn select_features(&mut self, value: u32) {
        let (shift, mask) = match self.registers.driver_features_sel {
            0 => (0, !0xffff_ffff_u64),
            1 => (32, 0xffff_ffff),
            _ => return,
        };
        let kept = self.registers.driver_features & mask;
        self.registers.driver_features = kept | (u64::from(value) << shift);
    }

    fn configure_queue(&mut self, offset: u64, value: u32) {
        let index = self.registers.queue_sel as usize;
        let Some(queue) = self.registers.queues.get_mut(index) else {
            return;
        };
        let rings = &mut queue.rings;
        match offset {
            // What does not fit becomes a size that activation refuses.
            0x38 => queue.size = u16::try_from(value).unwrap_or(0),
            0x44 => queue.ready = value & 1 != 0,
            0x80 => set_low(&mut rings.descriptors, value),
            0x84 => set_high(&mut rings.descriptors, value),
            0x90 => set_low(&mut rings.available, value),
            0x94 => set_high(&mut rings.available, value),
            0xa0 => set_low(&mut rings.used, value),
            0xa4 => set_high(&mut rings.used, value),
            _ => {}
        }
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        let old = self.status();
        // A driver can only add bits; NEEDS_RESET is the device's.
        let mut new = old | (value & 0xff & !STATUS_NEEDS_RESET);
        let added = new & !old;
        if added & STATUS_FEATURES_OK != 0 && !self.features_acceptable() {
            new &= !STATUS_FEATURES_OK;
        }
        if new & STATUS_FEATURES_OK == 0 {
            new &= !STATUS_DRIVER_OK;
        }
        self.status.store(new, Ordering::Release);
        if new & !old & STATUS_DRIVER_OK != 0 {
            self.start(None);
        }
    }

    fn features_acceptable(&self) -> bool {
        let accepted = self.registers.driver_features;
        accepted & !self.offered == 0 && accepted & F_VERSION_1 != 0
    }

    /// Consumes the configuration and sends the device to its thread.
    fn start(&mut self, positions: Option<&[Option<(u16, u16)>]>) {
        match self.activate(positions) {
            Ok(active) => match std::mem::replace(&mut self.place, Place::Lost) {
                Place::Idle(device) => self.dispatch(device, Box::new(active)),
                other => self.place = other,
            },
            Err(error) => {
                self.status.fetch_or(STATUS_NEEDS_RESET, Ordering::AcqRel);
                self.interrupt.config_changed();
                self.worker.report(&DeviceError::Queue(error));
            }
        }
    }

    fn dispatch(&mut self, device: Box<dyn Device>, active: Box<Active>) {
        self.place = if self.worker.send(device, active) {
            Place::Running
        } else {
            Place::Lost
        };
    }

    fn activate(&self, positions: Option<&[Option<(u16, u16)>]>) -> Result<Active, QueueError> {
        let features = self.registers.driver_features;
        let mut queues = Vec::with_capacity(self.queue_sizes.len());
        for (index, registers) in self.registers.queues.iter().enumerate() {
            if !registers.ready {
                queues.push(None);
                continue;
            }
            if registers.size > self.queue_sizes[index] {
                return Err(QueueError::Size(registers.size));
            }
            let (next_available, next_used) = positions
                .and_then(|positions| positions.get(index).copied().flatten())
                .unwrap_or((0, 0));
            let setup = QueueSetup {
                size: registers.size,
                rings: registers.rings,
                next_available,
                next_used,
                event_index: features & F_EVENT_IDX != 0,
                indirect: features & F_INDIRECT_DESC != 0,
            };
            let kick = self.kicks[index].try_clone().map_err(access)?;
            queues.push(Some(ActiveQueue::new(
                &self.memory,
                setup,
                kick,
                self.completed.clone(),
            )?));
        }
        Ok(Active {
            memory: self.memory.clone(),
            features,
            queues,
            interrupt: self.interrupt.clone(),
            stop: self.stop.try_clone().map_err(access)?,
            completed: self.completed.clone(),
        })
    }

    /// Power-on state; the device is taken back from its thread.
    fn reset(&mut self) {
        self.pause();
        match std::mem::replace(&mut self.place, Place::Lost) {
            Place::Idle(mut device) | Place::Stopped(mut device, _) => {
                device.reset();
                self.place = Place::Idle(device);
            }
            other => self.place = other,
        }
        self.registers = Registers::for_queues(&self.queue_sizes);
        self.interrupt.clear();
        self.status.store(0, Ordering::Release);
    }

    /// Stops the device's thread with nothing in flight.
    pub fn pause(&mut self) {
        if !matches!(self.place, Place::Running) {
            return;
        }
        // The counter cannot be full.
        let _ = self.stop.write(1);
        self.place = match self.worker.receive() {
            Some((device, active)) => Place::Stopped(device, active),
            None => Place::Lost,
        };
        let _ = self.stop.read();
    }

    /// Goes on after [`Transport::pause`].
    pub fn resume(&mut self) {
        if self.status() & STATUS_NEEDS_RESET != 0 {
            return;
        }
        match std::mem::replace(&mut self.place, Place::Lost) {
            Place::Stopped(device, active) => self.dispatch(device, active),
            other => self.place = other,
        }
    }

    /// State of the paused device and its transport.
    ///
    /// # Errors
    /// Those of [`Device::save`]; [`DeviceError::State`] while the device runs.
    pub fn save(&self) -> Result<TransportState, DeviceError> {
        let (device, active) = match &self.place {
            Place::Idle(device) => (device, None),
            Place::Stopped(device, active) => (device, Some(active)),
            Place::Running | Place::Lost => {
                return Err(DeviceError::State("the device is not paused".into()));
            }
        };
        let positions = active.map(|active| {
            let queues = active.queues.iter();
            queues
                .map(|queue| queue.as_ref().map(ActiveQueue::position))
                .collect()
        });
        Ok(TransportState {
            device: self.name.into(),
            registers: self.registers.clone(),
            status: self.status(),
            interrupt_status: self.interrupt.status(),
            completed: self.completed.load(Ordering::Relaxed),
            active: positions,
            device_state: device.save()?,
        })
    }

    /// Takes over a saved state, right after [`Transport::new`]. The device stays paused.
    ///
    /// # Errors
    /// [`DeviceError::State`] when the state is another device's or does not fit, and those of
    /// [`Device::restore`].
    pub fn restore(&mut self, state: &TransportState) -> Result<(), DeviceError> {
        let mismatch = |what: &str| DeviceError::State(what.to_owned());
        if state.device != self.name {
            return Err(DeviceError::State(format!(
                "saved as \"{}\", restored as \"{}\"",
                state.device, self.name
            )));
        }
        if state.registers.queues.len() != self.queue_sizes.len() {
            return Err(mismatch("another number of queues"));
        }
        if state.registers.driver_features & !self.offered != 0 {
            return Err(mismatch("the driver uses features the device lacks"));
        }
        let Place::Idle(mut device) = std::mem::replace(&mut self.place, Place::Lost) else {
            return Err(mismatch("the device is in use"));
        };
        device.restore(&state.device_state)?;
        self.registers = state.registers.clone();
        self.status.store(state.status, Ordering::Release);
        self.completed.store(state.completed, Ordering::Relaxed);
        self.place = match &state.active {
            Some(positions) => {
                let active = self.activate(Some(positions))?;
                Place::Stopped(device, Box::new(active))
            }
            None => Place::Idle(device),
        };
        // A lost edge would leave the driver waiting; a spurious interrupt is harmless.
        self.interrupt.reraise(state.interrupt_status);
        Ok(())
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        self.pause();
    }
}

impl Registers {
    fn for_queues(sizes: &[u16]) -> Self {
        Self {
            queues: vec![QueueRegisters::default(); sizes.len()],
            ..Self::default()
        }
    }
}

/// What the guest reads from a slot without a device: the placeholder of section 4.2.3.1, which
/// drivers skip.
pub fn read_empty(offset: u64, data: &mut [u8]) {
    let register = match offset {
        0x00 => MAGIC,
        0x04 => VERSION,
        _ => 0,
    };
    data.fill(0);
    if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
        *data = register.to_le_bytes();
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = (*address & !0xffff_ffff) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = (*address & 0xffff_ffff) | (u64::from(value) << 32);
}

fn eventfd() -> std::io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

fn access(error: std::io::Error) -> QueueError {
    QueueError::Access(error.to_string())
}
