//! A guest of one vCPU and one page of code, without interrupts or devices.

use std::{
    sync::mpsc::{RecvTimeoutError, channel},
    time::{Duration, Instant},
};

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::programs::REPORT_PORT;

/// Guest memory, bytes.
const MEMORY: usize = 0x10000;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const LOW_TABLE: u64 = 0x4000;
const WINDOW_TABLE: u64 = 0x5000;
const STACK_TOP: u64 = 0x8000;
/// Where programs start; virtual and physical addresses are the same here.
pub const CODE: u64 = 0x8000;
/// Virtual address of the page that programs may use. Only paging leads to it.
#[cfg(test)]
pub const WINDOW: u64 = 0x20_0000;
/// Physical address of that page.
const WINDOW_PAGE: u64 = 0xa000;

/// Above what any vCPU's task state segment and identity map need to hide from a 64 KiB guest
/// (`KVM_SET_TSS_ADDR` and `KVM_SET_IDENTITY_MAP_ADDR`: three pages and one page below 4 GiB).
const TSS: usize = 0xfffb_d000;
const IDENTITY_MAP: u64 = 0xfffb_c000;

/// How long a vCPU thread may take to notice a signal before it is given up.
const GRACE: Duration = Duration::from_secs(2);

/// Why a guest did not get to its report.
#[derive(Debug, thiserror::Error)]
pub enum GuestError {
    /// KVM refused to build the guest.
    #[error("{what}: {source}")]
    Kvm {
        /// The ioctl.
        what: &'static str,
        /// Its errno.
        source: kvm_ioctls::Error,
    },
    /// This host would not give the memory or the thread.
    #[error("{what}: {source}")]
    Host {
        /// What was asked for.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// The guest ended otherwise than by reporting.
    #[error("the guest stopped at {rip:#x} with {exit}")]
    Stopped {
        /// KVM's exit reason.
        exit: String,
        /// Where.
        rip: u64,
    },
    /// The guest did nothing in the time it had.
    #[error("the guest did not answer within {0:?}")]
    Hung(Duration),
}

/// What a guest left behind.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Values it reported, at most as many as asked for.
    pub last_report: u32,
    /// How many reports there were.
    pub reports: u64,
    /// From the first entry to the last report.
    pub elapsed: Duration,
    /// First 16 bytes of the window.
    pub window: [u64; 2],
}

/// Runs `program` until it reported once and `budget` is over, or once when `once`.
///
/// The guest runs in a thread of its own, which a signal gets out of the kernel: this returns
/// within `budget` and a few seconds whatever the guest or KVM does. `budget` bounds the time
/// without any report, too.
pub fn run(kvm: &Kvm, program: &[u8], once: bool, budget: Duration) -> Result<Outcome, GuestError> {
    let signal = SIGRTMIN() + 5;
    register_signal_handler(signal, ignore).map_err(|error| GuestError::Host {
        what: "a handler for the watchdog's signal",
        source: error.into(),
    })?;
    let mut machine = Machine::new(kvm, program)?;
    let (sender, receiver) = channel();
    let thread = std::thread::Builder::new()
        .name("probe".to_owned())
        .stack_size(256 * 1024)
        .spawn(move || {
            // The receiver is gone only when it gave this thread up.
            let _ = sender.send(machine.run(once, budget));
        })
        .map_err(|source| GuestError::Host {
            what: "a thread for the guest",
            source,
        })?;
    let mut deadline = Instant::now() + budget;
    let give_up = deadline + GRACE;
    loop {
        let wait = deadline.saturating_duration_since(Instant::now());
        match receiver.recv_timeout(wait) {
            Ok(outcome) => {
                // It sent its last word: joining cannot block.
                let _ = thread.join();
                return outcome;
            }
            Err(RecvTimeoutError::Timeout) if Instant::now() < give_up => {
                // Repeated: the first signal may come before the thread entered the guest.
                let _ = thread.kill(signal);
                deadline = Instant::now() + Duration::from_millis(10);
            }
            Err(_) => return Err(GuestError::Hung(budget)),
        }
    }
}

/// Exists so that the signal interrupts an ioctl instead of ending the process.
extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

struct Machine {
    // Fields drop in order: the vCPU and the VM before the memory they use.
    vcpu: VcpuFd,
    _vm: VmFd,
    memory: GuestMemoryMmap,
}

impl Machine {
    fn new(kvm: &Kvm, program: &[u8]) -> Result<Self, GuestError> {
        let vm = kvm.create_vm().map_err(called("KVM_CREATE_VM"))?;
        vm.set_tss_address(TSS)
            .map_err(called("KVM_SET_TSS_ADDR"))?;
        vm.set_identity_map_address(IDENTITY_MAP)
            .map_err(called("KVM_SET_IDENTITY_MAP_ADDR"))?;
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY)])
            .map_err(|error| host("guest memory", std::io::Error::other(error)))?;
        lay_out(&memory, program)
            .map_err(|error| host("guest memory", std::io::Error::other(error)))?;
        for (slot, region) in memory.iter().enumerate() {
            let description = kvm_userspace_memory_region {
                slot: u32::try_from(slot).unwrap_or(u32::MAX),
                flags: 0,
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr().addr() as u64,
            };
            // SAFETY: the range is one mapping of exactly that length; `memory` lives in the same
            // value as the VM and is dropped after it, and nothing else unmaps it.
            unsafe { vm.set_user_memory_region(description) }
                .map_err(called("KVM_SET_USER_MEMORY_REGION"))?;
        }
        let vcpu = vm.create_vcpu(0).map_err(called("KVM_CREATE_VCPU"))?;
        let cpuid = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(called("KVM_GET_SUPPORTED_CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(called("KVM_SET_CPUID2"))?;
        enter_long_mode(&vcpu)?;
        Ok(Self {
            vcpu,
            _vm: vm,
            memory,
        })
    }

    fn run(&mut self, once: bool, budget: Duration) -> Result<Outcome, GuestError> {
        let begin = Instant::now();
        let mut reports = 0;
        let mut last_report = 0;
        let mut elapsed = Duration::ZERO;
        while reports == 0 || (!once && elapsed < budget) {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(REPORT_PORT, data)) => {
                    last_report = data.try_into().map(u32::from_le_bytes).unwrap_or(u32::MAX);
                    reports += 1;
                    elapsed = begin.elapsed();
                }
                Ok(exit) => {
                    let exit = format!("{exit:?}");
                    return Err(self.stopped(exit));
                }
                Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => {
                    if reports > 0 {
                        break;
                    }
                    if begin.elapsed() >= budget {
                        return Err(GuestError::Hung(budget));
                    }
                }
                Err(source) => {
                    return Err(GuestError::Kvm {
                        what: "KVM_RUN",
                        source,
                    });
                }
            }
        }
        let word = |offset| {
            self.memory
                .read_obj(GuestAddress(WINDOW_PAGE + offset))
                .map_err(|error| host("guest memory", std::io::Error::other(error)))
        };
        Ok(Outcome {
            last_report,
            reports,
            elapsed,
            window: [word(0)?, word(8)?],
        })
    }

    fn stopped(&self, exit: String) -> GuestError {
        let rip = self.vcpu.get_regs().map_or(0, |registers| registers.rip);
        GuestError::Stopped { exit, rip }
    }
}

fn called(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> GuestError {
    move |source| GuestError::Kvm { what, source }
}

fn host(what: &'static str, source: std::io::Error) -> GuestError {
    GuestError::Host { what, source }
}

/// Page tables and code. The first 64 KiB are mapped to themselves, the window elsewhere.
fn lay_out(memory: &GuestMemoryMmap, program: &[u8]) -> Result<(), vm_memory::GuestMemoryError> {
    /// Present and writable (AMD64 Architecture Programmer's Manual, volume 2, section 5.4.1).
    const USABLE: u64 = 0b11;
    let put = |entry: u64, target: u64| memory.write_obj(target | USABLE, GuestAddress(entry));
    put(PML4, PDPT)?;
    put(PDPT, DIRECTORY)?;
    put(DIRECTORY, LOW_TABLE)?;
    put(DIRECTORY + 8, WINDOW_TABLE)?;
    for page in 0..MEMORY as u64 / 0x1000 {
        put(LOW_TABLE + 8 * page, page * 0x1000)?;
    }
    put(WINDOW_TABLE, WINDOW_PAGE)?;
    memory.write_slice(program, GuestAddress(CODE))
}

fn enter_long_mode(vcpu: &VcpuFd) -> Result<(), GuestError> {
    let mut system = vcpu.get_sregs().map_err(called("KVM_GET_SREGS"))?;
    let flat = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: 0x10,
        type_: 3, // data, writable, accessed
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    system.cs = kvm_segment {
        selector: 0x8,
        type_: 11, // code, readable, accessed
        db: 0,
        l: 1,
        ..flat
    };
    system.ds = flat;
    system.es = flat;
    system.fs = flat;
    system.gs = flat;
    system.ss = flat;
    system.cr0 = 0x8000_0011; // PG, ET, PE
    system.cr3 = PML4;
    system.cr4 = 0x20; // PAE
    system.efer = 0x500; // LMA, LME
    vcpu.set_sregs(&system).map_err(called("KVM_SET_SREGS"))?;
    let mut registers = vcpu.get_regs().map_err(called("KVM_GET_REGS"))?;
    registers.rip = CODE;
    registers.rsp = STACK_TOP;
    registers.rflags = 2; // the bit that is always set
    vcpu.set_regs(&registers).map_err(called("KVM_SET_REGS"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::programs;

    /// None, with a line that says so, where the machine has no KVM at all.
    fn kvm() -> Option<Kvm> {
        let kvm = Kvm::new().ok();
        if kvm.is_none() {
            println!("no /dev/kvm: nothing tested");
        }
        kvm
    }

    #[test]
    fn the_guest_computes_behind_paging() {
        let Some(kvm) = kvm() else { return };
        let outcome = run(&kvm, programs::COMPUTE, true, Duration::from_secs(10)).unwrap();
        assert_eq!(outcome.reports, 1);
        assert_eq!(u64::from(outcome.last_report), programs::COMPUTE_RESULT);
        let sum = programs::COMPUTE_RESULT;
        assert_eq!(outcome.window, [sum, sum.swap_bytes()]);
        // The programs spell the window's address as bytes.
        let address = u32::try_from(WINDOW).unwrap().to_le_bytes();
        assert!(programs::COMPUTE.windows(4).any(|bytes| bytes == address));
    }

    #[test]
    fn a_hanging_guest_is_ended_in_time() {
        let Some(kvm) = kvm() else { return };
        let begin = Instant::now();
        let budget = Duration::from_millis(200);
        let outcome = run(&kvm, programs::HANG, true, budget);
        assert!(matches!(outcome, Err(GuestError::Hung(_))), "{outcome:?}");
        assert!(begin.elapsed() < budget + GRACE, "{:?}", begin.elapsed());
    }

    #[test]
    fn a_crash_is_told() {
        let Some(kvm) = kvm() else { return };
        // ud2 without an interrupt table: triple fault.
        let outcome = run(&kvm, &[0x0f, 0x0b], true, Duration::from_secs(10));
        assert!(
            matches!(outcome, Err(GuestError::Stopped { .. })),
            "{outcome:?}"
        );
    }
}
