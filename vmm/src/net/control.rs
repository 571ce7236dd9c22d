//! The control queue (virtio 1.2 section 5.1.6.5): how many queue pairs the
//! driver uses. Everything else is refused, since it was not offered.

use crate::{
    memory::GuestMemory,
    virtio::{ActiveQueue, Chain, DeviceError, Interrupt},
};

const CLASS_MQ: u8 = 4;
const MQ_PAIRS_SET: u8 = 0;
const OK: u8 = 0;
const ERROR: u8 = 1;

/// A turn of answering commands. The number of pairs if the driver has set it, at most `max`.
pub(super) fn serve(
    queue: &mut ActiveQueue,
    memory: &GuestMemory,
    interrupt: &Interrupt,
    max: u16,
) -> Result<Option<u16>, DeviceError> {
    let mut pairs = None;
    queue.serve(memory, interrupt, |chain| {
        let wanted = command(chain, memory)?.filter(|wanted| (1..=max).contains(wanted));
        let mut writer = chain.writer(memory);
        writer.write(&[if wanted.is_some() { OK } else { ERROR }])?;
        pairs = wanted.or(pairs);
        Ok(writer.written())
    })?;
    Ok(pairs)
}

/// The argument of VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, if that is the command.
fn command(chain: &Chain, memory: &GuestMemory) -> Result<Option<u16>, DeviceError> {
    let mut reader = chain.reader(memory);
    let mut head = [0; 2];
    reader.read(&mut head)?;
    if head != [CLASS_MQ, MQ_PAIRS_SET] {
        return Ok(None);
    }
    let mut pairs = [0; 2];
    reader.read(&mut pairs)?;
    Ok(Some(u16::from_le_bytes(pairs)))
}
