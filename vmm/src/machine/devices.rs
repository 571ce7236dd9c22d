//! Devices from their configurations.

use caisson_vmm_api::DeviceConfig;

use super::{Fds, Machine, MachineError};
use crate::{console::Console, rng::Rng, virtio::Device};

impl Machine {
    /// Builds the device that `config` describes over the descriptors in `fds`.
    pub(super) fn build_device(
        &mut self,
        config: &DeviceConfig,
        fds: &mut Fds,
    ) -> Result<Box<dyn Device>, MachineError> {
        Ok(match config {
            DeviceConfig::Console { output } => {
                let output = output
                    .map(|fd| fds.take(fd, "console output"))
                    .transpose()?;
                Box::new(Console::new(self.tail.clone(), output))
            }
            DeviceConfig::Rng => Box::new(Rng),
            other => {
                return Err(MachineError::Invalid(format!(
                    "this build has no such device: {other:?}"
                )));
            }
        })
    }
}
