//! Threads that run virtual processors.
//!
//! As with devices, ownership is the state: a running vCPU belongs to its
//! thread, and stopping the thread gives it back.

mod run;

use std::{
    sync::{
        Arc, Once,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use caisson_vmm_api::ExitReason;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::{
    machine::{Bus, Notice, Notices},
    seccomp::{self, ThreadKind},
};

/// Stack of a vCPU's thread, bytes.
const STACK_BYTES: usize = 256 << 10;
/// How long a kicked vCPU gets until the next kick.
const KICK_INTERVAL: Duration = Duration::from_micros(200);

/// A virtual processor that does not run.
pub struct Vcpu {
    /// KVM's handle.
    pub fd: VcpuFd,
    /// Its number and APIC id.
    pub index: u8,
    /// Exits so far.
    pub exits: Arc<AtomicU64>,
}

/// A virtual processor in its thread.
pub struct RunningVcpu {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vcpu>,
}

impl Vcpu {
    /// Runs the vCPU in a thread of its own. What ends the guest goes to `notices`.
    ///
    /// # Errors
    /// That of starting a thread; the vCPU is gone then.
    pub fn start(self, bus: Arc<Bus>, notices: Arc<Notices>) -> std::io::Result<RunningVcpu> {
        register_kick_handler()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{}", self.index))
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let mut vcpu = self;
                if let Err(error) = seccomp::enter(ThreadKind::Vcpu) {
                    let message = error.to_string();
                    notices.push(Notice::Ended(ExitReason::Internal { message }));
                    return vcpu;
                }
                vcpu.run(&bus, &notices, &stopping);
                vcpu
            })?;
        Ok(RunningVcpu { stop, thread })
    }
}

impl RunningVcpu {
    /// Asks the vCPU to stop at the next instruction border; [`RunningVcpu::join`] waits for it.
    pub fn request_stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.kick();
    }

    /// Waits until the vCPU has stopped. `None` when its thread panicked.
    pub fn join(self) -> Option<Vcpu> {
        // A kick between the thread's look at `stop` and its entry into KVM is lost, so kick again.
        while !self.thread.is_finished() {
            self.kick();
            std::thread::sleep(KICK_INTERVAL);
        }
        self.thread.join().ok()
    }

    fn kick(&self) {
        // A thread that has ended already needs no kick.
        let _ = self.thread.kill(SIGRTMIN());
    }
}

/// The signal only has to interrupt KVM_RUN.
fn register_kick_handler() -> std::io::Result<()> {
    extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static REGISTERED: Once = Once::new();
    let mut result = Ok(());
    REGISTERED.call_once(|| {
        result = register_signal_handler(SIGRTMIN(), ignore);
    });
    result.map_err(|error| std::io::Error::from_raw_os_error(error.errno()))
}
