//! What vCPU exits reach: the virtio-mmio slots and a few I/O ports.

use std::{
    ops::Range,
    sync::{Mutex, MutexGuard, PoisonError},
};

use caisson_vmm_api::ExitReason;

use crate::{
    console::{EarlySerial, Tail},
    virtio::{SLOT_BYTES, Transport, read_empty},
};

/// Number of virtio-mmio slots.
pub const SLOT_COUNT: u32 = 32;
/// Guest-physical address of slot 0.
const SLOT_BASE: u64 = 0xd000_0000;
/// Interrupts of slots, shared when there are more slots: 0..4 are the PC's timer, keyboard,
/// cascade and serial ports, 23 the I/O APIC's last.
const FIRST_INTERRUPT: u32 = 5;
const LAST_INTERRUPT: u32 = 23;

/// Command and status port of the keyboard controller.
const KEYBOARD_COMMAND: u16 = 0x64;
/// Command "pulse the reset line" (`reboot=k` of Linux).
const KEYBOARD_RESET: u8 = 0xfe;

/// What a port write leads to.
#[derive(Debug, PartialEq, Eq)]
pub enum PortWrite {
    /// Nothing more.
    Done,
    /// The guest asks for a reset.
    Reset,
}

/// Slots and ports. Each slot has a lock of its own, which the data path (ioeventfd, irqfd) never takes.
pub struct Bus {
    slots: Vec<Mutex<Option<Transport>>>,
    serial: Mutex<EarlySerial>,
    tail: Tail,
    read_only: Vec<Range<u64>>,
}

/// Guest-physical address of a slot.
pub fn slot_address(slot: u32) -> u64 {
    SLOT_BASE + u64::from(slot) * SLOT_BYTES
}

/// Global system interrupt of a slot.
pub fn slot_interrupt(slot: u32) -> u32 {
    FIRST_INTERRUPT + slot % (LAST_INTERRUPT - FIRST_INTERRUPT + 1)
}

/// What the kernel command line says of the slots
/// (Linux, drivers/virtio/virtio_mmio.c: `virtio_mmio.device=<size>@<baseaddr>:<irq>`).
pub fn slots_cmdline() -> String {
    let slots = 0..SLOT_COUNT;
    slots
        .map(|slot| {
            let (address, interrupt) = (slot_address(slot), slot_interrupt(slot));
            format!(" virtio_mmio.device=4K@{address:#x}:{interrupt}")
        })
        .collect()
}

impl Bus {
    /// Empty slots, and a serial port that prints to `tail`. `read_only` are the ranges of guest
    /// memory that cannot be written.
    pub fn new(tail: Tail, read_only: Vec<Range<u64>>) -> Self {
        Self {
            slots: (0..SLOT_COUNT).map(|_| Mutex::new(None)).collect(),
            serial: Mutex::new(EarlySerial::new(tail.clone())),
            tail,
            read_only,
        }
    }

    /// Whether `address` lies in memory that the guest can only read: a write there comes to the
    /// bus.
    pub fn is_read_only_memory(&self, address: u64) -> bool {
        self.read_only.iter().any(|range| range.contains(&address))
    }

    /// The slot of that number, below [`SLOT_COUNT`].
    pub fn slot(&self, slot: u32) -> Option<MutexGuard<'_, Option<Transport>>> {
        let slot = self.slots.get(slot as usize)?;
        // A transport is a plain register file: after a panic elsewhere it is as good as before.
        Some(slot.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The guest reads device memory.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.locate(address) {
            Some((Some(transport), offset)) => {
                if let Some(transport) = transport.as_ref() {
                    transport.read(offset, data);
                } else {
                    read_empty(offset, data);
                }
            }
            _ => data.fill(0xff),
        }
    }

    /// The guest writes device memory.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((Some(mut transport), offset)) = self.locate(address)
            && let Some(transport) = transport.as_mut()
        {
            transport.write(offset, data);
        }
    }

    /// The guest reads a port. Where nothing is, all bits are set.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        let [value] = data else { return };
        if EarlySerial::covers(port) {
            *value = self.lock_serial().read(port);
        } else if port == KEYBOARD_COMMAND {
            // Ready for a command, nothing to fetch.
            *value = 0;
        }
    }

    /// The guest writes a port.
    pub fn port_write(&self, port: u16, data: &[u8]) -> PortWrite {
        if EarlySerial::covers(port) {
            let mut serial = self.lock_serial();
            for value in data {
                serial.write(port, *value);
            }
        } else if port == KEYBOARD_COMMAND && data == [KEYBOARD_RESET] {
            return PortWrite::Reset;
        }
        PortWrite::Done
    }

    /// Why the guest asked for a reset: after a panic it does as well (`panic=-1`).
    pub fn reset_reason(&self) -> ExitReason {
        if self.tail.holds_panic() {
            ExitReason::GuestPanic
        } else {
            ExitReason::GuestShutdown
        }
    }

    fn lock_serial(&self) -> MutexGuard<'_, EarlySerial> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn locate(&self, address: u64) -> Option<(Option<MutexGuard<'_, Option<Transport>>>, u64)> {
        let offset = address.checked_sub(SLOT_BASE)?;
        let slot = u32::try_from(offset / SLOT_BYTES).ok()?;
        Some((self.slot(slot), offset % SLOT_BYTES))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bus: &Bus, address: u64) -> u32 {
        let mut data = [0; 4];
        bus.mmio_read(address, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn empty_slots_are_placeholders_and_the_rest_is_nothing() {
        let bus = Bus::new(Tail::default(), vec![0x1000..0x2000, 0..0]);
        for slot in 0..SLOT_COUNT {
            let base = slot_address(slot);
            assert_eq!(read(&bus, base), 0x7472_6976);
            assert_eq!(read(&bus, base + 4), 2);
            assert_eq!(read(&bus, base + 8), 0);
            bus.mmio_write(base + 0x70, &[0xff; 4]);
            assert_eq!(read(&bus, base + 0x70), 0);
        }
        assert_eq!(read(&bus, slot_address(SLOT_COUNT)), u32::MAX);
        assert_eq!(read(&bus, 0x1000), u32::MAX);
        assert_eq!(read(&bus, u64::MAX - 3), u32::MAX);
        assert!(bus.is_read_only_memory(0x1fff));
        assert!(!bus.is_read_only_memory(0x2000));
    }

    #[test]
    fn interrupts_stay_within_the_io_apic() {
        let used: Vec<_> = (0..SLOT_COUNT).map(slot_interrupt).collect();
        assert_eq!((used[0], used[18], used[19]), (5, 23, 5));
        assert!(used.iter().all(|line| (5..=23).contains(line)));
        assert!(slots_cmdline().starts_with(" virtio_mmio.device=4K@0xd0000000:5 virtio"));
        // Half of what Linux takes, so that the parent has the other half.
        assert!(slots_cmdline().len() < 1200);
    }

    #[test]
    fn the_keyboard_controller_resets() {
        let tail = Tail::default();
        let bus = Bus::new(tail.clone(), Vec::new());
        let mut status = [0xff];
        bus.port_read(0x64, &mut status);
        assert_eq!(status[0] & 2, 0);
        assert_eq!(bus.port_write(0x64, &[0x20]), PortWrite::Done);
        assert_eq!(bus.port_write(0x64, &[0xfe]), PortWrite::Reset);
        assert_eq!(bus.reset_reason(), ExitReason::GuestShutdown);
        for byte in b"Kernel panic - not syncing: Attempted to kill init!" {
            assert_eq!(bus.port_write(0x3f8, &[*byte]), PortWrite::Done);
        }
        assert_eq!(bus.reset_reason(), ExitReason::GuestPanic);
        let mut wide = [0; 4];
        bus.port_read(0x64, &mut wide);
        assert_eq!(wide, [0xff; 4]);
    }
}
