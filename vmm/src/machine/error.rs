//! Why something could not be done with a microVM.

use caisson_vmm_api::{Failure, FailureKind};

use crate::{
    arch::{BootError, MpTableError},
    memory::{LayoutError, MemoryError},
    snapshot::SnapshotError,
    virtio::DeviceError,
};

/// Why a request on a microVM failed.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// Not possible now.
    #[error("{0}")]
    State(String),
    /// Nothing left of something.
    #[error("{0}")]
    Exhausted(String),
    /// Memory sizes that make no guest.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// Guest memory could not be mapped.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel could not be made ready.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The MP table could not be made.
    #[error(transparent)]
    MpTable(#[from] MpTableError),
    /// A KVM ioctl failed.
    #[error("{ioctl}: {source}")]
    Kvm {
        /// Which.
        ioctl: &'static str,
        /// Why.
        source: kvm_ioctls::Error,
    },
    /// A device could not be built, saved or restored.
    #[error("device \"{device}\": {source}")]
    Device {
        /// Its name.
        device: String,
        /// Why.
        source: DeviceError,
    },
    /// Saved state is of no use.
    #[error("saved state: {0}")]
    Snapshot(String),
    /// The microVM could not be saved or restored.
    #[error(transparent)]
    Saving(#[from] SnapshotError),
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
}

impl MachineError {
    /// For `map_err`: [`MachineError::Kvm`].
    pub fn kvm(ioctl: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { ioctl, source }
    }

    /// For `map_err`: [`MachineError::Io`].
    pub fn io<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Io {
            what,
            source: source.into(),
        }
    }

    /// For `map_err`: [`MachineError::Device`].
    pub fn device<E: Into<DeviceError>>(device: &str) -> impl FnOnce(E) -> Self {
        let device = device.to_owned();
        move |source| Self::Device {
            device,
            source: source.into(),
        }
    }

    fn kind(&self) -> FailureKind {
        match self {
            Self::Invalid(_) | Self::Layout(_) | Self::MpTable(_) => FailureKind::InvalidArgument,
            Self::State(_) => FailureKind::WrongState,
            Self::Exhausted(_) | Self::Memory(_) => FailureKind::Exhausted,
            Self::Boot(BootError::Kernel(_)) => FailureKind::BadKernel,
            Self::Boot(BootError::Kvm { .. }) | Self::Kvm { .. } => FailureKind::Kvm,
            Self::Boot(_) => FailureKind::InvalidArgument,
            Self::Saving(SnapshotError::Io { .. }) => FailureKind::Io,
            Self::Saving(SnapshotError::Kvm { .. }) => FailureKind::Kvm,
            Self::Snapshot(_)
            | Self::Saving(_)
            | Self::Device {
                source: DeviceError::State(_),
                ..
            } => FailureKind::BadSnapshot,
            Self::Device {
                source: DeviceError::Backend(_),
                ..
            } => FailureKind::InvalidArgument,
            Self::Device { .. } | Self::Io { .. } => FailureKind::Io,
        }
    }
}

impl From<MachineError> for Failure {
    fn from(error: MachineError) -> Self {
        Self {
            kind: error.kind(),
            message: error.to_string(),
        }
    }
}
