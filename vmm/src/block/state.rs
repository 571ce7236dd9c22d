//! Saved state: nothing is in flight and the contents are the parent's, so it only says which disk this was.

use serde::{Deserialize, Serialize};

use super::Block;
use crate::virtio::{DeviceError, DeviceState};

const VERSION: u16 = 1;

/// What the guest's driver has seen and must find again.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Identity {
    serial: String,
    sectors: u64,
    read_only: bool,
}

fn identity(block: &Block) -> Identity {
    Identity {
        serial: block.serial.clone(),
        sectors: block.disk.sectors(),
        read_only: block.read_only,
    }
}

pub(super) fn save(block: &Block) -> Result<DeviceState, DeviceError> {
    let data = serde_json::to_value(identity(block))
        .map_err(|error| DeviceError::State(format!("block device {:?}: {error}", block.serial)))?;
    Ok(DeviceState {
        version: VERSION,
        data,
    })
}

pub(super) fn check(block: &Block, state: &DeviceState) -> Result<(), DeviceError> {
    let refuse = |why: String| {
        Err(DeviceError::State(format!(
            "block device {:?}: {why}",
            block.serial
        )))
    };
    if state.version != VERSION {
        return refuse(format!("version {} is not {VERSION}", state.version));
    }
    let saved: Identity = match Identity::deserialize(&state.data) {
        Ok(saved) => saved,
        Err(error) => return refuse(error.to_string()),
    };
    let current = identity(block);
    if saved != current {
        return refuse(format!("saved as {saved:?}, restored over {current:?}"));
    }
    Ok(())
}
