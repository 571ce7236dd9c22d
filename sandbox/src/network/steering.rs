//! Connections to a namespace's loopback, whatever their port, to sockets of ours: a BPF program
//! that the kernel asks which socket listens (`BPF_PROG_TYPE_SK_LOOKUP`, Linux 5.9;
//! Documentation/bpf/prog_sk_lookup.rst).
//!
//! Unlike a redirection by address translation it leaves nothing in the namespace: program and
//! sockets go with their descriptors, also when their owner is killed. Nor does it change packets,
//! so that an accepted connection's own address has the port that was dialled.

use std::{
    io,
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

/// One eBPF instruction (linux/bpf.h, `struct bpf_insn`).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u8,
    /// Destination in the low, source in the high four bits.
    registers: u8,
    offset: i16,
    immediate: i32,
}

const LOAD_WORD: u8 = 0x61; // BPF_LDX | BPF_MEM | BPF_W
const STORE_WORD: u8 = 0x63; // BPF_STX | BPF_MEM | BPF_W
const LOAD_MAP: u8 = 0x18; // BPF_LD | BPF_IMM | BPF_DW, of two instructions
const MOVE: u8 = 0xbf; // BPF_ALU64 | BPF_MOV | BPF_X
const MOVE_CONSTANT: u8 = 0xb7; // BPF_ALU64 | BPF_MOV | BPF_K
const ADD_CONSTANT: u8 = 0x07; // BPF_ALU64 | BPF_ADD | BPF_K
const JUMP: u8 = 0x05; // BPF_JMP | BPF_JA
const JUMP_ZERO: u8 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_EQUAL: u8 = 0x16; // BPF_JMP32 | BPF_JEQ | BPF_K
const JUMP_NOT_EQUAL: u8 = 0x56; // BPF_JMP32 | BPF_JNE | BPF_K
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

/// Source "register" of [`LOAD_MAP`]: the constant is a map's descriptor (`BPF_PSEUDO_MAP_FD`).
const MAP_DESCRIPTOR: u8 = 1;

const MAP_LOOKUP: i32 = 1;
const SOCKET_RELEASE: i32 = 86;
const SOCKET_ASSIGN: i32 = 124;

/// Offsets in `struct bpf_sk_lookup`.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;

/// `SK_PASS`: with a socket assigned that one, else the kernel looks for itself.
const PASS: i32 = 1;

/// Index of the listener for each family in the map.
const IPV4: i32 = 0;
const IPV6: i32 = 1;

const fn instruction(
    code: u8,
    destination: u8,
    source: u8,
    offset: i16,
    immediate: i32,
) -> Instruction {
    Instruction {
        code,
        registers: source << 4 | destination,
        offset,
        immediate,
    }
}

/// Where the program's jumps lead.
const AT_IPV4: usize = 17;
const AT_FIND: usize = 19;
const AT_PASS: usize = 33;

/// The program: TCP to 127.0.0.1 goes to the map's first socket, to ::1 to its second.
fn program(map: RawFd) -> Vec<Instruction> {
    let ipv4 = i32::from_ne_bytes(Ipv4Addr::LOCALHOST.octets());
    let ipv6 = Ipv6Addr::LOCALHOST.octets();
    // 1 context, 6 the same, 2 a word of it, 7 the index and then the socket, 10 the stack's end
    let load = |offset| instruction(LOAD_WORD, 2, 6, offset, 0);
    let mut code = Vec::new();
    let jump = |code: &mut Vec<Instruction>, kind, register, value, to: usize| {
        let offset = i16::try_from(to - code.len() - 1).unwrap_or(i16::MAX);
        code.push(instruction(kind, register, 0, offset, value));
    };
    code.push(instruction(MOVE, 6, 1, 0, 0));
    code.push(load(PROTOCOL));
    jump(&mut code, JUMP_NOT_EQUAL, 2, libc::IPPROTO_TCP, AT_PASS);
    code.push(load(FAMILY));
    code.push(instruction(MOVE_CONSTANT, 7, 0, 0, IPV4));
    jump(&mut code, JUMP_EQUAL, 2, libc::AF_INET, AT_IPV4);
    jump(&mut code, JUMP_NOT_EQUAL, 2, libc::AF_INET6, AT_PASS);
    for (word, offset) in ipv6.chunks_exact(4).zip((LOCAL_IP6..).step_by(4)) {
        let value = i32::from_ne_bytes([word[0], word[1], word[2], word[3]]);
        code.push(load(offset));
        jump(&mut code, JUMP_NOT_EQUAL, 2, value, AT_PASS);
    }
    code.push(instruction(MOVE_CONSTANT, 7, 0, 0, IPV6));
    jump(&mut code, JUMP, 0, 0, AT_FIND);
    code.push(load(LOCAL_IP4));
    jump(&mut code, JUMP_NOT_EQUAL, 2, ipv4, AT_PASS);
    code.extend([
        instruction(STORE_WORD, 10, 7, -4, 0),
        instruction(LOAD_MAP, 1, MAP_DESCRIPTOR, 0, map),
        instruction(0, 0, 0, 0, 0),
        instruction(MOVE, 2, 10, 0, 0),
        instruction(ADD_CONSTANT, 2, 0, 0, -4),
        instruction(CALL, 0, 0, 0, MAP_LOOKUP),
    ]);
    // No listener for this family.
    jump(&mut code, JUMP_ZERO, 0, 0, AT_PASS);
    code.extend([
        instruction(MOVE, 7, 0, 0, 0),
        instruction(MOVE, 1, 6, 0, 0),
        instruction(MOVE, 2, 7, 0, 0),
        instruction(MOVE_CONSTANT, 3, 0, 0, 0),
        instruction(CALL, 0, 0, 0, SOCKET_ASSIGN),
        instruction(MOVE, 1, 7, 0, 0),
        instruction(CALL, 0, 0, 0, SOCKET_RELEASE),
        instruction(MOVE_CONSTANT, 0, 0, 0, PASS),
        instruction(EXIT, 0, 0, 0, 0),
    ]);
    code
}

#[repr(C)]
struct MapAttributes {
    kind: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
    flags: u32,
}

#[repr(C)]
struct UpdateAttributes {
    map: u32,
    _padding: u32,
    key: u64,
    value: u64,
    flags: u64,
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
    name: [u8; 16],
    interface: u32,
    attach_type: u32,
}

#[repr(C)]
struct LinkAttributes {
    program: u32,
    target: u32,
    attach_type: u32,
    flags: u32,
}

const MAP_CREATE: libc::c_int = 0;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const PROG_LOAD: libc::c_int = 5;
const LINK_CREATE: libc::c_int = 28;
const MAP_TYPE_SOCKMAP: u32 = 15;
const PROG_TYPE_SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;

/// Lets `listeners` (for 127.0.0.1, for ::1) take all connections to the loopback of `namespace` for
/// as long as the descriptor that it returns is open.
///
/// # Errors
/// Those of bpf(2).
pub fn steer(namespace: BorrowedFd<'_>, listeners: [Option<RawFd>; 2]) -> io::Result<OwnedFd> {
    let map = descriptor(bpf(
        MAP_CREATE,
        &MapAttributes {
            kind: MAP_TYPE_SOCKMAP,
            key_size: 4,
            value_size: 4,
            entries: 2,
            flags: 0,
        },
    )?)?;
    for (index, listener) in [IPV4, IPV6].into_iter().zip(listeners) {
        let Some(listener) = listener else { continue };
        bpf(
            MAP_UPDATE_ELEM,
            &UpdateAttributes {
                map: map.as_raw_fd().unsigned_abs(),
                _padding: 0,
                key: (&raw const index) as u64,
                value: (&raw const listener) as u64,
                flags: 0,
            },
        )?;
    }
    let code = program(map.as_raw_fd());
    let program = descriptor(bpf(
        PROG_LOAD,
        &LoadAttributes {
            program_type: PROG_TYPE_SK_LOOKUP,
            instruction_count: u32::try_from(code.len())
                .map_err(|_| io::ErrorKind::InvalidInput)?,
            instructions: code.as_ptr() as u64,
            license: c"Apache-2.0".as_ptr() as u64,
            name: *b"caisson_forward\0",
            attach_type: ATTACH_SK_LOOKUP,
            ..Default::default()
        },
    )?)?;
    // The link holds the program, and that the map, which holds no listener that is closed.
    descriptor(bpf(
        LINK_CREATE,
        &LinkAttributes {
            program: program.as_raw_fd().unsigned_abs(),
            target: namespace.as_raw_fd().unsigned_abs(),
            attach_type: ATTACH_SK_LOOKUP,
            flags: 0,
        },
    )?)
}

/// bpf(2). The attributes are of the command's type, and what they point to lives.
fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: the kernel reads the attributes, whose size is told, and what they point to, which
    // outlives the call; all commands used here write nothing.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// What a command that makes something has answered.
fn descriptor(number: libc::c_long) -> io::Result<OwnedFd> {
    let number = RawFd::try_from(number).map_err(|_| io::ErrorKind::InvalidData)?;
    // SAFETY: the kernel has just made this descriptor for us (close-on-exec, as all of bpf(2)).
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    /// Which of the map's sockets (`there`: those it has) the program assigns.
    fn steered(protocol: i32, address: &str, there: [bool; 2]) -> Option<i32> {
        let mut context = [0i32; 17];
        context[(PROTOCOL / 4) as usize] = protocol;
        let word = |octets: &[u8]| i32::from_ne_bytes(octets.try_into().unwrap());
        match address.parse().unwrap() {
            IpAddr::V4(address) => {
                context[(FAMILY / 4) as usize] = libc::AF_INET;
                context[(LOCAL_IP4 / 4) as usize] = word(&address.octets());
            }
            IpAddr::V6(address) => {
                context[(FAMILY / 4) as usize] = libc::AF_INET6;
                for (index, octets) in address.octets().chunks_exact(4).enumerate() {
                    context[(LOCAL_IP6 / 4) as usize + index] = word(octets);
                }
            }
        }
        let code = program(77);
        let (mut registers, mut stacked, mut held, mut assigned) = ([0i32; 11], -1, 0, None);
        let mut at = 0;
        loop {
            let i = code[at];
            at += 1;
            let (d, s) = (usize::from(i.registers & 15), usize::from(i.registers >> 4));
            match i.code {
                LOAD_WORD => registers[d] = context[(i.offset / 4) as usize],
                STORE_WORD => stacked = registers[s],
                LOAD_MAP => {
                    assert_eq!((s, i.immediate), (1, 77));
                    at += 1;
                }
                MOVE => registers[d] = registers[s],
                MOVE_CONSTANT => registers[d] = i.immediate,
                ADD_CONSTANT => registers[d] += i.immediate,
                JUMP => at += i.offset as usize,
                JUMP_ZERO | JUMP_EQUAL if registers[d] == i.immediate => at += i.offset as usize,
                JUMP_NOT_EQUAL if registers[d] != i.immediate => at += i.offset as usize,
                JUMP_ZERO | JUMP_EQUAL | JUMP_NOT_EQUAL => {}
                CALL if i.immediate == MAP_LOOKUP => {
                    let found = there[stacked as usize];
                    held += i32::from(found);
                    registers[0] = if found { 1000 + stacked } else { 0 };
                }
                CALL if i.immediate == SOCKET_ASSIGN => assigned = Some(registers[2] - 1000),
                CALL if i.immediate == SOCKET_RELEASE => held -= 1,
                EXIT => {
                    assert_eq!((registers[0], held), (PASS, 0));
                    return assigned;
                }
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn only_tcp_to_the_two_loopback_addresses_is_steered() {
        let both = [true, true];
        assert_eq!(steered(libc::IPPROTO_TCP, "127.0.0.1", both), Some(0));
        assert_eq!(steered(libc::IPPROTO_TCP, "::1", both), Some(1));
        assert_eq!(steered(libc::IPPROTO_UDP, "127.0.0.1", both), None);
        assert_eq!(steered(libc::IPPROTO_UDP, "::1", both), None);
        // docker's name server
        for other in ["127.0.0.11", "10.0.0.1", "::", "::2", "fe80::1", "1::1"] {
            assert_eq!(steered(libc::IPPROTO_TCP, other, both), None, "{other}");
        }
    }

    #[test]
    fn a_family_without_a_listener_is_left_alone() {
        let ipv4 = [true, false];
        assert_eq!(steered(libc::IPPROTO_TCP, "127.0.0.1", ipv4), Some(0));
        assert_eq!(steered(libc::IPPROTO_TCP, "::1", ipv4), None);
    }
}
