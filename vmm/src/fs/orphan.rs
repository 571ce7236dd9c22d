//! Answers in place of a file server that has gone: an I/O error to every
//! FUSE request (`include/uapi/linux/fuse.h`), so that no process of the guest
//! waits for ever.

use crate::{
    memory::GuestMemory,
    virtio::{Active, Chain, DeviceError},
};

/// fuse_in_header.
const IN_HEADER_BYTES: usize = 40;
/// fuse_out_header.
const OUT_HEADER_BYTES: u32 = 16;
/// Requests that have no answer.
const FORGET: u32 = 2;
const BATCH_FORGET: u32 = 42;

/// Answers until `active.stop` is readable.
pub(super) fn answer(active: &mut Active) -> Result<(), DeviceError> {
    let (memory, interrupt) = (active.memory.clone(), active.interrupt.clone());
    let enabled: Vec<usize> = (0..active.queues.len())
        .filter(|index| active.queues[*index].is_some())
        .collect();
    loop {
        for queue in active.queues.iter_mut().flatten() {
            queue.serve(&memory, &interrupt, |chain| refuse(chain, &memory))?;
        }
        if !active.wait(&enabled)? {
            return Ok(());
        }
    }
}

/// Writes the error; the number of bytes written.
fn refuse(chain: &Chain, memory: &GuestMemory) -> Result<u32, DeviceError> {
    let mut header = [0; IN_HEADER_BYTES];
    chain.reader(memory).read(&mut header)?;
    let opcode = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
    if opcode == FORGET || opcode == BATCH_FORGET || chain.writable_bytes() == 0 {
        return Ok(0);
    }
    let mut answer = [0; OUT_HEADER_BYTES as usize];
    answer[..4].copy_from_slice(&OUT_HEADER_BYTES.to_le_bytes());
    answer[4..8].copy_from_slice(&(-libc::EIO).to_le_bytes());
    answer[8..].copy_from_slice(&header[8..16]);
    let mut writer = chain.writer(memory);
    writer.write(&answer)?;
    Ok(writer.written())
}
