//! Answers in place of a file server that has gone: an I/O error to every
//! FUSE request (`include/uapi/linux/fuse.h`), so that no process of the guest
//! waits for ever.

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
};

use crate::{
    memory::GuestMemory,
    virtio::{Active, ActiveQueue, Chain, DeviceError, Interrupt, event_fd},
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
    let Active {
        memory,
        queues,
        interrupt,
        stop,
        ..
    } = active;
    loop {
        for queue in queues.iter_mut().flatten() {
            refuse_all(queue, memory, interrupt)?;
        }
        let mut fds: Vec<_> = queues
            .iter()
            .flatten()
            .map(|queue| PollFd::from_borrowed_fd(event_fd(queue.kick()), PollFlags::IN))
            .collect();
        fds.push(PollFd::from_borrowed_fd(event_fd(stop), PollFlags::IN));
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(DeviceError::io("poll")(error)),
        }
        if fds.last().is_some_and(|fd| !fd.revents().is_empty()) {
            return Ok(());
        }
        for queue in queues.iter().flatten() {
            // Nothing to read is as good.
            let _ = queue.kick().read();
        }
    }
}

fn refuse_all(
    queue: &mut ActiveQueue,
    memory: &GuestMemory,
    interrupt: &Interrupt,
) -> Result<(), DeviceError> {
    while let Some(chain) = queue.pop(memory)? {
        let written = refuse(&chain, memory)?;
        queue.complete(memory, chain.into_head(), written)?;
    }
    Ok(queue.signal(memory, interrupt)?)
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
