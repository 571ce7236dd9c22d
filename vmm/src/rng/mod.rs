//! virtio-rng (virtio 1.2 section 5.4): the host's getrandom(2).

use std::sync::Arc;

use rustix::rand::GetRandomFlags;

use crate::virtio::{Active, ConfigSpace, Device, DeviceError, DeviceState, EmptyConfig};

const DEVICE_ID: u32 = 4;
const QUEUE_SIZE: u16 = 8;
const STATE_VERSION: u16 = 1;
/// Most bytes per request: a driver that wants more asks again.
const MAX_BYTES: usize = 256;

/// The entropy source.
#[derive(Debug, Default)]
pub struct Rng;

impl Device for Rng {
    fn id(&self) -> u32 {
        DEVICE_ID
    }

    fn name(&self) -> &'static str {
        "rng"
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::new(EmptyConfig)
    }

    fn run(&mut self, active: &mut Active) -> Result<(), DeviceError> {
        let memory = active.memory.clone();
        let interrupt = active.interrupt.clone();
        let mut buffer = [0; MAX_BYTES];
        loop {
            active.queue(0)?.serve(&memory, &interrupt, |chain| {
                // At most MAX_BYTES.
                let count = chain.writable_bytes().min(MAX_BYTES as u64) as usize;
                let bytes = &mut buffer[..count];
                // Requests of up to 256 bytes are neither cut nor interrupted (getrandom(2)).
                rustix::rand::getrandom(&mut *bytes, GetRandomFlags::empty())
                    .map_err(DeviceError::io("getrandom"))?;
                let mut writer = chain.writer(&memory);
                writer.write(bytes)?;
                Ok(writer.written())
            })?;
            if !active.wait(&[0])? {
                return Ok(());
            }
        }
    }

    fn reset(&mut self) {}

    fn save(&self) -> Result<DeviceState, DeviceError> {
        Ok(DeviceState {
            version: STATE_VERSION,
            data: serde_json::Value::Null,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        state.expect_version(STATE_VERSION)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Buffer, TestDriver};

    #[test]
    fn requests_get_random_bytes_up_to_the_cap() {
        let mut driver = TestDriver::start(Rng, 0);
        let (length, first) = driver.request(0, &[Buffer::Writable(64)]);
        assert_eq!(length, 64);
        let (_, second) = driver.request(0, &[Buffer::Writable(64)]);
        assert_ne!(first, second);
        let (length, bytes) = driver.request(0, &[Buffer::Writable(300), Buffer::Writable(4096)]);
        assert_eq!(length, 256);
        assert!(bytes[256..].iter().all(|byte| *byte == 0));
        driver.pause().unwrap();
        driver.resume();
        let (length, _) = driver.request(0, &[Buffer::Writable(1)]);
        assert_eq!(length, 1);
    }
}
