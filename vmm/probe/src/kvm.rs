//! The checks of `/dev/kvm`.

use std::{
    ffi::CString, fs::OpenOptions, io::ErrorKind, os::unix::ffi::OsStrExt, path::Path,
    time::Duration,
};

use kvm_ioctls::{Cap, Kvm};

use crate::{
    Check, Report,
    guest::{self, GuestError},
    programs,
};

/// Where KVM is unless said otherwise.
pub const DEFAULT_KVM: &str = "/dev/kvm";

/// The only version of the KVM API there has been since 2007 (`KVM_GET_API_VERSION` in the
/// kernel's `Documentation/virt/kvm/api.rst`).
const API_VERSION: i32 = 12;

/// Least speed at which a stock guest gets through its boot before time-outs end it, in
/// millions of instructions a second. KVM on any hardware gives over 1000, nested SVM under
/// QEMU's TCG gives 60 to 75, and a KVM that emulates every instruction about 2.
pub const MIN_MIPS: f64 = 20.0;

/// Least time for the guest's answer, whatever the speed budget.
const ANSWER: Duration = Duration::from_secs(5);

/// Capabilities without which `caisson-vmm` does not start.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Runs a tiny guest through `kvm` ([`DEFAULT_KVM`] if none) and tells what came of it.
///
/// `speed_budget` is how long the guest's speed is measured; the whole takes at most a few
/// seconds more, whatever KVM does. A second is plenty on any host.
///
/// The process's handler of the signal `SIGRTMIN + 5` is set: it gets the guest's thread out of
/// the kernel.
pub fn probe(kvm: Option<&Path>, speed_budget: Duration) -> Report {
    let mut report = Report {
        checks: Vec::new(),
        mips: None,
    };
    let path = kvm.unwrap_or(Path::new(DEFAULT_KVM));
    let kvm = match open(path) {
        Ok(kvm) => kvm,
        Err(check) => {
            report.checks.push(check);
            return report;
        }
    };
    report.checks.push(Check::ok(
        "kvm",
        format!("{} answers, API version {API_VERSION}", path.display()),
    ));
    report.checks.push(capabilities(&kvm, path));
    report.checks.push(processor(&kvm));
    if !report.is_usable() {
        return report;
    }
    report.checks.push(long_mode(&kvm, path));
    if !report.is_usable() {
        return report;
    }
    report.checks.push(cmpxchg16b(&kvm, path));
    match speed(&kvm, speed_budget) {
        Ok(mips) => {
            report.mips = Some(mips);
            report.checks.push(judge_speed(mips, path));
        }
        Err(error) => report.checks.push(Check::failed(
            "speed",
            format!(
                "the speed of a guest of {} cannot be measured: {error}",
                path.display()
            ),
            USE_ANOTHER_HOST,
        )),
    }
    report
}

const USE_ANOTHER_HOST: &str = "this KVM does not run guests on the processor itself: a stock guest \
    cannot run here; use a host with VT-x or AMD-V, or one whose own hypervisor offers nested \
    virtualization";

fn open(path: &Path) -> Result<Kvm, Check> {
    let shown = path.display();
    if let Err(error) = OpenOptions::new().read(true).write(true).open(path) {
        return Err(Check::failed(
            "kvm",
            format!("{shown} cannot be opened: {error}"),
            match error.kind() {
                ErrorKind::PermissionDenied => format!(
                    "run as root, or add your user to the group that owns {shown} (usermod -aG kvm USER) \
                     and log in again"
                ),
                _ => load_module_advice(&cpu_flags()),
            },
        ));
    }
    let no_kvm = |why: String| {
        Check::failed(
            "kvm",
            format!("{shown} is not a KVM device: {why}"),
            "see what was mounted or created there (the device is a character device, major 10, minor 232)",
        )
    };
    let c_path = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| no_kvm("its name holds a zero byte".to_owned()))?;
    let kvm = Kvm::new_with_path(c_path).map_err(|error| no_kvm(error.to_string()))?;
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        version if version < 0 => Err(no_kvm("it does not know KVM_GET_API_VERSION".to_owned())),
        version => Err(Check::failed(
            "kvm",
            format!("{shown} has API version {version}, not {API_VERSION}"),
            "use a Linux kernel of 5.10 or newer",
        )),
    }
}

/// The `flags` line of the first processor.
fn cpu_flags() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    text.lines()
        .find(|line| line.starts_with("flags"))
        .unwrap_or_default()
        .to_owned()
}

fn load_module_advice(flags: &str) -> String {
    let has = |name| flags.split_whitespace().any(|flag| flag == name);
    if has("svm") {
        "load the module: modprobe kvm_amd".to_owned()
    } else if has("vmx") {
        "load the module: modprobe kvm_intel".to_owned()
    } else if has("hypervisor") {
        "this host is itself a virtual machine without nested virtualization: have it switched on \
         by whoever runs the host below, or use another host"
            .to_owned()
    } else {
        "the processor shows neither VT-x nor AMD-V: switch virtualization on in the firmware's \
         set-up, or use another host"
            .to_owned()
    }
}

fn capabilities(kvm: &Kvm, path: &Path) -> Check {
    let missing: Vec<_> = NEEDED
        .iter()
        .filter(|(capability, _)| !kvm.check_extension(*capability))
        .map(|(_, name)| *name)
        .collect();
    if missing.is_empty() {
        return Check::ok("kvm-capabilities", "KVM has all capabilities that are used");
    }
    Check::failed(
        "kvm-capabilities",
        format!("{} lacks {}", path.display(), missing.join(", ")),
        "use a stock Linux kernel of 5.10 or newer with KVM on x86-64",
    )
}

/// Features that the guest kernel was built for, of what KVM shows to guests.
fn processor(kvm: &Kvm) -> Check {
    // CPUID leaf, register (0 = ecx, 1 = edx), bit, name.
    const FEATURES: &[(u32, u8, u32, &str)] = &[
        (0x8000_0001, 1, 29, "long mode"),
        (0x8000_0001, 1, 20, "NX"),
        (1, 1, 26, "SSE2"),
        (1, 0, 13, "cmpxchg16b"),
    ];
    let id = "guest-processor";
    let entries = match kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES) {
        Ok(entries) => entries,
        Err(error) => {
            return Check::failed(
                id,
                format!("KVM_GET_SUPPORTED_CPUID of /dev/kvm fails: {error}"),
                "use a stock Linux kernel of 5.10 or newer with KVM on x86-64",
            );
        }
    };
    let missing: Vec<_> = FEATURES
        .iter()
        .filter(|(leaf, register, bit, _)| {
            let entry = entries.as_slice().iter().find(|e| e.function == *leaf);
            let value = entry.map_or(0, |e| if *register == 0 { e.ecx } else { e.edx });
            value & (1 << bit) == 0
        })
        .map(|(.., name)| *name)
        .collect();
    if missing.is_empty() {
        let nested = if cpu_flags()
            .split_whitespace()
            .any(|flag| flag == "hypervisor")
        {
            " (this host is itself a virtual machine)"
        } else {
            ""
        };
        Check::ok(id, format!("guests get a 64-bit processor{nested}"))
    } else {
        Check::failed(
            id,
            format!(
                "/dev/kvm shows guests a processor without {}",
                missing.join(", ")
            ),
            "use a host with a 64-bit processor of 2013 or later",
        )
    }
}

fn long_mode(kvm: &Kvm, path: &Path) -> Check {
    let id = "guest-runs";
    let expected = programs::COMPUTE_RESULT;
    let wrong = match guest::run(kvm, programs::COMPUTE, true, ANSWER) {
        Ok(outcome)
            if u64::from(outcome.last_report) == expected
                && outcome.window == [expected, expected.swap_bytes()] =>
        {
            return Check::ok(id, "a 64-bit guest with paging computes");
        }
        Ok(outcome) => format!("it computed {}, not {expected}", outcome.last_report),
        Err(error) => error.to_string(),
    };
    Check::failed(
        id,
        format!(
            "a 64-bit guest of {} does not work: {wrong}",
            path.display()
        ),
        USE_ANOTHER_HOST,
    )
}

fn cmpxchg16b(kvm: &Kvm, path: &Path) -> Check {
    let id = "guest-cmpxchg16b";
    let wrong = match guest::run(kvm, programs::CMPXCHG16B, true, ANSWER) {
        Ok(outcome)
            if outcome.last_report == programs::CMPXCHG16B_RESULT
                && outcome.window == programs::CMPXCHG16B_STORED =>
        {
            return Check::ok(id, "cmpxchg16b works in a guest");
        }
        Ok(outcome) => format!(
            "it gives a wrong result (checks passed: {:#06b})",
            outcome.last_report
        ),
        Err(GuestError::Stopped { exit, .. }) => format!("the guest stopped with {exit}"),
        Err(error) => error.to_string(),
    };
    Check::failed(
        id,
        format!(
            "cmpxchg16b does not work in a guest of {}: {wrong}",
            path.display()
        ),
        USE_ANOTHER_HOST,
    )
}

/// Millions of instructions a second.
fn speed(kvm: &Kvm, budget: Duration) -> Result<f64, GuestError> {
    // Short budgets still allow for one round of the loop on a slow KVM.
    let outcome = guest::run(
        kvm,
        programs::LOOP,
        false,
        budget.max(Duration::from_millis(50)),
    )?;
    let instructions = outcome.reports.saturating_mul(programs::LOOP_INSTRUCTIONS);
    // No loss that matters: far fewer than 2^52 instructions.
    #[expect(clippy::cast_precision_loss)]
    let instructions = instructions as f64;
    Ok(instructions / 1e6 / outcome.elapsed.as_secs_f64().max(1e-9))
}

fn judge_speed(mips: f64, path: &Path) -> Check {
    let id = "guest-speed";
    if mips < MIN_MIPS {
        return Check::failed(
            id,
            format!(
                "guests of {} are too slow: {mips:.1} million instructions a second, at least \
                 {MIN_MIPS:.0} are needed",
                path.display()
            ),
            USE_ANOTHER_HOST,
        );
    }
    if mips < 500.0 {
        return Check::warning(
            id,
            format!("guests run {mips:.0} million instructions a second: this KVM is emulated"),
            "stretch time-outs with CAISSON_TIMEOUT_SCALE, and take no measurement here for the real thing",
        );
    }
    Check::ok(
        id,
        format!("guests run {mips:.0} million instructions a second"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;

    fn only_failure(report: &Report) -> &Check {
        assert_eq!(report.checks.len(), 1, "{report:?}");
        let check = &report.checks[0];
        assert_eq!(check.status, Status::Failed);
        check
    }

    #[test]
    fn something_else_in_its_place_is_told() {
        let budget = Duration::from_millis(100);
        let report = probe(Some(Path::new("/dev/null")), budget);
        let check = only_failure(&report);
        assert!(
            check.text.contains("/dev/null is not a KVM device"),
            "{check:?}"
        );
        let report = probe(Some(Path::new("/no/such/kvm")), budget);
        let check = only_failure(&report);
        assert!(check.text.contains("/no/such/kvm"), "{check:?}");
        assert!(check.advice.is_some());
    }

    #[test]
    fn advice_names_the_module() {
        assert!(load_module_advice("flags : fpu svm").contains("kvm_amd"));
        assert!(load_module_advice("flags : fpu vmx").contains("kvm_intel"));
        assert!(load_module_advice("flags : fpu hypervisor").contains("nested"));
        assert!(load_module_advice("flags : svmx").contains("firmware"));
    }

    #[test]
    fn speed_decides() {
        let path = Path::new(DEFAULT_KVM);
        assert_eq!(judge_speed(2.0, path).status, Status::Failed);
        assert_eq!(judge_speed(60.0, path).status, Status::Warning);
        assert_eq!(judge_speed(4000.0, path).status, Status::Ok);
        assert!(judge_speed(2.0, path).text.contains(DEFAULT_KVM));
    }

    #[test]
    fn this_host_gets_a_whole_report_in_time() {
        let begin = std::time::Instant::now();
        let report = probe(None, Duration::from_millis(200));
        println!("{}", serde_json::to_string_pretty(&report).unwrap());
        assert!(begin.elapsed() < Duration::from_secs(20));
        // A report has everything or says what failed.
        assert!(report.mips.is_some() || !report.is_usable());
        if Path::new(DEFAULT_KVM).exists() {
            assert!(report.checks.len() > 1, "{report:?}");
        }
    }
}
