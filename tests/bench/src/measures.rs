//! The measures: which contenders take turns, and what is reported of them.

use std::{
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use crate::{
    child::{find, quiet},
    cold::{self, Devices},
    container,
    error::BenchError,
    image, memory,
    options::{Options, timeout_scale},
    report::{Measure, Series},
};

/// Starts each monitor in turn and times it until its agent answers.
///
/// # Errors
/// When one cannot be started or its agent does not answer.
pub fn cold_start(options: &Options) -> Result<Measure, BenchError> {
    let qemu = find("qemu-system-x86_64", "qemu-system-x86")?;
    let vmm = options.file("libexec/caisson/caisson-vmm");
    if !Path::new("/dev/vhost-vsock").exists() {
        quiet(Command::new("modprobe").arg("vhost_vsock"))?;
    }
    // A process id is free again only once its owner is gone, and so is its CID.
    let cid = 0x1000_0000 + std::process::id();
    let names = ["caisson", "qemu microvm", "qemu microvm, fewest devices"];
    let start = |contender: usize| match contender {
        0 => cold::start_caisson(&vmm, &options.guest),
        1 => cold::start_qemu(&qemu, &options.guest, cid, Devices::All),
        _ => cold::start_qemu(&qemu, &options.guest, cid, Devices::Fewest),
    };
    let mut values = vec![Vec::new(); names.len()];
    for run in 0..=options.runs {
        for (contender, name) in names.iter().enumerate() {
            let started = Instant::now();
            let mut machine = start(contender)?;
            machine.wait_for_agent(name, options.limit)?;
            values[contender].push(started.elapsed().as_secs_f64() * 1e3);
        }
        progress("cold start", run, options.runs);
    }
    Ok(Measure {
        title: "Cold start".into(),
        definition: format!(
            "From the exec of the monitor to the agent's answer to `Hello` over vsock, asked every {} ms. \
             Same kernel, guest image and command line, one vCPU, {} MiB.",
            cold::poll_interval().as_millis(),
            options.guest.memory_mib
        ),
        unit: "ms",
        series: names
            .iter()
            .zip(values)
            .map(|(name, values)| series(name, values))
            .collect(),
    })
}

/// Starts the same busybox by each runtime in turn.
///
/// # Errors
/// When one fails or is too slow.
pub fn container_start(
    options: &Options,
    scratch: &Path,
    rootfs: &Path,
) -> Result<Vec<Measure>, BenchError> {
    let runtimes = [
        container::caisson(&options.file("bin/caisson")),
        container::oci(&find("runc", "runc")?, scratch, rootfs)?,
        container::oci(&find("crun", "crun")?, scratch, rootfs)?,
    ];
    let mut first = vec![Vec::new(); runtimes.len()];
    let mut whole = vec![Vec::new(); runtimes.len()];
    for run in 0..=options.runs {
        for (index, runtime) in runtimes.iter().enumerate() {
            let (byte, end) = container::start_once(runtime, run, scratch, options.limit)?;
            first[index].push(byte);
            whole[index].push(end);
        }
        progress("container start", run, options.runs);
    }
    let measure = |title: &str, definition: &str, values: Vec<Vec<f64>>| Measure {
        title: title.into(),
        definition: definition.into(),
        unit: "ms",
        series: runtimes
            .iter()
            .zip(values)
            .map(|(runtime, values)| series(&runtime.name, values))
            .collect(),
    };
    Ok(vec![
        measure(
            "Container start",
            "From the exec of `caisson run --rm`, `runc run`, `crun run` to the first byte that the \
             workload (busybox `echo`) writes. For caisson this includes booting the microVM.",
            first,
        ),
        measure(
            "Whole container",
            "The same, until the command has ended and everything is cleaned up.",
            whole,
        ),
    ])
}

/// Sizes the processes of one idle sandbox, and QEMU with the same guest.
///
/// # Errors
/// When a sandbox cannot be started or sized.
pub fn idle_memory(options: &Options) -> Result<Measure, BenchError> {
    let caisson = options.file("bin/caisson");
    let name = format!("caisson-bench-{}", std::process::id());
    let names = ["caisson-vmm", "caisson-fs", "containerd-shim-caisson-v2"];
    let before = memory::processes(&names)?;
    let mut run = Command::new(&caisson);
    run.args(["run", "-d", "--network", "none", "--name", &name]);
    run.args([
        "-m",
        &format!("{}m", options.guest.memory_mib),
        image::REFERENCE,
    ]);
    quiet(run.args(["sleep", "1000"]))?;
    std::thread::sleep(Duration::from_secs_f64(0.5 * timeout_scale()));
    let sized = size_new_processes(&names, &before, options.guest.memory_mib);
    quiet(Command::new(&caisson).args(["rm", "-f", &name]))?;
    let (total, parts) = sized?;
    if parts.is_empty() {
        return Err(BenchError::Program {
            program: "caisson run -d".into(),
            problem: format!("left none of {names:?} running"),
            output: String::new(),
        });
    }

    let qemu = find("qemu-system-x86_64", "qemu-system-x86")?;
    let cid = 0x1000_0000 + std::process::id();
    let mut machine = cold::start_qemu(&qemu, &options.guest, cid, Devices::All)?;
    machine.wait_for_agent("qemu microvm", options.limit)?;
    let peer = memory::overhead_mib(machine.process.id(), options.guest.memory_mib)?;
    let mut all = vec![
        series("caisson", vec![total]),
        series("qemu microvm", vec![peer]),
    ];
    all.extend(parts);
    Ok(Measure {
        title: "Host memory of one idle sandbox".into(),
        definition: "Proportional set size of all of a sandbox's host processes (and of each), guest memory \
                     excluded; of QEMU, its one process. One sandbox runs, so shared pages count whole."
            .into(),
        unit: "MiB",
        series: all,
    })
}

/// Sizes each process of these names that was not there before, and all together.
fn size_new_processes(
    names: &[&str],
    before: &[(String, u32)],
    guest_mib: u32,
) -> Result<(f64, Vec<Series>), BenchError> {
    let mut total = 0.0;
    let mut parts = Vec::new();
    for process in memory::processes(names)? {
        if !before.contains(&process) {
            let mib = memory::overhead_mib(process.1, guest_mib)?;
            parts.push(series(&format!("· {}", process.0), vec![mib]));
            total += mib;
        }
    }
    Ok((total, parts))
}

/// The values less the first, which warmed the caches.
fn series(name: &str, values: Vec<f64>) -> Series {
    let skip = usize::from(values.len() > 1);
    Series {
        name: name.into(),
        values: values.into_iter().skip(skip).collect(),
    }
}

fn progress(what: &str, run: usize, runs: usize) {
    eprintln!("caisson-bench: {what}: {run} of {runs}");
}
