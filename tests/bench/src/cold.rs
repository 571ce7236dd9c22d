//! Cold start: from the exec of the virtual machine monitor to the agent's answer.
//!
//! Every monitor boots the same kernel, guest image and command line on one vCPU
//! with the same memory and the same kinds of devices, and is asked in the same
//! way: [`hello`] over vsock, tried again every [`poll_interval`] until it is answered.

use std::{
    fs::File,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use caisson_protocol::ports;
use caisson_vmm_api::{
    BlockConfig, BlockContents, BootConfig, Call, Channel, DeviceConfig, Fd, MemoryConfig, Message,
    Request, VcpuConfig,
};
use tempfile::TempDir;
use vsock::VsockStream;

use crate::{
    child::{Running, tail},
    error::BenchError,
    hello::hello,
    options::timeout_scale,
};

/// Time between attempts to reach the agent: an answer is seen at most this much too late. Longer on a
/// slow machine, where asking takes processor time from the guest.
pub fn poll_interval() -> Duration {
    Duration::from_secs_f64(0.002 * timeout_scale())
}

/// What every monitor boots.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Uncompressed vmlinux.
    pub kernel: PathBuf,
    /// EROFS image with the agent.
    pub image: PathBuf,
    /// Kernel command line, the same for all.
    pub cmdline: String,
    /// Guest memory, MiB.
    pub memory_mib: u32,
}

/// What a peer's virtual machine has besides its root disk and vsock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Devices {
    /// The same as Caisson's.
    All,
    /// Nothing.
    Fewest,
}

/// A monitor that has been started and whose guest is booting or up.
pub struct Machine {
    /// The monitor's process.
    pub process: Running,
    scratch: TempDir,
    connect: Connect,
    /// Held open: the VMM stops its guest when it is closed.
    _control: Option<Channel>,
}

/// How the host reaches the guest's vsock ports.
enum Connect {
    /// Through the monitor's unix socket (`CONNECT <port>`).
    Unix(PathBuf),
    /// Through the host kernel's vsock.
    Vhost(u32),
}

/// A stream to the agent, of either kind.
trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

impl Machine {
    /// Waits until the agent answers.
    ///
    /// # Errors
    /// [`BenchError::Deadline`], or [`BenchError::Program`] when the monitor has ended.
    pub fn wait_for_agent(&mut self, name: &str, limit: Duration) -> Result<(), BenchError> {
        let started = Instant::now();
        let interval = poll_interval();
        loop {
            if self.ask(limit).is_ok() {
                return Ok(());
            }
            let output = || tail(&self.scratch.path().join("console"));
            if let Some(status) = self.process.ended()? {
                return Err(BenchError::Program {
                    program: name.into(),
                    problem: format!("ended ({status}) before its agent answered"),
                    output: format!("{} {}", output(), tail(&self.scratch.path().join("stderr"))),
                });
            }
            if started.elapsed() > limit {
                return Err(BenchError::Deadline {
                    program: name.into(),
                    limit,
                    output: output(),
                });
            }
            std::thread::sleep(interval);
        }
    }

    fn ask(&self, limit: Duration) -> io::Result<()> {
        let mut stream: Box<dyn Stream> = match &self.connect {
            Connect::Unix(path) => Box::new(connect_unix(path, ports::AGENT, limit)?),
            Connect::Vhost(cid) => {
                let stream = VsockStream::connect_with_cid_port(*cid, ports::AGENT)?;
                stream.set_read_timeout(Some(limit))?;
                Box::new(stream)
            }
        };
        hello(&mut stream).map(drop)
    }
}

/// The handshake of the VMM's vsock device.
fn connect_unix(path: &Path, port: u32, limit: Duration) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(limit))?;
    writeln!(stream, "CONNECT {port}")?;
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < 32 {
        stream.read_exact(&mut byte)?;
        if byte == *b"\n" {
            break;
        }
        line.push(byte[0]);
    }
    if line.starts_with(b"OK ") {
        Ok(stream)
    } else {
        Err(io::ErrorKind::ConnectionRefused.into())
    }
}

fn scratch(guest: &Guest) -> Result<(TempDir, File), BenchError> {
    for (what, path) in [("kernel", &guest.kernel), ("guest image", &guest.image)] {
        if !path.exists() {
            return Err(BenchError::Missing {
                what,
                path: path.clone(),
                remedy: "run `make build` first",
            });
        }
    }
    let scratch = TempDir::new().map_err(BenchError::io("cannot make a temporary directory"))?;
    let stderr = File::create(scratch.path().join("stderr"))
        .map_err(BenchError::io("cannot create a log file"))?;
    Ok((scratch, stderr))
}

fn open(path: &Path) -> Result<OwnedFd, BenchError> {
    File::open(path)
        .map(OwnedFd::from)
        .map_err(BenchError::io(format!("cannot open {}", path.display())))
}

/// Starts `caisson-vmm` as the sandbox library does, less its cgroup and user.
///
/// # Errors
/// When it cannot be started or refuses to boot.
pub fn start_caisson(vmm: &Path, guest: &Guest) -> Result<Machine, BenchError> {
    let (scratch, stderr) = scratch(guest)?;
    let socket = scratch.path().join("vsock");
    let listener = UnixListener::bind(&socket).map_err(BenchError::io("cannot bind a socket"))?;
    let console = File::create(scratch.path().join("console"))
        .map_err(BenchError::io("cannot create the console file"))?;
    let (ours, theirs) = Channel::pair()?;
    let theirs = OwnedFd::from(theirs);
    // One child at a time is started here, so no other inherits it.
    rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty())
        .map_err(|error| BenchError::io("cannot pass a socket on")(error.into()))?;
    let mut command = Command::new(vmm);
    command
        .args(["--api-fd", &theirs.as_raw_fd().to_string()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr);
    let process = Running::spawn("caisson-vmm", &mut command)?;
    drop(theirs);
    let files = [
        File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .map(OwnedFd::from)
            .map_err(BenchError::io("cannot open /dev/kvm"))?,
        open(&guest.kernel)?,
        open(&guest.image)?,
        OwnedFd::from(listener),
        OwnedFd::from(console),
    ];
    let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let boot = Call {
        id: 1,
        request: Request::Boot(Box::new(BootConfig {
            kvm: Fd(0),
            kernel: Fd(1),
            cmdline: guest.cmdline.clone(),
            vcpus: VcpuConfig { boot: 1, max: 1 },
            memory: MemoryConfig {
                boot_mib: guest.memory_mib,
                hotplug_mib: 0,
                shared: false,
            },
            devices: vec![
                DeviceConfig::Block(BlockConfig {
                    serial: "root".into(),
                    contents: BlockContents::File(Fd(2)),
                    read_only: true,
                    rate_limit: None,
                }),
                DeviceConfig::Vsock {
                    cid: 3,
                    listener: Fd(3),
                    acceptor: None,
                },
                DeviceConfig::Console {
                    output: Some(Fd(4)),
                },
                DeviceConfig::Rng,
                DeviceConfig::Balloon,
            ],
        })),
    };
    ours.send(&boot, &fds)?;
    if let (
        Message::Reply {
            result: Err(failure),
            ..
        },
        _,
    ) = ours.receive::<Message>()?
    {
        return Err(BenchError::Program {
            program: "caisson-vmm".into(),
            problem: failure.message,
            output: tail(&scratch.path().join("stderr")),
        });
    }
    Ok(Machine {
        process,
        scratch,
        connect: Connect::Unix(socket),
        _control: Some(ours),
    })
}

/// Starts QEMU's microvm machine with what it offers for speed: no firmware tables, no legacy
/// devices, no option ROMs. vsock is the host kernel's (`vhost_vsock`).
///
/// `devices` says whether it has what only comfort asks for, as Caisson always has: a console (which
/// costs QEMU time at the first output), an entropy source and a balloon.
///
/// # Errors
/// When it cannot be started.
pub fn start_qemu(
    qemu: &Path,
    guest: &Guest,
    cid: u32,
    devices: Devices,
) -> Result<Machine, BenchError> {
    let (scratch, stderr) = scratch(guest)?;
    let console = scratch.path().join("console");
    let mut command = Command::new(qemu);
    command
        .args([
            "-M",
            "microvm,acpi=off,pit=off,pic=off,rtc=off,isa-serial=off,x-option-roms=off",
        ])
        .args(["-accel", "kvm", "-cpu", "host", "-smp", "1"])
        .args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
        ])
        .args(["-global", "virtio-mmio.force-legacy=off"])
        .arg("-m")
        .arg(guest.memory_mib.to_string())
        .arg("-kernel")
        .arg(&guest.kernel)
        .arg("-append")
        .arg(&guest.cmdline)
        .arg("-drive")
        .arg(format!(
            "id=root,file={},format=raw,if=none,readonly=on",
            guest.image.display()
        ))
        .args(["-device", "virtio-blk-device,drive=root"])
        .arg("-device")
        .arg(format!("vhost-vsock-device,guest-cid={cid}"))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr);
    if devices == Devices::All {
        command
            .arg("-chardev")
            .arg(format!("file,id=hvc,path={}", console.display()))
            .args(["-device", "virtio-serial-device"])
            .args(["-device", "virtconsole,chardev=hvc"])
            .args(["-device", "virtio-rng-device"])
            .args(["-device", "virtio-balloon-device,free-page-reporting=on"]);
    }
    let process = Running::spawn("qemu", &mut command)?;
    Ok(Machine {
        process,
        scratch,
        connect: Connect::Vhost(cid),
        _control: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_handshake_tells_yes_from_no() {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            for answer in ["OK 7\nrest", "", "NO\n"] {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 13];
                stream.read_exact(&mut request).unwrap();
                assert_eq!(&request, b"CONNECT 1024\n");
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        let limit = Duration::from_secs(5);
        let mut rest = String::new();
        connect_unix(&path, 1024, limit)
            .unwrap()
            .read_to_string(&mut rest)
            .unwrap();
        assert_eq!(rest, "rest");
        assert!(connect_unix(&path, 1024, limit).is_err());
        assert!(connect_unix(&path, 1024, limit).is_err());
        server.join().unwrap();
    }

    #[test]
    fn a_missing_kernel_is_named() {
        let guest = Guest {
            kernel: "/nonexistent/vmlinux".into(),
            image: "/nonexistent/guest".into(),
            cmdline: String::new(),
            memory_mib: 128,
        };
        let error = start_qemu(Path::new("/bin/true"), &guest, 9, Devices::All)
            .err()
            .unwrap();
        assert!(error.to_string().contains("/nonexistent/vmlinux"));
    }
}
