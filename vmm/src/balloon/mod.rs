//! virtio-balloon (virtio 1.2 section 5.5): the guest gives memory up on
//! demand (inflation), takes it back when it runs out of it by itself
//! (DEFLATE_ON_OOM), and reports free pages on its own (REPORTING). All pages
//! go back to the host at once.
//!
//! System calls of the thread: poll, read and write (eventfds), madvise,
//! write (log), and the allocator's and futex.

#[cfg(test)]
mod tests;

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{
    memory::{DiscardError, GuestMemory, discard},
    virtio::{Active, Chain, ConfigSpace, Device, DeviceError, DeviceState},
};

/// Device type.
const ID: u32 = 5;
/// The guest may take pages back without asking, when it is out of memory.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// The guest reports free pages. Its queue is the third one, since the queues of features that are
/// not offered (STATS_VQ, FREE_PAGE_HINT) are not counted.
const F_REPORTING: u64 = 1 << 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const REPORTING: usize = 2;
const QUEUE_SIZES: [u16; 3] = [128; 3];

const STATE_VERSION: u16 = 1;
/// Bytes of a page frame, whatever the guest's page size is (virtio 1.2 section 5.5.6).
const FRAME_BYTES: u64 = 4096;
const FRAMES_PER_MIB: u32 = 256;

/// Most bytes of frame numbers in one request: each may cost a system call. Linux sends 1 KiB.
const MAX_INFLATE_BYTES: u64 = 4096;

/// Offset of `actual` in the configuration space; `num_pages` precedes it.
const CONFIG_ACTUAL: u64 = 4;

/// Sets the balloon's size while it runs, from any thread.
#[derive(Clone)]
pub struct BalloonHandle(Arc<Shared>);

struct Shared {
    config: BalloonConfig,
    changed: EventFd,
}

/// `struct virtio_balloon_config` (virtio 1.2 section 5.5.4), in frames of 4 KiB.
struct BalloonConfig {
    /// Wanted by the host.
    wanted: AtomicU32,
    /// Given up by the guest, as it says.
    actual: AtomicU32,
    /// Changes of `wanted`.
    generation: AtomicU32,
}

impl BalloonHandle {
    /// Asks the guest to give up `mib` MiB. It does so as far and as fast as it can.
    ///
    /// # Errors
    /// [`DeviceError::Backend`] when 32 bits cannot count the pages.
    pub fn set_mib(&self, mib: u32) -> Result<(), DeviceError> {
        let frames = mib.checked_mul(FRAMES_PER_MIB).ok_or_else(|| {
            DeviceError::Backend(format!(
                "a balloon of {mib} MiB is too large: at most {} MiB are possible",
                u32::MAX / FRAMES_PER_MIB
            ))
        })?;
        self.0.config.wanted.store(frames, Ordering::Release);
        self.0.config.generation.fetch_add(1, Ordering::AcqRel);
        // A counter that is full is readable as well.
        let _ = self.0.changed.write(1);
        Ok(())
    }

    /// What the guest says it has given up, MiB, rounded down. The guest's word only.
    pub fn actual_mib(&self) -> u32 {
        self.0.config.actual.load(Ordering::Acquire) / FRAMES_PER_MIB
    }
}

impl ConfigSpace for Shared {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let words = [&self.config.wanted, &self.config.actual];
        let bytes: Vec<u8> = words
            .iter()
            .flat_map(|word| word.load(Ordering::Acquire).to_le_bytes())
            .collect();
        bytes.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset == CONFIG_ACTUAL
            && let Ok(bytes) = data.try_into()
        {
            let frames = u32::from_le_bytes(bytes);
            self.config.actual.store(frames, Ordering::Release);
        }
    }

    fn generation(&self) -> u32 {
        self.config.generation.load(Ordering::Acquire)
    }
}

/// A virtio-balloon device.
pub struct Balloon {
    shared: Arc<Shared>,
    ram: Vec<(u64, u64)>,
    /// Generation of the configuration that the driver was last told of.
    told: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    wanted_frames: u32,
    actual_frames: u32,
}

impl Balloon {
    /// A balloon over `ram`: start and length in bytes of the ranges whose pages it may take.
    ///
    /// # Errors
    /// [`DeviceError::Io`] without an eventfd.
    pub fn new(ram: Vec<(u64, u64)>) -> Result<Self, DeviceError> {
        let changed =
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(DeviceError::io("eventfd"))?;
        Ok(Self {
            shared: Arc::new(Shared {
                config: BalloonConfig {
                    wanted: AtomicU32::new(0),
                    actual: AtomicU32::new(0),
                    generation: AtomicU32::new(0),
                },
                changed,
            }),
            ram: join(ram),
            told: 0,
        })
    }

    /// For changing its size.
    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle(self.shared.clone())
    }

    /// Gives pages back, if they are RAM.
    fn take(&self, memory: &GuestMemory, start: u64, length: u64) -> Result<(), DeviceError> {
        let inside = self.ram.iter().any(|(base, bytes)| {
            start
                .checked_sub(*base)
                .is_some_and(|offset| offset <= *bytes && length <= bytes - offset)
        });
        if !inside {
            return Err(DeviceError::Backend(format!(
                "the {length} bytes at {start:#x} that the guest gives up are not RAM"
            )));
        }
        discard(memory, start, length).map_err(|error| match error {
            DiscardError::Advise(errno) => DeviceError::io("madvise")(errno),
            error => DeviceError::Backend(error.to_string()),
        })
    }

    /// A request of the inflate queue: an array of little-endian frame numbers.
    fn inflate(&self, memory: &GuestMemory, chain: &Chain) -> Result<(), DeviceError> {
        let mut reader = chain.reader(memory);
        if reader.remaining() > MAX_INFLATE_BYTES {
            return Err(DeviceError::Backend(format!(
                "the guest gives up pages by a list of {} bytes: at most {MAX_INFLATE_BYTES} are possible",
                reader.remaining()
            )));
        }
        // Consecutive frames go back by one call, whether they are listed upwards or downwards.
        let mut run: Option<(u64, u64)> = None;
        while reader.remaining() >= 4 {
            let frame = u64::from(u32::from_le(reader.read_object()?));
            let start = frame * FRAME_BYTES;
            run = Some(match run {
                Some((first, length)) if start == first + length => (first, length + FRAME_BYTES),
                Some((first, length)) if start + FRAME_BYTES == first => {
                    (start, length + FRAME_BYTES)
                }
                other => {
                    if let Some((first, length)) = other {
                        self.take(memory, first, length)?;
                    }
                    (start, FRAME_BYTES)
                }
            });
        }
        run.map_or(Ok(()), |(first, length)| self.take(memory, first, length))
    }

    /// A request of the reporting queue: its writable buffers are the free pages.
    fn report(&self, memory: &GuestMemory, chain: &Chain) -> Result<(), DeviceError> {
        for segment in chain.writable() {
            let (start, length) = (segment.address.0, u64::from(segment.length));
            if !(start | length).is_multiple_of(FRAME_BYTES) {
                return Err(DeviceError::Backend(format!(
                    "the {length} free bytes at {start:#x} are not whole pages"
                )));
            }
            self.take(memory, start, length)?;
        }
        Ok(())
    }

    fn serve(&self, active: &mut Active, index: usize) -> Result<(), DeviceError> {
        let Active {
            memory,
            queues,
            interrupt,
            ..
        } = active;
        let Some(queue) = queues.get_mut(index).and_then(Option::as_mut) else {
            return Ok(());
        };
        queue.serve(memory, interrupt, |chain| {
            match index {
                INFLATE => self.inflate(memory, chain)?,
                REPORTING => self.report(memory, chain)?,
                // Deflation: the guest's accesses bring the pages back.
                _ => {}
            }
            Ok(0)
        })
    }
}

/// The ranges with adjacent ones made one: what the guest gives up may cross from one to the next.
fn join(mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    ranges.sort_unstable();
    ranges.dedup_by(|next, last| {
        let adjacent = last.0 + last.1 == next.0;
        if adjacent {
            last.1 += next.1;
        }
        adjacent
    });
    ranges
}

impl Device for Balloon {
    fn id(&self) -> u32 {
        ID
    }

    fn name(&self) -> &'static str {
        "balloon"
    }

    fn features(&self) -> u64 {
        F_DEFLATE_ON_OOM | F_REPORTING
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        self.shared.clone()
    }

    fn run(&mut self, active: &mut Active) -> Result<(), DeviceError> {
        let enabled: Vec<usize> = (INFLATE..=REPORTING)
            .filter(|index| active.queues.get(*index).is_some_and(Option::is_some))
            .collect();
        let shared = self.shared.clone();
        loop {
            for index in [INFLATE, DEFLATE, REPORTING] {
                self.serve(active, index)?;
            }
            let generation = shared.generation();
            if generation != self.told {
                self.told = generation;
                active.interrupt.config_changed();
            }
            if !active.wait_or(&enabled, Some(&shared.changed))? {
                return Ok(());
            }
        }
    }

    fn reset(&mut self) {
        // A new driver starts with nothing given up; what the host wants stays.
        self.shared.config.actual.store(0, Ordering::Release);
    }

    fn save(&self) -> Result<DeviceState, DeviceError> {
        let config = &self.shared.config;
        let saved = Saved {
            wanted_frames: config.wanted.load(Ordering::Acquire),
            actual_frames: config.actual.load(Ordering::Acquire),
        };
        Ok(DeviceState {
            version: STATE_VERSION,
            data: serde_json::to_value(saved)
                .map_err(|error| DeviceError::State(error.to_string()))?,
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceError> {
        state.expect_version(STATE_VERSION)?;
        let saved: Saved = serde_json::from_value(state.data.clone())
            .map_err(|error| DeviceError::State(error.to_string()))?;
        let config = &self.shared.config;
        config.wanted.store(saved.wanted_frames, Ordering::Release);
        config.actual.store(saved.actual_frames, Ordering::Release);
        // The driver may not have been told of the size yet.
        config.generation.fetch_add(1, Ordering::AcqRel);
        Ok(())
    }
}
