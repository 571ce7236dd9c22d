//! Measures Caisson beside its peers in one run: cold start beside QEMU's microvm
//! machine, container start beside runc and crun, host memory, exec, disks, shared directories and networks. `README.md`
//! says what each measure means; `run` runs this where a stock guest can run.

#![forbid(unsafe_code)]

mod child;
mod cold;
mod container;
mod error;
mod exec;
mod hello;
mod image;
mod io;
mod measures;
mod memory;
mod options;
mod report;
mod stats;

use std::{
    fs,
    path::Path,
    process::{Command, ExitCode},
};

use child::{find, quiet};
use error::BenchError;
use options::{Options, USAGE};
use report::Measure;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("caisson-bench: {error}");
            match error {
                BenchError::Usage(_) => ExitCode::from(2),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// Loads the benchmark image into the store of the Caisson under test.
///
/// # Errors
/// When it cannot be made or `caisson load` fails.
fn load_image(options: &Options, scratch: &Path, rootfs: &Path) -> Result<(), BenchError> {
    let archive = scratch.join("image.tar");
    image::make_archive(rootfs, &archive, image::REFERENCE)?;
    quiet(
        Command::new(options.file("bin/caisson"))
            .args(["load", "-i"])
            .arg(&archive),
    )
}

fn run() -> Result<(), BenchError> {
    let Some(options) = Options::parse()? else {
        println!("{USAGE}");
        return Ok(());
    };
    let scratch =
        tempfile::TempDir::new().map_err(BenchError::io("cannot make a temporary directory"))?;
    let mut measures = Vec::new();
    if options.wants("cold") {
        measures.push(measures::cold_start(&options)?);
    }
    if ["container", "memory", "exec"]
        .iter()
        .any(|one| options.wants(one))
    {
        let rootfs = image::make_rootfs(scratch.path(), &find("busybox", "busybox-static")?)?;
        load_image(&options, scratch.path(), &rootfs)?;
        if options.wants("container") {
            measures.extend(measures::container_start(
                &options,
                scratch.path(),
                &rootfs,
            )?);
        }
        if options.wants("memory") {
            measures.push(measures::idle_memory(&options)?);
        }
        if options.wants("exec") {
            measures.extend(exec::measure(&options, scratch.path(), &rootfs)?);
        }
        quiet(Command::new(options.file("bin/caisson")).args(["rmi", image::REFERENCE]))?;
    }
    measures.extend(inputs_and_outputs(&options)?);
    write_report(&options, &measures)
}

/// Disks, shared directories and networks.
fn inputs_and_outputs(options: &Options) -> Result<Vec<Measure>, BenchError> {
    use io::Section::{Block, Network, Share};
    let wanted: Vec<_> = [Block, Share, Network]
        .into_iter()
        .filter(|section| options.wants(section.name()))
        .collect();
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let ground = io::Ground::make(options)?;
    let mut measures = Vec::new();
    for section in wanted {
        measures.extend(io::measure(&ground, section, options.runs)?);
    }
    Ok(measures)
}

/// First line that a program prints about its version.
fn version(program: &str) -> String {
    Command::new(program)
        .arg("--version")
        .output()
        .ok()
        .and_then(|o| {
            let text = String::from_utf8_lossy(&o.stdout).into_owned();
            text.lines().next().map(str::to_string)
        })
        .unwrap_or_else(|| format!("{program}: not there"))
}

fn environment(options: &Options) -> Vec<String> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map_or("unknown processor", |rest| {
            rest.trim_start_matches([' ', '\t', ':'])
        });
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let nested = if cpuinfo.contains(" hypervisor") {
        "; itself a virtual machine"
    } else {
        ""
    };
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    vec![
        format!("host: {cpus} × {model}, Linux {}{nested}", kernel.trim()),
        format!(
            "peers: {}; {}; {}",
            version("qemu-system-x86_64"),
            version("runc"),
            version("crun")
        ),
        format!(
            "kernel command line of cold starts: `{}`",
            options.guest.cmdline
        ),
    ]
}

fn write_report(options: &Options, measures: &[Measure]) -> Result<(), BenchError> {
    fs::create_dir_all(&options.out).map_err(BenchError::io(format!(
        "cannot make {}",
        options.out.display()
    )))?;
    let results: Vec<_> = measures
        .iter()
        .map(|measure| {
            let series: serde_json::Map<_, _> = measure
                .series
                .iter()
                .map(|s| (s.name.clone(), s.values.clone().into()))
                .collect();
            serde_json::json!({ "title": measure.title, "unit": measure.unit, "series": series })
        })
        .collect();
    let markdown = report::markdown(&environment(options), measures);
    println!("{markdown}");
    for (name, text) in [
        ("report.md", markdown),
        ("plot.svg", report::svg(measures)),
        ("results.json", serde_json::Value::from(results).to_string()),
    ] {
        let path = options.out.join(name);
        fs::write(&path, text)
            .map_err(BenchError::io(format!("cannot write {}", path.display())))?;
    }
    Ok(())
}
