//! QEMU's microvm machine with the disks, the shared directory or the network of a section.

use std::{
    fs::File,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use super::{Ground, Section, VHOST_NET, net::Link};
use crate::{
    child::{Running, find, quiet, tail},
    error::BenchError,
};

/// Runs the workload in a machine of its own and returns what it said. `make_link` is for the
/// network's.
///
/// # Errors
/// QEMU or virtiofsd is not installed or fails, or the workload does.
pub fn run(
    ground: &Ground,
    section: Section,
    make_link: fn(u8) -> Result<Link, BenchError>,
) -> Result<String, BenchError> {
    let qemu = find("qemu-system-x86_64", "qemu-system-x86")?;
    let scratch = ground.scratch.path();
    let console = scratch.join("console");
    let log = scratch.join("stderr");
    // What the one before has said.
    let _ = std::fs::remove_file(&console);
    let stderr = File::create(&log).map_err(BenchError::io("cannot create a log file"))?;
    let memory = ground.memory_mib;
    let link = match section {
        Section::Network => Some(make_link(3)?),
        Section::Block | Section::Share => None,
    };
    let mut command = match &link {
        Some(link) => link.command(&qemu)?,
        None => Command::new(qemu),
    };
    command
        .args(["-M", "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=off,x-option-roms=off,memory-backend=m"])
        .args(["-object", &format!("memory-backend-memfd,id=m,share=on,size={memory}M")])
        .args(["-m", &format!("{memory}M"), "-accel", "kvm", "-cpu", "host", "-smp", "1"])
        .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
        .args(["-global", "virtio-mmio.force-legacy=off"])
        .arg("-kernel")
        .arg(&ground.kernel)
        .arg("-chardev")
        .arg(format!("file,id=hvc,path={}", console.display()))
        .args(["-device", "virtio-serial-device", "-device", "virtconsole,chardev=hvc"]);
    disk(&mut command, "root", &ground.erofs, true);
    let mut cmdline = format!(
        "console=hvc0 quiet reboot=k panic=-1 root=/dev/vda rootfstype=erofs ro init=/bin/init \
         bench.section={} bench.seconds={}",
        section.name(),
        ground.seconds
    );
    let mut server = None;
    match section {
        Section::Block => {
            let image = scratch.join("disk.ext4");
            quiet(Command::new("truncate").args(["-s", "256M"]).arg(&image))?;
            quiet(
                Command::new(find("mkfs.ext4", "e2fsprogs")?)
                    .arg("-qF")
                    .arg(&image),
            )?;
            disk(&mut command, "disk", &image, false);
        }
        Section::Share => {
            let socket = scratch.join("virtiofsd");
            server = Some(virtiofsd(&socket, &ground.share)?);
            command
                .arg("-chardev")
                .arg(format!("socket,id=fs,path={}", socket.display()))
                .args(["-device", "vhost-user-fs-device,chardev=fs,tag=share"]);
        }
        Section::Network => {}
    }
    if let Some((link, tap)) = link.as_ref().and_then(|l| Some((l, l.tap_name()?))) {
        network(&mut command, tap);
        cmdline += &format!(
            " bench.address={} bench.server={}",
            link.guest(),
            link.host()
        );
    }
    command.args(["-append", &cmdline]);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr);
    let mut machine = Running::spawn("qemu", &mut command)?;
    let said = wait(&mut machine, &console, &log, ground.limit);
    drop((machine, server, link));
    said
}

fn disk(command: &mut Command, id: &str, file: &Path, read_only: bool) {
    let read_only = if read_only { ",readonly=on" } else { "" };
    command
        .arg("-drive")
        .arg(format!(
            "id={id},file={},format=raw,if=none{read_only}",
            file.display()
        ))
        .arg("-device")
        .arg(format!("virtio-blk-device,drive={id}"));
}

fn network(command: &mut Command, tap: &str) {
    let vhost = if Path::new(VHOST_NET).exists() {
        "on"
    } else {
        "off"
    };
    command
        .arg("-netdev")
        .arg(format!(
            "tap,id=n,ifname={tap},script=no,downscript=no,vhost={vhost}"
        ))
        .args(["-device", "virtio-net-device,netdev=n"]);
}

fn virtiofsd(socket: &Path, directory: &Path) -> Result<Running, BenchError> {
    // Debian keeps it outside of the path.
    let program = Path::new("/usr/libexec/virtiofsd");
    if !program.exists() {
        return Err(BenchError::Missing {
            what: "program",
            path: program.into(),
            remedy: "install virtiofsd",
        });
    }
    let _ = std::fs::remove_file(socket);
    let mut command = Command::new(program);
    command
        .arg(format!("--socket-path={}", socket.display()))
        .arg(format!("--shared-dir={}", directory.display()))
        .args(["--cache", "auto", "--inode-file-handles=never"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let running = Running::spawn("virtiofsd", &mut command)?;
    let started = Instant::now();
    while !socket.exists() && started.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(running)
}

fn wait(
    machine: &mut Running,
    console: &Path,
    log: &Path,
    limit: Duration,
) -> Result<String, BenchError> {
    let started = Instant::now();
    loop {
        let said = std::fs::read_to_string(console).unwrap_or_default();
        if said.contains("\nENDED ") {
            return Ok(said);
        }
        if let Some(status) = machine.ended()? {
            return Err(BenchError::Program {
                program: "qemu".into(),
                problem: format!("ended ({status}) before the workload"),
                output: format!("{} {}", tail(console), tail(log)),
            });
        }
        if started.elapsed() > limit {
            return Err(BenchError::Deadline {
                program: "qemu".into(),
                limit,
                output: tail(console),
            });
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}
