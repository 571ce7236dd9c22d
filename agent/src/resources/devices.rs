//! The device controller of cgroup v2: a BPF program that says which device
//! nodes a container may open or make (Linux: admin-guide/cgroup-v2.rst,
//! "Device controller"; bpf(2)).

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

/// One eBPF instruction (linux/bpf.h, `struct bpf_insn`).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    code: u8,
    /// Destination in the low, source in the high four bits.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const MOVE32: u8 = 0xbc; // BPF_ALU | BPF_MOV | BPF_X
const MOVE_CONSTANT: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
const AND32: u8 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const SHIFT_RIGHT32: u8 = 0x74; // BPF_ALU | BPF_RSH | BPF_K
const JUMP_NOT_EQUAL: u8 = 0x56; // BPF_JMP32 | BPF_JNE | BPF_K
const EXIT: u8 = 0x95;

const TYPE: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;

fn instruction(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction {
        code,
        registers: source << 4 | destination,
        offset,
        immediate,
    }
}

/// What every container may do, listed or not: its own nodes, pseudo-terminals, and making
/// (not opening) any node (runc's defaults).
const ALWAYS: [(i32, i32, i32, i32); 10] = [
    (CHARACTER, -1, -1, 1),
    (BLOCK, -1, -1, 1),
    (CHARACTER, 1, 3, 7),
    (CHARACTER, 1, 5, 7),
    (CHARACTER, 1, 7, 7),
    (CHARACTER, 1, 8, 7),
    (CHARACTER, 1, 9, 7),
    (CHARACTER, 5, 0, 7),
    (CHARACTER, 5, 2, 7),
    (CHARACTER, 136, -1, 7),
];

/// The program for `rules`, of which a later one overrides an earlier one.
pub fn program(rules: &[LinuxDeviceCgroup]) -> Vec<Instruction> {
    // The context is type | access << 16, major, minor (linux/bpf.h, `bpf_cgroup_dev_ctx`).
    let mut code = vec![
        instruction(LOAD_WORD, TYPE, 1, 0, 0),
        instruction(MOVE32, ACCESS, TYPE, 0, 0),
        instruction(AND32, TYPE, 0, 0, 0xFFFF),
        instruction(SHIFT_RIGHT32, ACCESS, 0, 0, 16),
        instruction(LOAD_WORD, MAJOR, 1, 4, 0),
        instruction(LOAD_WORD, MINOR, 1, 8, 0),
    ];
    for (kind, major, minor, access) in ALWAYS {
        let number = |value: i32| Some(value).filter(|value| *value >= 0);
        rule(
            &mut code,
            Some(kind),
            number(major),
            number(minor),
            access,
            true,
        );
    }
    let mut default = false;
    let mut effective = Vec::new();
    for one in rules {
        let everything = matches!(one.typ(), None | Some(LinuxDeviceType::A))
            && one.major().is_none_or(|number| number < 0)
            && one.minor().is_none_or(|number| number < 0);
        if everything {
            default = one.allow();
            effective.clear();
        } else {
            effective.push(one);
        }
    }
    for one in effective.into_iter().rev() {
        let kind = match one.typ() {
            Some(LinuxDeviceType::B) => Some(BLOCK),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHARACTER),
            _ => None,
        };
        let number = |value: Option<i64>| {
            value
                .and_then(|value| i32::try_from(value).ok())
                .filter(|value| *value >= 0)
        };
        let letters = one.access().as_deref().unwrap_or("rwm");
        let access = [('m', 1), ('r', 2), ('w', 4)]
            .into_iter()
            .filter(|(letter, _)| letters.contains(*letter))
            .map(|(_, bit)| bit)
            .sum();
        rule(
            &mut code,
            kind,
            number(one.major()),
            number(one.minor()),
            access,
            one.allow(),
        );
    }
    code.push(instruction(MOVE_CONSTANT, 0, 0, 0, i32::from(default)));
    code.push(instruction(EXIT, 0, 0, 0, 0));
    code
}

/// Appends: when all matches, the answer is `allow`. An allowing rule matches when it covers all
/// that is asked for, a denying one when it covers any of it.
fn rule(
    code: &mut Vec<Instruction>,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    access: i32,
    allow: bool,
) {
    let mut conditions = Vec::new();
    if let Some(kind) = kind {
        conditions.push(instruction(JUMP_NOT_EQUAL, TYPE, 0, 0, kind));
    }
    if access != 7 {
        conditions.push(instruction(MOVE32, 1, ACCESS, 0, 0));
        let mask = if allow { !access & 7 } else { access };
        conditions.push(instruction(AND32, 1, 0, 0, mask));
        if allow {
            conditions.push(instruction(JUMP_NOT_EQUAL, 1, 0, 0, 0));
        } else {
            const JUMP_EQUAL: u8 = 0x16; // BPF_JMP32 | BPF_JEQ | BPF_K
            conditions.push(instruction(JUMP_EQUAL, 1, 0, 0, 0));
        }
    }
    if let Some(major) = major {
        conditions.push(instruction(JUMP_NOT_EQUAL, MAJOR, 0, 0, major));
    }
    if let Some(minor) = minor {
        conditions.push(instruction(JUMP_NOT_EQUAL, MINOR, 0, 0, minor));
    }
    let total = conditions.len();
    for (index, mut condition) in conditions.into_iter().enumerate() {
        if condition.code & 0x07 == 0x06 {
            // Over the other conditions and the two instructions of the verdict.
            condition.offset = i16::try_from(total - index + 1).unwrap_or(i16::MAX);
        }
        code.push(condition);
    }
    code.push(instruction(MOVE_CONSTANT, 0, 0, 0, i32::from(allow)));
    code.push(instruction(EXIT, 0, 0, 0, 0));
}

#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct AttachAttributes {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_CGROUP_DEVICE: u32 = 6;
const FLAG_MULTI: u32 = 2;

/// Puts `cgroup` under `rules`. The program lives as long as the cgroup.
///
/// # Errors
/// Those of bpf(2).
pub fn attach(cgroup: BorrowedFd<'_>, rules: &[LinuxDeviceCgroup]) -> std::io::Result<()> {
    let code = program(rules);
    let load = LoadAttributes {
        program_type: TYPE_CGROUP_DEVICE,
        instruction_count: u32::try_from(code.len())
            .map_err(|_| std::io::ErrorKind::InvalidInput)?,
        instructions: code.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..Default::default()
    };
    // SAFETY: the attributes and what they point to live through the call; the size is theirs.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            PROG_LOAD,
            &raw const load,
            size_of::<LoadAttributes>(),
        )
    };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    let fd = i32::try_from(fd).map_err(|_| std::io::ErrorKind::InvalidData)?;
    // SAFETY: the kernel has just made this descriptor for us.
    let program = unsafe { OwnedFd::from_raw_fd(fd) };
    let attach = AttachAttributes {
        target: cgroup.as_raw_fd().unsigned_abs(),
        program: program.as_raw_fd().unsigned_abs(),
        kind: ATTACH_CGROUP_DEVICE,
        flags: FLAG_MULTI,
    };
    // SAFETY: as above.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            PROG_ATTACH,
            &raw const attach,
            size_of::<AttachAttributes>(),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allowed(rules: &str, kind: i32, access: i32, major: i32, minor: i32) -> bool {
        let code = program(&serde_json::from_str::<Vec<LinuxDeviceCgroup>>(rules).unwrap());
        let context = [kind | access << 16, major, minor];
        let mut registers = [0i32; 16];
        let mut at = 0;
        loop {
            let i = code[at];
            at += 1;
            let (d, s) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            match i.code {
                LOAD_WORD => registers[d] = context[(i.offset / 4) as usize],
                MOVE32 => registers[d] = registers[s],
                MOVE_CONSTANT => registers[d] = i.immediate,
                AND32 => registers[d] &= i.immediate,
                SHIFT_RIGHT32 => registers[d] >>= i.immediate,
                JUMP_NOT_EQUAL if registers[d] != i.immediate => at += i.offset as usize,
                0x16 if registers[d] == i.immediate => at += i.offset as usize,
                JUMP_NOT_EQUAL | 0x16 => {}
                EXIT => return registers[0] == 1,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    const DENY_ALL: &str = r#"{"allow":false,"access":"rwm"}"#;

    #[test]
    fn defaults() {
        let rules = format!("[{DENY_ALL}]");
        assert!(allowed(&rules, CHARACTER, 6, 1, 3), "null");
        assert!(allowed(&rules, CHARACTER, 6, 136, 7), "pseudo-terminals");
        assert!(allowed(&rules, BLOCK, 1, 8, 0), "mknod");
        assert!(!allowed(&rules, BLOCK, 2, 254, 0), "a disk");
        assert!(!allowed(&rules, CHARACTER, 2, 1, 1), "mem");
    }

    #[test]
    fn later_rules_win() {
        let rules = format!(
            r#"[{DENY_ALL},{{"allow":true,"type":"c","major":10,"minor":229,"access":"rw"}}]"#
        );
        assert!(allowed(&rules, CHARACTER, 6, 10, 229));
        assert!(!allowed(&rules, CHARACTER, 6, 10, 230));
        let rules = r#"[{"allow":true,"access":"rwm"},{"allow":false,"type":"b","major":254,"access":"w"}]"#;
        assert!(!allowed(rules, BLOCK, 6, 254, 1));
        assert!(allowed(rules, BLOCK, 2, 254, 1));
        assert!(allowed(rules, CHARACTER, 6, 1, 1));
    }
}
