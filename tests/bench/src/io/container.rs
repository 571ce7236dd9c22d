//! The workload in a container: by `caisson run`, and by an OCI bundle that runc and Caisson both take.

use std::{
    fs::{self, File},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use super::{Ground, Section, net::Link};
use crate::{
    child::{Running, find, quiet, tail},
    error::BenchError,
};

/// Name under which the image is loaded.
pub const REFERENCE: &str = "caisson-bench-io:latest";

/// Runs it by Caisson. A network needs one that is made for it, which a bundle names.
///
/// # Errors
/// When Caisson or the workload fails.
pub fn caisson(ground: &Ground, section: Section) -> Result<String, BenchError> {
    if section == Section::Network {
        return bundle(ground, &[&ground.caisson], section);
    }
    let mut command = Command::new(&ground.caisson);
    command.args(["run", "--rm", "--network", "none", "--cpus", "1"]);
    command.args(["-m", &format!("{}m", ground.memory_mib)]);
    if section == Section::Share {
        command
            .arg("-v")
            .arg(format!("{}:/share", ground.share.display()));
    }
    command.arg(REFERENCE).args(words(ground, section, ""));
    let log = ground.scratch.path().join("said");
    run(command, &log, ground.limit)
}

/// Runs it by runc.
///
/// # Errors
/// When runc or the workload fails.
pub fn runc(ground: &Ground, section: Section) -> Result<String, BenchError> {
    bundle(ground, &[&find("runc", "runc")?], section)
}

/// Runs the network's by Caisson where the host's kernel may move frames: with a configuration of
/// its own in a mount namespace of its own.
///
/// # Errors
/// As [`caisson`].
pub fn caisson_with_vhost_net(ground: &Ground) -> Result<String, BenchError> {
    let directory = ground.scratch.path().join("etc");
    let wrapper = ground.scratch.path().join("with-vhost-net");
    let script =
        "mkdir -p /etc/caisson && mount --bind \"${0%/*}/etc\" /etc/caisson && exec \"$@\"\n";
    fs::create_dir_all(&directory)
        .and_then(|()| fs::write(directory.join("config.toml"), "vhost_net = true\n"))
        .and_then(|()| fs::write(&wrapper, script))
        .map_err(BenchError::io("cannot write a configuration"))?;
    let words = ["unshare", "-m", "sh"].map(Path::new);
    let program = [&words[..], &[&wrapper, &ground.caisson]].concat();
    bundle(ground, &program, Section::Network)
}

fn words(ground: &Ground, section: Section, server: &str) -> Vec<String> {
    let seconds = ground.seconds.to_string();
    ["/bin/workload", section.name(), &seconds, server]
        .map(str::to_owned)
        .into()
}

/// `runtime` is the beginning of its command lines.
fn bundle(ground: &Ground, runtime: &[&Path], section: Section) -> Result<String, BenchError> {
    let scratch = ground.scratch.path();
    let bundle = scratch.join("bundle");
    let disk = scratch.join("disk");
    let link = match section {
        Section::Network => Some(Link::veth(1)?),
        _ => None,
    };
    let server = link.as_ref().map(Link::host).unwrap_or_default();
    let make = || -> std::io::Result<()> {
        fs::create_dir_all(&bundle)?;
        fs::create_dir_all(&disk)?;
        let namespace = link.as_ref().and_then(Link::namespace);
        let args = words(ground, section, &server);
        let spec = spec(ground, &disk, &args, namespace);
        fs::write(bundle.join("config.json"), spec.to_string())
    };
    make().map_err(BenchError::io("cannot make a bundle"))?;
    let id = format!("caisson-bench-io-{}", std::process::id());
    let with = |verb: &str| {
        let mut command = Command::new(runtime[0]);
        command.args(&runtime[1..]).args([verb, &id]);
        command
    };
    let log = scratch.join("said");
    let said = File::create(&log).map_err(BenchError::io("cannot create a log file"))?;
    let errors = said
        .try_clone()
        .map_err(BenchError::io("cannot copy a descriptor"))?;
    let mut create = Command::new(runtime[0]);
    create
        .args(&runtime[1..])
        .args(["create", "--bundle"])
        .arg(&bundle)
        .arg(&id);
    create.stdin(Stdio::null()).stdout(said).stderr(errors);
    let mut creating = Running::spawn("create", &mut create)?;
    let created = creating.wait(ground.limit)?;
    let waited = if created.success() {
        quiet(&mut with("start")).and_then(|()| wait(&mut with("state"), &log, ground.limit))
    } else {
        Err(BenchError::Program {
            program: format!("{} create", runtime[runtime.len() - 1].display()),
            problem: created.to_string(),
            output: tail(&log),
        })
    };
    if created.success() {
        quiet(with("delete").arg("--force"))?;
    }
    waited?;
    fs::read_to_string(&log).map_err(BenchError::io("cannot read what the workload said"))
}

/// Both runtimes' specification.
fn spec(
    ground: &Ground,
    disk: &Path,
    args: &[String],
    network: Option<String>,
) -> serde_json::Value {
    let mut network_namespace = serde_json::json!({ "type": "network" });
    if let Some(path) = network {
        network_namespace["path"] = path.into();
    }
    let bind = |source: &Path, target: &str| {
        serde_json::json!({
            "destination": target, "type": "bind", "source": source, "options": ["rbind", "rw"]
        })
    };
    serde_json::json!({
        "ociVersion": "1.1.0",
        "root": { "path": ground.rootfs },
        "process": { "cwd": "/", "args": args, "user": { "uid": 0, "gid": 0 } },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"] },
            { "destination": "/tmp", "type": "tmpfs", "source": "tmpfs" },
            bind(disk, "/disk"),
            bind(&ground.share, "/share"),
        ],
        "linux": {
            "resources": { "memory": { "limit": u64::from(ground.memory_mib) << 20 } },
            "namespaces": [
                { "type": "pid" }, { "type": "mount" }, { "type": "uts" }, { "type": "ipc" }, network_namespace
            ],
        },
    })
}

/// Waits until the container has stopped.
fn wait(state: &mut Command, log: &Path, limit: Duration) -> Result<(), BenchError> {
    let started = Instant::now();
    loop {
        let output = state
            .output()
            .map_err(BenchError::io("cannot ask for the container's state"))?;
        let state: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        if state["status"] == "stopped" {
            return Ok(());
        }
        if started.elapsed() > limit {
            return Err(BenchError::Deadline {
                program: "the workload".into(),
                limit,
                output: tail(log),
            });
        }
        // Asking takes time from the workload.
        std::thread::sleep(Duration::from_millis(1000));
    }
}

fn run(mut command: Command, log: &Path, limit: Duration) -> Result<String, BenchError> {
    let said = File::create(log).map_err(BenchError::io("cannot create a log file"))?;
    let errors = said
        .try_clone()
        .map_err(BenchError::io("cannot copy a descriptor"))?;
    command.stdin(Stdio::null()).stdout(said).stderr(errors);
    let status = Running::spawn("caisson", &mut command)?.wait(limit)?;
    if !status.success() {
        return Err(BenchError::Program {
            program: "caisson run".into(),
            problem: status.to_string(),
            output: tail(log),
        });
    }
    fs::read_to_string(log).map_err(BenchError::io("cannot read what the workload said"))
}
