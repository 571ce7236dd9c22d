//! virtio-console with one port (virtio 1.2 section 5.3), output only.

use std::{os::fd::OwnedFd, sync::Arc};

use rustix::event::{PollFd, PollFlags, poll};

use super::Tail;
use crate::virtio::{Active, ConfigSpace, Device, DeviceError, DeviceState, EmptyConfig, Reader};

const DEVICE_ID: u32 = 3;
const QUEUE_SIZE: u16 = 64;
/// The queue of port 0 that the driver fills. Queue 0 takes input, of which there is none.
const TRANSMIT: usize = 1;
const STATE_VERSION: u16 = 1;
/// Most bytes copied at once.
const PIECE: usize = 4096;

/// The console.
pub struct Console {
    tail: Tail,
    output: Option<OwnedFd>,
    buffer: Box<[u8; PIECE]>,
}

impl Console {
    /// Prints to `tail`, and to `output` what fits there without waiting.
    pub fn new(tail: Tail, output: Option<OwnedFd>) -> Self {
        Self {
            tail,
            output,
            buffer: Box::new([0; PIECE]),
        }
    }

    fn print(&mut self, reader: &mut Reader<'_>) -> Result<(), DeviceError> {
        while reader.remaining() > 0 {
            // At most PIECE.
            let count = reader.remaining().min(PIECE as u64) as usize;
            let bytes = &mut self.buffer[..count];
            reader.read(bytes)?;
            self.tail.push(bytes);
            if let Some(output) = &self.output {
                write_what_fits(output, bytes);
            }
        }
        Ok(())
    }
}

/// Never waits: output that does not fit is dropped. A descriptor may be blocking (it is the
/// parent's), so it is polled first, and a pipe that polls writable takes `PIPE_BUF` bytes.
fn write_what_fits(output: &OwnedFd, bytes: &[u8]) {
    let mut fds = [PollFd::new(output, PollFlags::OUT)];
    let now = rustix::event::Timespec::default();
    if matches!(poll(&mut fds, Some(&now)), Ok(1)) && fds[0].revents().contains(PollFlags::OUT) {
        // A reader that is gone is no reason for the guest to stop.
        let _ = rustix::io::write(output, bytes);
    }
}

impl Device for Console {
    fn id(&self) -> u32 {
        DEVICE_ID
    }

    fn name(&self) -> &'static str {
        "console"
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::new(EmptyConfig)
    }

    fn run(&mut self, active: &mut Active) -> Result<(), DeviceError> {
        let memory = active.memory.clone();
        let interrupt = active.interrupt.clone();
        loop {
            let queue = active.queue(TRANSMIT)?;
            queue.serve(&memory, &interrupt, |chain| {
                self.print(&mut chain.reader(&memory)).map(|()| 0)
            })?;
            if !active.wait(&[TRANSMIT])? {
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
    use std::io::Read;

    use super::*;
    use crate::virtio::testing::{Buffer, TestDriver};

    #[test]
    fn output_reaches_tail_and_descriptor() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let tail = Tail::default();
        let console = Console::new(tail.clone(), Some(writer.into()));
        let mut driver = TestDriver::start(console, 1 << 29);
        let (length, _) = driver.request(
            TRANSMIT,
            &[Buffer::Readable(b"hello "), Buffer::Readable(b"world")],
        );
        assert_eq!(length, 0);
        assert_eq!(tail.text(), "hello world");
        let (console, result) = driver.stop();
        result.unwrap();
        drop(console);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello world");
    }

    #[test]
    fn a_full_pipe_does_not_stop_the_guest() {
        let (_reader, writer) = std::io::pipe().unwrap();
        let console = Console::new(Tail::default(), Some(writer.into()));
        let mut driver = TestDriver::start(console, 0);
        for _ in 0..40 {
            driver.request(TRANSMIT, &[Buffer::Readable(&[b'x'; 4096])]);
        }
        driver.pause().unwrap();
    }

    #[test]
    fn a_broken_queue_ends_the_device_only() {
        let console = Console::new(Tail::default(), None);
        let mut driver = TestDriver::start(console, 0);
        driver.queues[TRANSMIT].push_available(999);
        driver.queues[TRANSMIT].kick();
        assert!(matches!(driver.join(), Err(DeviceError::Queue(_))));
    }
}
