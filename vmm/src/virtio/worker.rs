//! The thread of one device.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use super::{Active, Device, DeviceError};
use crate::seccomp::{self, ThreadKind};

/// Gets the reason when a device fails.
pub type OnFailure = Box<dyn Fn(&DeviceError) + Send + Sync>;

/// A device with what it works on.
type Job = (Box<dyn Device>, Box<Active>);

/// Stack of a device's thread, bytes.
const STACK_BYTES: usize = 256 << 10;

/// A thread that runs its device whenever it is sent there. It ends when this is dropped.
///
/// It is started with the slot, not at `DRIVER_OK`: that comes from a vCPU thread, whose system
/// call filter knows no clone(2), and which a device's thread would inherit.
pub struct Worker {
    jobs: SyncSender<Job>,
    done: Receiver<Job>,
    on_failure: std::sync::Arc<OnFailure>,
}

impl Worker {
    /// Starts the thread for a device of that name.
    pub(super) fn start(name: &'static str, on_failure: OnFailure) -> std::io::Result<Self> {
        let (jobs, next) = sync_channel::<Job>(1);
        let (finished, done) = sync_channel(1);
        let on_failure = std::sync::Arc::new(on_failure);
        let report = on_failure.clone();
        std::thread::Builder::new()
            .name(name.into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                if let Err(error) = confine(name) {
                    // No device runs in an unfiltered thread: the slot's driver gets no answer.
                    report(&DeviceError::Backend(error));
                    return;
                }
                while let Ok((mut device, mut active)) = next.recv() {
                    if let Err(error) = device.run(&mut active) {
                        report(&error);
                    }
                    if finished.send((device, active)).is_err() {
                        return;
                    }
                }
            })?;
        Ok(Self {
            jobs,
            done,
            on_failure,
        })
    }

    /// Lets the device run; false when the thread is gone.
    pub(super) fn send(&self, device: Box<dyn Device>, active: Box<Active>) -> bool {
        self.jobs.send((device, active)).is_ok()
    }

    /// Waits until the device has stopped; `None` when the thread is gone.
    pub(super) fn receive(&self) -> Option<Job> {
        self.done.recv().ok()
    }

    /// As if the device had failed with `error`.
    pub(super) fn report(&self, error: &DeviceError) {
        (self.on_failure)(error);
    }
}

fn confine(name: &str) -> Result<(), String> {
    // A device that has no list of its own gets the shortest.
    let kind = ThreadKind::of_device(name).unwrap_or(ThreadKind::Rng);
    seccomp::enter(kind).map_err(|error| error.to_string())
}
