//! The loop around `KVM_RUN` (Linux, Documentation/virt/kvm/api.rst).

use std::sync::atomic::{AtomicBool, Ordering};

use caisson_vmm_api::ExitReason;
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::Vcpu;
use crate::machine::{Bus, Notice, Notices, PortWrite};

/// What an exit leads to.
enum Next {
    /// Run on.
    Continue,
    /// The guest is over.
    End(ExitReason),
    /// KVM could not go on; the registers tell more.
    Failed(String),
}

impl Vcpu {
    /// Runs until `stop` is set or the guest ends.
    pub(super) fn run(&mut self, bus: &Bus, notices: &Notices, stop: &AtomicBool) {
        while !stop.load(Ordering::Acquire) {
            let next = self.step(bus);
            self.exits.fetch_add(1, Ordering::Relaxed);
            match next {
                Next::Continue => {}
                Next::End(reason) => {
                    notices.push(Notice::Ended(reason));
                    return;
                }
                Next::Failed(message) => {
                    let message = format!(
                        "vCPU {}: {message}; {}",
                        self.index,
                        describe_registers(&self.fd)
                    );
                    notices.push(Notice::Ended(ExitReason::VcpuFailed { message }));
                    return;
                }
            }
        }
        self.finish_pending_access();
    }

    fn step(&mut self, bus: &Bus) -> Next {
        match self.fd.run() {
            Ok(VcpuExit::MmioRead(address, data)) => bus.mmio_read(address, data),
            Ok(VcpuExit::MmioWrite(address, _)) if bus.is_read_only_memory(address) => {
                return Next::Failed(format!(
                    "the guest wrote to read-only persistent memory at {address:#x}"
                ));
            }
            Ok(VcpuExit::MmioWrite(address, data)) => bus.mmio_write(address, data),
            Ok(VcpuExit::IoIn(port, data)) => bus.port_read(port, data),
            Ok(VcpuExit::IoOut(port, data)) => {
                if bus.port_write(port, data) == PortWrite::Reset {
                    return Next::End(bus.reset_reason());
                }
            }
            Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {}
            Ok(VcpuExit::Shutdown) => return Next::End(ExitReason::TripleFault),
            Ok(VcpuExit::SystemEvent(..)) => return Next::End(ExitReason::GuestShutdown),
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                return Next::Failed(format!(
                    "KVM_EXIT_FAIL_ENTRY, hardware reason {reason:#x} on processor {cpu}"
                ));
            }
            Ok(exit) => {
                let name = format!("{exit:?}");
                return Next::Failed(match name.as_str() {
                    "InternalError" => self.internal_error(),
                    _ => format!("unexpected KVM exit {name}"),
                });
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => return Next::Failed(format!("KVM_RUN: {error}")),
        }
        Next::Continue
    }

    fn internal_error(&mut self) -> String {
        let run = self.fd.get_kvm_run();
        // SAFETY: after KVM_EXIT_INTERNAL_ERROR the kernel has filled this member; it is plain data.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        let count = (internal.ndata as usize).min(internal.data.len());
        format!(
            "KVM_EXIT_INTERNAL_ERROR, suberror {}, data {:x?}",
            internal.suberror,
            &internal.data[..count]
        )
    }

    /// An access that KVM handed out is only complete after the next entry, which
    /// `immediate_exit` cuts short: saved registers would lack it otherwise.
    fn finish_pending_access(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        let _ = self.fd.run();
        self.fd.set_kvm_immediate_exit(0);
    }
}

fn describe_registers(fd: &VcpuFd) -> String {
    match (fd.get_regs(), fd.get_sregs()) {
        (Ok(regs), Ok(sregs)) => format!(
            "rip {:#x} rsp {:#x} rflags {:#x} rax {:#x} rbx {:#x} rcx {:#x} rdx {:#x} rsi {:#x} \
             rdi {:#x} cr0 {:#x} cr2 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x} cs {:#x}",
            regs.rip,
            regs.rsp,
            regs.rflags,
            regs.rax,
            regs.rbx,
            regs.rcx,
            regs.rdx,
            regs.rsi,
            regs.rdi,
            sregs.cr0,
            sregs.cr2,
            sregs.cr3,
            sregs.cr4,
            sregs.efer,
            sregs.cs.selector
        ),
        (Err(error), _) | (_, Err(error)) => format!("registers unreadable: {error}"),
    }
}
