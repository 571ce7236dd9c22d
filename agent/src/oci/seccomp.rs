//! OCI seccomp profiles as classic BPF (seccomp(2), OCI runtime-spec "Seccomp").
//!
//! The program is a binary search over system call numbers, so that the length
//! of a profile costs a call little. `libseccomp` would bring a C library into
//! PID 1; `seccompiler` knows one matching action a filter where OCI has many.

use libc::sock_filter;
use oci_spec::runtime::{
    Arch, LinuxSeccomp, LinuxSeccompAction, LinuxSeccompArg, LinuxSeccompFilterFlag,
    LinuxSeccompOperator,
};
use syscalls::{x86, x86_64};

use crate::failure::{Failure, Kind, Result};

const LD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const JA: u16 = 0x05;
const JEQ: u16 = 0x15;
const JGT: u16 = 0x25;
const JGE: u16 = 0x35;
const RET: u16 = 0x06;

const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGUMENTS: u32 = 16;

const AUDIT_ARCH_X86_64: u32 = 0xC000_003E;
const AUDIT_ARCH_I386: u32 = 0x4000_0003;
const X32_BIT: u32 = 0x4000_0000;

/// Longest program that the kernel takes (`BPF_MAXINSNS`).
const MAX_INSTRUCTIONS: usize = 4096;

fn op(code: u16, k: u32) -> sock_filter {
    sock_filter {
        code,
        jt: 0,
        jf: 0,
        k,
    }
}

fn jump(code: u16, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code, jt, jf, k }
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<u32> {
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            libc::SECCOMP_RET_KILL_THREAD
        }
        LinuxSeccompAction::ScmpActKillProcess => libc::SECCOMP_RET_KILL_PROCESS,
        LinuxSeccompAction::ScmpActTrap => libc::SECCOMP_RET_TRAP,
        LinuxSeccompAction::ScmpActErrno => libc::SECCOMP_RET_ERRNO | (errno.unwrap_or(1) & 0xFFFF),
        LinuxSeccompAction::ScmpActTrace => libc::SECCOMP_RET_TRACE | (errno.unwrap_or(1) & 0xFFFF),
        LinuxSeccompAction::ScmpActAllow => libc::SECCOMP_RET_ALLOW,
        LinuxSeccompAction::ScmpActLog => libc::SECCOMP_RET_LOG,
        LinuxSeccompAction::ScmpActNotify => {
            return Err(Failure::new(
                Kind::Unimplemented,
                "seccomp action SCMP_ACT_NOTIFY is not supported: the listener would be outside the guest",
            ));
        }
    })
}

/// Translates a profile.
///
/// Names that the architecture does not know are skipped, as profiles list calls of all of them.
///
/// # Errors
/// SCMP_ACT_NOTIFY, an argument index above 5, a program longer than the kernel takes.
pub fn compile(profile: &LinuxSeccomp) -> Result<Vec<sock_filter>> {
    let default = action(profile.default_action(), profile.default_errno_ret())?;
    let wants_i386 = profile
        .architectures()
        .iter()
        .flatten()
        .any(|arch| *arch == Arch::ScmpArchX86);
    let native = architecture(profile, default, |name| {
        name.parse::<x86_64::Sysno>()
            .ok()
            .map(|number| number as u32)
    })?;
    let foreign = if wants_i386 {
        architecture(profile, default, |name| {
            name.parse::<x86::Sysno>().ok().map(|number| number as u32)
        })?
    } else {
        vec![op(RET, libc::SECCOMP_RET_KILL_PROCESS)]
    };
    let mut program = vec![op(LD, ARCH), jump(JEQ, AUDIT_ARCH_X86_64, 0, 1)];
    program.push(op(JA, 2 + foreign.len() as u32));
    program.push(jump(JEQ, AUDIT_ARCH_I386, 1, 0));
    program.push(op(RET, libc::SECCOMP_RET_KILL_PROCESS));
    program.push(op(LD, NUMBER));
    program.extend(foreign);
    // The jump above lands here, before the native part loads its number.
    let skipped = program.len() - 3;
    program[2].k = skipped as u32;
    program.push(op(LD, NUMBER));
    program.push(jump(JGE, X32_BIT, 0, 1));
    program.push(op(
        RET,
        libc::SECCOMP_RET_ERRNO | libc::ENOSYS.unsigned_abs(),
    ));
    program.extend(native);
    if program.len() > MAX_INSTRUCTIONS {
        return Err(Failure::invalid(format!(
            "the seccomp profile needs {} BPF instructions, the kernel takes {MAX_INSTRUCTIONS}",
            program.len()
        )));
    }
    Ok(program)
}

fn architecture(
    profile: &LinuxSeccomp,
    default: u32,
    number: impl Fn(&str) -> Option<u32>,
) -> Result<Vec<sock_filter>> {
    let mut bodies: std::collections::BTreeMap<u32, Vec<sock_filter>> =
        std::collections::BTreeMap::new();
    for rule in profile.syscalls().iter().flatten() {
        let verdict = action(rule.action(), rule.errno_ret())?;
        let alternatives = alternatives(rule.args().as_deref().unwrap_or_default());
        for name in rule.names() {
            let Some(number) = number(name) else { continue };
            let body = bodies.entry(number).or_default();
            for arguments in &alternatives {
                body.extend(one_rule(arguments, verdict)?);
            }
        }
    }
    for body in bodies.values_mut() {
        body.push(op(RET, default));
    }
    let entries: Vec<(u32, Vec<sock_filter>)> = bodies.into_iter().collect();
    Ok(search(&entries, default))
}

/// Conditions on different arguments must all hold; several on the same argument are
/// alternatives, as runc has it.
fn alternatives(arguments: &[LinuxSeccompArg]) -> Vec<Vec<LinuxSeccompArg>> {
    let repeated = arguments.iter().enumerate().any(|(index, one)| {
        arguments[..index]
            .iter()
            .any(|other| other.index() == one.index())
    });
    if repeated {
        arguments.iter().map(|one| vec![*one]).collect()
    } else {
        vec![arguments.to_vec()]
    }
}

/// Returns `verdict` when all conditions hold, else falls through.
fn one_rule(arguments: &[LinuxSeccompArg], verdict: u32) -> Result<Vec<sock_filter>> {
    let mut code = vec![op(RET, verdict)];
    for argument in arguments.iter().rev() {
        let rest = code.len() as u8;
        let mut condition = condition(argument, rest)?;
        condition.extend(code);
        code = condition;
    }
    Ok(code)
}

/// Falls through when the condition holds, else skips the `rest` instructions that follow.
fn condition(argument: &LinuxSeccompArg, rest: u8) -> Result<Vec<sock_filter>> {
    let index = u32::try_from(argument.index()).unwrap_or(u32::MAX);
    if index > 5 {
        return Err(Failure::invalid(format!(
            "seccomp: a system call has no argument {index}"
        )));
    }
    let low = ARGUMENTS + 8 * index;
    let high = low + 4;
    let value = argument.value();
    let (value_high, value_low) = ((value >> 32) as u32, value as u32);
    // In each list the last instruction jumps relative to the condition's end.
    Ok(match argument.op() {
        LinuxSeccompOperator::ScmpCmpEq => vec![
            op(LD, high),
            jump(JEQ, value_high, 0, 2 + rest),
            op(LD, low),
            jump(JEQ, value_low, 0, rest),
        ],
        LinuxSeccompOperator::ScmpCmpNe => vec![
            op(LD, high),
            jump(JEQ, value_high, 0, 2),
            op(LD, low),
            jump(JEQ, value_low, rest, 0),
        ],
        LinuxSeccompOperator::ScmpCmpGt => vec![
            op(LD, high),
            jump(JGT, value_high, 3, 0),
            jump(JEQ, value_high, 0, 2 + rest),
            op(LD, low),
            jump(JGT, value_low, 0, rest),
        ],
        LinuxSeccompOperator::ScmpCmpGe => vec![
            op(LD, high),
            jump(JGT, value_high, 3, 0),
            jump(JEQ, value_high, 0, 2 + rest),
            op(LD, low),
            jump(JGE, value_low, 0, rest),
        ],
        LinuxSeccompOperator::ScmpCmpLt => vec![
            op(LD, high),
            jump(JGT, value_high, 3 + rest, 0),
            jump(JEQ, value_high, 0, 2),
            op(LD, low),
            jump(JGE, value_low, rest, 0),
        ],
        LinuxSeccompOperator::ScmpCmpLe => vec![
            op(LD, high),
            jump(JGT, value_high, 3 + rest, 0),
            jump(JEQ, value_high, 0, 2),
            op(LD, low),
            jump(JGT, value_low, rest, 0),
        ],
        LinuxSeccompOperator::ScmpCmpMaskedEq => {
            // `value` is the mask, `valueTwo` what must remain.
            let wanted = argument.value_two().unwrap_or(0);
            vec![
                op(LD, high),
                op(AND, value_high),
                jump(JEQ, (wanted >> 32) as u32, 0, 3 + rest),
                op(LD, low),
                op(AND, value_low),
                jump(JEQ, wanted as u32, 0, rest),
            ]
        }
    })
}

fn search(entries: &[(u32, Vec<sock_filter>)], default: u32) -> Vec<sock_filter> {
    if entries.len() <= 3 {
        let mut code = Vec::new();
        for (number, body) in entries {
            code.push(jump(JEQ, *number, 1, 0));
            code.push(op(JA, body.len() as u32));
            code.extend_from_slice(body);
        }
        code.push(op(RET, default));
        return code;
    }
    let (left, right) = entries.split_at(entries.len() / 2);
    let lower = search(left, default);
    let mut code = vec![jump(JGE, right[0].0, 0, 1), op(JA, lower.len() as u32)];
    code.extend(lower);
    code.extend(search(right, default));
    code
}

/// Flags of seccomp(2) that the profile asks for.
///
/// # Errors
/// A flag that only makes sense with a listener.
pub fn flags(profile: &LinuxSeccomp) -> Result<libc::c_ulong> {
    let mut flags = 0;
    for flag in profile.flags().iter().flatten() {
        flags |= match flag {
            LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
            LinuxSeccompFilterFlag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
            LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => {
                libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW
            }
            other => {
                return Err(Failure::new(
                    Kind::Unimplemented,
                    format!("seccomp flag {other:?} is not supported"),
                ));
            }
        };
    }
    Ok(flags)
}

/// Puts the calling thread under `program`.
///
/// # Errors
/// Those of seccomp(2).
pub fn install(program: &[sock_filter], flags: libc::c_ulong) -> std::io::Result<()> {
    let length = u16::try_from(program.len()).map_err(|_| std::io::ErrorKind::InvalidInput)?;
    let filter = libc::sock_fprog {
        len: length,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel reads `length` instructions, which `program` has, and keeps none of
    // the pointers.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const filter,
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

    /// Runs a program as the kernel would.
    fn verdict(program: &[sock_filter], arch: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let load = |offset: u32| match offset {
            NUMBER => number,
            ARCH => arch,
            _ => {
                let argument = arguments[((offset - ARGUMENTS) / 8) as usize];
                if offset.is_multiple_of(8) {
                    argument as u32
                } else {
                    (argument >> 32) as u32
                }
            }
        };
        let (mut at, mut a) = (0usize, 0u32);
        loop {
            let i = program[at];
            at += 1;
            let mut branch = |taken: bool| at += usize::from(if taken { i.jt } else { i.jf });
            match i.code {
                LD => a = load(i.k),
                AND => a &= i.k,
                JA => at += i.k as usize,
                JEQ => branch(a == i.k),
                JGT => branch(a > i.k),
                JGE => branch(a >= i.k),
                RET => return i.k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    fn profile(text: &str) -> Vec<sock_filter> {
        compile(&serde_json::from_str(text).unwrap()).unwrap()
    }

    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const EPERM: u32 = libc::SECCOMP_RET_ERRNO | 1;

    #[test]
    fn every_listed_call_and_no_other() {
        let names: Vec<String> = (0..200u32)
            .filter(|number| number % 3 == 0)
            .filter_map(|number| x86_64::Sysno::new(number as usize))
            .map(|number| number.name().to_owned())
            .collect();
        let program = profile(&format!(
            r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{{"names":{},"action":"SCMP_ACT_ALLOW"}}]}}"#,
            serde_json::to_string(&names).unwrap()
        ));
        for number in 0..200 {
            let expected = if number % 3 == 0 { ALLOW } else { EPERM };
            assert_eq!(
                verdict(&program, AUDIT_ARCH_X86_64, number, [0; 6]),
                expected,
                "{number}"
            );
        }
        assert_eq!(
            verdict(&program, AUDIT_ARCH_I386, 0, [0; 6]),
            libc::SECCOMP_RET_KILL_PROCESS
        );
        assert_eq!(
            verdict(&program, AUDIT_ARCH_X86_64, X32_BIT, [0; 6]),
            libc::SECCOMP_RET_ERRNO | 38
        );
    }

    #[test]
    fn arguments_with_every_operator() {
        let big = 0x1_0000_0005u64;
        for (operator, holds) in [
            ("EQ", [false, true, false]),
            ("NE", [true, false, true]),
            ("LT", [true, false, false]),
            ("LE", [true, true, false]),
            ("GT", [false, false, true]),
            ("GE", [false, true, true]),
        ] {
            let program = profile(&format!(
                r#"{{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{{"names":["personality"],"action":"SCMP_ACT_ALLOW",
                "args":[{{"index":1,"value":{big},"op":"SCMP_CMP_{operator}"}}]}}]}}"#
            ));
            for (argument, holds) in [big - 6, big, big + (1 << 33)].into_iter().zip(holds) {
                let expected = if holds { ALLOW } else { EPERM };
                assert_eq!(
                    verdict(
                        &program,
                        AUDIT_ARCH_X86_64,
                        libc::SYS_personality as u32,
                        [9, argument, 9, 9, 9, 9]
                    ),
                    expected,
                    "{operator} {argument:#x}"
                );
            }
        }
    }

    #[test]
    fn masks_alternatives_and_i386() {
        let program = profile(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","architectures":["SCMP_ARCH_X86_64","SCMP_ARCH_X86"],"syscalls":[
            {"names":["clone"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":2114060288,"valueTwo":0,"op":"SCMP_CMP_MASKED_EQ"}]},
            {"names":["personality","no_such_call"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":0,"op":"SCMP_CMP_EQ"},{"index":0,"value":8,"op":"SCMP_CMP_EQ"}]},
            {"names":["getpid"],"action":"SCMP_ACT_LOG"}]}"#,
        );
        let run = |number: i64, first: u64| {
            verdict(
                &program,
                AUDIT_ARCH_X86_64,
                number as u32,
                [first, 0, 0, 0, 0, 0],
            )
        };
        assert_eq!(run(libc::SYS_clone, 0x11), ALLOW);
        assert_eq!(run(libc::SYS_clone, 0x1000_0000), EPERM);
        assert_eq!(run(libc::SYS_personality, 8), ALLOW);
        assert_eq!(run(libc::SYS_personality, 4), EPERM);
        assert_eq!(
            verdict(&program, AUDIT_ARCH_I386, 20, [0; 6]),
            libc::SECCOMP_RET_LOG
        );
    }

    #[test]
    fn listeners_are_refused() {
        let text = r#"{"defaultAction":"SCMP_ACT_NOTIFY"}"#;
        assert!(compile(&serde_json::from_str(text).unwrap()).is_err());
    }
}
