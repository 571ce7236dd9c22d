//! Which requests of ioctl(2) each kind of thread makes.
//!
//! Numbers as `asm-generic/ioctl.h` builds them from direction, type, number and size of the
//! argument; KVM's are in `linux/kvm.h`, those of taps in `linux/if_tun.h`, vhost-net's in `linux/vhost.h`, those of block
//! devices in `linux/fs.h`.

use std::mem::size_of;

use kvm_bindings::{
    kvm_clock_data, kvm_cpuid2, kvm_debugregs, kvm_fpu, kvm_ioeventfd, kvm_irqchip, kvm_irqfd,
    kvm_lapic_state, kvm_mp_state, kvm_msr_list, kvm_msrs, kvm_pit_config, kvm_pit_state2,
    kvm_regs, kvm_sregs, kvm_userspace_memory_region, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};

use super::ThreadKind;

const KVM: u32 = 0xae;
const NONE: u32 = 0;
const WRITE: u32 = 1;
const READ: u32 = 2;

const fn request(direction: u32, kind: u32, number: u32, size: usize) -> u32 {
    (direction << 30) | ((size as u32) << 16) | (kind << 8) | number
}

const fn kvm(number: u32) -> u32 {
    request(NONE, KVM, number, 0)
}

/// `_IOW`: the kernel reads a `T`.
const fn kvm_set<T>(number: u32) -> u32 {
    request(WRITE, KVM, number, size_of::<T>())
}

/// `_IOR`: the kernel writes a `T`.
const fn kvm_get<T>(number: u32) -> u32 {
    request(READ, KVM, number, size_of::<T>())
}

/// `_IOWR`.
const fn kvm_both<T>(number: u32) -> u32 {
    request(READ | WRITE, KVM, number, size_of::<T>())
}

const RUN: u32 = kvm(0x80);
const GET_REGS: u32 = kvm_get::<kvm_regs>(0x81);
const GET_SREGS: u32 = kvm_get::<kvm_sregs>(0x83);

/// Running, and the registers for the message when that fails.
const VCPU: &[u32] = &[RUN, GET_REGS, GET_SREGS];

const BLOCK: &[u32] = &[
    0x1277, // BLKDISCARD
    0x127f, // BLKZEROOUT
];

const VSOCK: &[u32] = &[FIONBIO];

const FIONBIO: u32 = 0x5421;

const NET: &[u32] = &[
    request(WRITE, 0x54, 208, 4),          // TUNSETOFFLOAD
    request(WRITE, 0x54, 217, 4),          // TUNSETQUEUE
    request(READ, 0x54, 210, 4),           // TUNGETIFF
    request(WRITE, VHOST, 0x00, 8),        // VHOST_SET_FEATURES
    request(WRITE, VHOST, 0x03, 8),        // VHOST_SET_MEM_TABLE
    request(WRITE, VHOST, 0x10, 8),        // VHOST_SET_VRING_NUM
    request(WRITE, VHOST, 0x11, 40),       // VHOST_SET_VRING_ADDR
    request(WRITE, VHOST, 0x12, 8),        // VHOST_SET_VRING_BASE
    request(READ | WRITE, VHOST, 0x12, 8), // VHOST_GET_VRING_BASE
    request(WRITE, VHOST, 0x20, 8),        // VHOST_SET_VRING_KICK
    request(WRITE, VHOST, 0x21, 8),        // VHOST_SET_VRING_CALL
    request(WRITE, VHOST, 0x22, 8),        // VHOST_SET_VRING_ERR
    request(WRITE, VHOST, 0x30, 8),        // VHOST_NET_SET_BACKEND
];

const VHOST: u32 = 0xaf;

/// Building, saving and restoring a microVM, and back ends' descriptors.
const API_ONLY: &[u32] = &[
    kvm(0x00),                                    // KVM_GET_API_VERSION
    kvm(0x01),                                    // KVM_CREATE_VM
    kvm_both::<kvm_msr_list>(0x02),               // KVM_GET_MSR_INDEX_LIST
    kvm(0x03),                                    // KVM_CHECK_EXTENSION
    kvm(0x04),                                    // KVM_GET_VCPU_MMAP_SIZE
    kvm_both::<kvm_cpuid2>(0x05),                 // KVM_GET_SUPPORTED_CPUID
    kvm(0x41),                                    // KVM_CREATE_VCPU
    kvm_set::<kvm_userspace_memory_region>(0x46), // KVM_SET_USER_MEMORY_REGION
    kvm(0x47),                                    // KVM_SET_TSS_ADDR
    kvm_set::<u64>(0x48),                         // KVM_SET_IDENTITY_MAP_ADDR
    kvm(0x60),                                    // KVM_CREATE_IRQCHIP
    kvm_both::<kvm_irqchip>(0x62),                // KVM_GET_IRQCHIP
    kvm_get::<kvm_irqchip>(0x63),                 // KVM_SET_IRQCHIP, declared _IOR
    kvm_set::<kvm_irqfd>(0x76),                   // KVM_IRQFD
    kvm_set::<kvm_pit_config>(0x77),              // KVM_CREATE_PIT2
    kvm_set::<kvm_ioeventfd>(0x79),               // KVM_IOEVENTFD
    kvm_set::<kvm_clock_data>(0x7b),              // KVM_SET_CLOCK
    kvm_get::<kvm_clock_data>(0x7c),              // KVM_GET_CLOCK
    kvm_set::<kvm_regs>(0x82),                    // KVM_SET_REGS
    kvm_set::<kvm_sregs>(0x84),                   // KVM_SET_SREGS
    kvm_both::<kvm_msrs>(0x88),                   // KVM_GET_MSRS
    kvm_set::<kvm_msrs>(0x89),                    // KVM_SET_MSRS
    kvm_get::<kvm_fpu>(0x8c),                     // KVM_GET_FPU
    kvm_set::<kvm_fpu>(0x8d),                     // KVM_SET_FPU
    kvm_get::<kvm_lapic_state>(0x8e),             // KVM_GET_LAPIC
    kvm_set::<kvm_lapic_state>(0x8f),             // KVM_SET_LAPIC
    kvm_set::<kvm_cpuid2>(0x90),                  // KVM_SET_CPUID2
    kvm_both::<kvm_cpuid2>(0x91),                 // KVM_GET_CPUID2
    kvm_get::<kvm_mp_state>(0x98),                // KVM_GET_MP_STATE
    kvm_set::<kvm_mp_state>(0x99),                // KVM_SET_MP_STATE
    kvm_get::<kvm_pit_state2>(0x9f),              // KVM_GET_PIT2
    kvm_set::<kvm_pit_state2>(0xa0),              // KVM_SET_PIT2
    kvm_get::<kvm_vcpu_events>(0x9f),             // KVM_GET_VCPU_EVENTS
    kvm_set::<kvm_vcpu_events>(0xa0),             // KVM_SET_VCPU_EVENTS
    kvm_get::<kvm_debugregs>(0xa1),               // KVM_GET_DEBUGREGS
    kvm_set::<kvm_debugregs>(0xa2),               // KVM_SET_DEBUGREGS
    kvm(0xa2),                                    // KVM_SET_TSC_KHZ
    kvm(0xa3),                                    // KVM_GET_TSC_KHZ
    kvm_get::<kvm_xsave>(0xa4),                   // KVM_GET_XSAVE
    kvm_set::<kvm_xsave>(0xa5),                   // KVM_SET_XSAVE
    kvm_get::<kvm_xsave>(0xcf),                   // KVM_GET_XSAVE2
    kvm_get::<kvm_xcrs>(0xa6),                    // KVM_GET_XCRS
    kvm_set::<kvm_xcrs>(0xa7),                    // KVM_SET_XCRS
    kvm(0xad),                                    // KVM_KVMCLOCK_CTRL
    request(READ, 0x12, 114, size_of::<usize>()), // BLKGETSIZE64
    request(NONE, 0x12, 104, 0),                  // BLKSSZGET
    request(READ, VHOST, 0x00, 8),                // VHOST_GET_FEATURES
    request(NONE, VHOST, 0x01, 0),                // VHOST_SET_OWNER
    request(WRITE, 0x54, 216, 4),                 // TUNSETVNETHDRSZ
];

/// The requests of `kind`, the most frequent first: a filter compares them in order.
pub fn of(kind: ThreadKind) -> Vec<u32> {
    match kind {
        ThreadKind::Api => [VCPU, BLOCK, VSOCK, NET, API_ONLY].concat(),
        ThreadKind::Vcpu => VCPU.to_vec(),
        ThreadKind::Block => BLOCK.to_vec(),
        ThreadKind::Vsock => VSOCK.to_vec(),
        ThreadKind::Net => NET.to_vec(),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_the_kernels() {
        // As strace(1) prints them on x86-64.
        assert_eq!(RUN, 0xae80);
        assert_eq!(GET_REGS, 0x8090_ae81);
        assert_eq!(GET_SREGS, 0x8138_ae83);
        assert_eq!(kvm_set::<kvm_userspace_memory_region>(0x46), 0x4020_ae46);
        assert_eq!(kvm_both::<kvm_cpuid2>(0x05), 0xc008_ae05);
        assert_eq!(kvm_both::<kvm_msr_list>(0x02), 0xc004_ae02);
        assert_eq!(kvm_get::<kvm_irqchip>(0x63), 0x8208_ae63);
        assert_eq!(kvm_get::<kvm_xsave>(0xa4), 0x9000_aea4);
        assert_eq!(NET[..3], [0x4004_54d0, 0x4004_54d9, 0x8004_54d2]);
        assert_eq!(NET[7], 0x4008_af12);
        assert_eq!(NET[8], 0xc008_af12);
    }

    #[test]
    fn no_request_is_there_twice() {
        let mut all = of(ThreadKind::Api);
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }
}
