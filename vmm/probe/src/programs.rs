//! Machine code of the tiny guest, in AT&T notation beside the bytes.
//!
//! Every program starts at [`crate::guest::CODE`] in 64-bit mode, may use the page at
//! [`crate::guest::WINDOW`], and reports through port [`REPORT_PORT`].

/// Port through which programs report.
pub const REPORT_PORT: u16 = 0x10;

/// Sum of 1..=100, stored through the window, read back and reported.
pub const COMPUTE: &[u8] = &[
    0x31, 0xc0, //                         xor %eax,%eax
    0xb9, 0x64, 0, 0, 0, //                mov $100,%ecx
    0x48, 0x01, 0xc8, //                1: add %rcx,%rax
    0x48, 0xff, 0xc9, //                   dec %rcx
    0x75, 0xf8, //                         jnz 1b
    0xbb, 0, 0, 0x20, 0, //                mov $0x200000,%ebx
    0x48, 0x89, 0x03, //                   mov %rax,(%rbx)
    0x50, //                               push %rax
    0x5a, //                               pop %rdx
    0x48, 0x0f, 0xca, //                   bswap %rdx
    0x48, 0x89, 0x53, 0x08, //             mov %rdx,8(%rbx)
    0x8b, 0x03, //                         mov (%rbx),%eax
    0xe7, 0x10, //                         out %eax,$0x10
    0xf4, //                               hlt
];

/// What [`COMPUTE`] reports and stores at the start of the window; the same number with its
/// bytes swapped follows it there.
pub const COMPUTE_RESULT: u64 = 5050;

/// A 16-byte compare and exchange that must store, then one that must not.
///
/// Reports 4 bits: the first stored; the second did not; the second loaded the low and the high
/// half of what the first had stored.
pub const CMPXCHG16B: &[u8] = &[
    0xbe, 0, 0, 0x20, 0, //                mov $0x200000,%esi
    0x48, 0xb8, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11,
    0x11, // mov $0x1111111111111111,%rax
    0x48, 0x89, 0x06, //                   mov %rax,(%rsi)
    0x48, 0xba, 0x22, 0x22, 0x22, 0x22, 0x22, 0x22, 0x22,
    0x22, // mov $0x2222222222222222,%rdx
    0x48, 0x89, 0x56, 0x08, //             mov %rdx,8(%rsi)
    0xbb, 0x03, 0, 0, 0, //                mov $3,%ebx
    0xb9, 0x04, 0, 0, 0, //                mov $4,%ecx
    0xf0, 0x48, 0x0f, 0xc7, 0x0e, //       lock cmpxchg16b (%rsi)
    0x0f, 0x94, 0xc0, //                   setz %al
    0x0f, 0xb6, 0xf8, //                   movzbl %al,%edi
    0x31, 0xc0, //                         xor %eax,%eax
    0x31, 0xd2, //                         xor %edx,%edx
    0xf0, 0x48, 0x0f, 0xc7, 0x0e, //       lock cmpxchg16b (%rsi)
    0x0f, 0x95, 0xc1, //                   setnz %cl
    0x0f, 0xb6, 0xc9, //                   movzbl %cl,%ecx
    0xd1, 0xe1, //                         shl %ecx
    0x09, 0xcf, //                         or %ecx,%edi
    0x48, 0x83, 0xf8, 0x03, //             cmp $3,%rax
    0x0f, 0x94, 0xc1, //                   setz %cl
    0x0f, 0xb6, 0xc9, //                   movzbl %cl,%ecx
    0xc1, 0xe1, 0x02, //                   shl $2,%ecx
    0x09, 0xcf, //                         or %ecx,%edi
    0x48, 0x83, 0xfa, 0x04, //             cmp $4,%rdx
    0x0f, 0x94, 0xc1, //                   setz %cl
    0x0f, 0xb6, 0xc9, //                   movzbl %cl,%ecx
    0xc1, 0xe1, 0x03, //                   shl $3,%ecx
    0x09, 0xcf, //                         or %ecx,%edi
    0x89, 0xf8, //                         mov %edi,%eax
    0xe7, 0x10, //                         out %eax,$0x10
    0xf4, //                               hlt
];

/// What [`CMPXCHG16B`] reports where the instruction works.
pub const CMPXCHG16B_RESULT: u32 = 0b1111;

/// What [`CMPXCHG16B`] leaves in the window where the instruction works.
pub const CMPXCHG16B_STORED: [u64; 2] = [3, 4];

/// Counts down from 131072 and reports, for ever.
pub const LOOP: &[u8] = &[
    0xb9, 0, 0, 0x02, 0, //             1: mov $0x20000,%ecx
    0xff, 0xc9, //                      2: dec %ecx
    0x75, 0xfc, //                         jnz 2b
    0xe7, 0x10, //                         out %eax,$0x10
    0xeb, 0xf3, //                         jmp 1b
];

/// Instructions that [`LOOP`] executes from one report to the next.
pub const LOOP_INSTRUCTIONS: u64 = 2 * 0x20000 + 3;

/// Never reports.
#[cfg(test)]
pub const HANG: &[u8] = &[0xeb, 0xfe]; // 1: jmp 1b
