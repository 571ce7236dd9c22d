//! The state document.

use std::{
    fs::File,
    io::{BufWriter, Read, Seek, Write},
    os::fd::OwnedFd,
};

use caisson_vmm_api::{MemoryConfig, VcpuConfig};
use kvm_bindings::{
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use serde::{Deserialize, Serialize};

use crate::virtio::TransportState;

/// What a state file begins with.
const MAGIC: &str = "caisson-vmm state";
/// Version of [`SavedMachine`]; there is no conversion between versions.
const VERSION: u32 = 1;
/// Most bytes of a state file: 64 vCPUs and 32 devices make less than 8 MiB.
const MAX_BYTES: u64 = 64 << 20;

/// Why a microVM cannot be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A file could not be read or written.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// Not a state document.
    #[error("the state file is no state of this VMM: {0}")]
    Malformed(String),
    /// It does not fit this host or this configuration.
    #[error("{0}")]
    Mismatch(String),
    /// A KVM ioctl failed.
    #[error("{ioctl}: {source}")]
    Kvm {
        /// Which.
        ioctl: &'static str,
        /// Why.
        source: kvm_ioctls::Error,
    },
}

impl SnapshotError {
    pub(super) fn io<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Io {
            what,
            source: source.into(),
        }
    }

    pub(super) fn kvm(ioctl: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { ioctl, source }
    }
}

/// A whole microVM without its memory.
#[derive(Serialize, Deserialize)]
pub struct SavedMachine {
    magic: String,
    version: u32,
    /// As booted.
    pub vcpu_config: VcpuConfig,
    /// As booted.
    pub memory_config: MemoryConfig,
    /// Processors in order.
    pub vcpus: Vec<SavedVcpu>,
    /// Interrupt controllers, timer, clock.
    pub vm: SavedVm,
    /// Filled slots in order.
    pub devices: Vec<SavedDevice>,
    /// Printed so far.
    pub console_tail: String,
}

/// One filled slot.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SavedDevice {
    /// Its number.
    pub slot: u32,
    /// Transport and device.
    pub transport: TransportState,
}

/// One processor.
#[derive(Serialize, Deserialize)]
pub struct SavedVcpu {
    pub(super) cpuid: Vec<kvm_cpuid_entry2>,
    pub(super) mp_state: kvm_mp_state,
    pub(super) regs: kvm_regs,
    pub(super) sregs: kvm_sregs,
    pub(super) xsave: kvm_xsave,
    pub(super) xcrs: kvm_xcrs,
    pub(super) debug_registers: kvm_debugregs,
    pub(super) lapic: kvm_lapic_state,
    pub(super) msrs: Vec<kvm_msr_entry>,
    pub(super) events: kvm_vcpu_events,
    pub(super) tsc_khz: Option<u32>,
}

/// What belongs to no processor.
#[derive(Serialize, Deserialize)]
pub struct SavedVm {
    pub(super) clock: kvm_clock_data,
    pub(super) irqchips: Vec<kvm_irqchip>,
    pub(super) pit: Option<kvm_pit_state2>,
}

impl SavedMachine {
    /// A document of the current version.
    pub fn new(
        vcpu_config: VcpuConfig,
        memory_config: MemoryConfig,
        vcpus: Vec<SavedVcpu>,
        vm: SavedVm,
        devices: Vec<SavedDevice>,
        console_tail: String,
    ) -> Self {
        Self {
            magic: MAGIC.into(),
            version: VERSION,
            vcpu_config,
            memory_config,
            vcpus,
            vm,
            devices,
            console_tail,
        }
    }

    /// Replaces the contents of `file`.
    ///
    /// # Errors
    /// [`SnapshotError::Io`].
    pub fn write(&self, file: OwnedFd) -> Result<(), SnapshotError> {
        let io = SnapshotError::io::<std::io::Error>;
        let mut file = File::from(file);
        file.set_len(0).map_err(io("truncating the state file"))?;
        file.rewind().map_err(io("rewinding the state file"))?;
        let mut writer = BufWriter::new(file);
        serde_json::to_writer(&mut writer, self)
            .map_err(|error| io("writing the state file")(error.into()))?;
        writer.flush().map_err(io("writing the state file"))
    }

    /// Reads what [`SavedMachine::write`] wrote.
    ///
    /// # Errors
    /// [`SnapshotError`]: unreadable, too long, malformed, or of another version.
    pub fn read(file: OwnedFd) -> Result<Self, SnapshotError> {
        #[derive(Deserialize)]
        struct Header {
            magic: String,
            version: u32,
        }
        let io = SnapshotError::io::<std::io::Error>;
        let mut file = File::from(file);
        file.rewind().map_err(io("rewinding the state file"))?;
        let mut text = Vec::new();
        file.take(MAX_BYTES + 1)
            .read_to_end(&mut text)
            .map_err(io("reading the state file"))?;
        if text.len() as u64 > MAX_BYTES {
            return Err(SnapshotError::Malformed(format!(
                "longer than {MAX_BYTES} bytes"
            )));
        }
        let malformed = |error: serde_json::Error| SnapshotError::Malformed(error.to_string());
        let header: Header = serde_json::from_slice(&text).map_err(malformed)?;
        if header.magic != MAGIC {
            return Err(SnapshotError::Malformed("another magic".into()));
        }
        if header.version != VERSION {
            return Err(SnapshotError::Mismatch(format!(
                "state version {} is not the {VERSION} this VMM knows",
                header.version
            )));
        }
        serde_json::from_slice(&text).map_err(malformed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> String {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        match SavedMachine::read(file.into()) {
            Ok(_) => panic!("accepted"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn foreign_and_cut_documents_are_refused() {
        assert!(read("").contains("no state of this VMM"));
        assert!(read("{\"magic\":\"x\",\"version\":1}").contains("another magic"));
        let other = format!("{{\"magic\":\"{MAGIC}\",\"version\":99}}");
        assert!(read(&other).contains("state version 99 is not the 1"));
        let cut = format!("{{\"magic\":\"{MAGIC}\",\"version\":1,\"vcpus\":[]}}");
        assert!(read(&cut).contains("missing field"));
    }
}
