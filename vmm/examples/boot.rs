//! Boots a kernel with a root image in a fresh `caisson-vmm` and prints its console:
//!
//!     cargo run --example boot -- --kernel vmlinux [--rootfs guest.erofs] [--vcpus N[/MAX]] [--mib N]
//!         [--cmdline "..."] [--vmm PATH] [--seconds N] [--describe] [--snapshot DIR --after SECONDS]
//!
//! It ends when the guest does, or after `--seconds`. With `--snapshot` the guest is paused after
//! `--after` seconds, saved to files in DIR, ended, restored in another `caisson-vmm`, and resumed.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    process::{Child, Command},
    time::Duration,
};

use caisson_vmm_api::{
    BlockConfig, BlockContents, BootConfig, Call, Channel, ChannelError, DeviceConfig, Event, Fd,
    MemoryConfig, Message, Request, RestoreConfig, VcpuConfig,
};

type Failure = Box<dyn std::error::Error>;

struct Options {
    kernel: PathBuf,
    rootfs: Option<PathBuf>,
    vcpus: VcpuConfig,
    mib: u32,
    cmdline: String,
    vmm: PathBuf,
    seconds: u64,
    describe: bool,
    snapshot: Option<PathBuf>,
    after: u64,
}

fn main() -> Result<(), Failure> {
    let options = parse()?;
    let (console, output) = std::io::pipe()?;
    let printer = std::thread::spawn(move || print(console));
    let output = OwnedFd::from(output);
    let (channel, mut child) = spawn(&options)?;
    boot(&options, &channel, &output)?;
    let result = match &options.snapshot {
        None => follow(&channel, options.describe, options.seconds),
        Some(directory) => save(&options, &channel, directory)
            .and_then(|()| follow(&channel, false, options.seconds))
            .and_then(|()| restore(&options, directory, &output)),
    };
    drop((channel, output));
    println!("vmm: {}", child.wait()?);
    let _ = printer.join();
    result
}

fn parse() -> Result<Options, Failure> {
    let vmm = std::env::current_exe()?;
    let mut options = Options {
        kernel: PathBuf::new(),
        rootfs: None,
        vcpus: VcpuConfig { boot: 1, max: 1 },
        mib: 256,
        cmdline: "earlyprintk=ttyS0 console=hvc0 reboot=k panic=-1 noreplace-smp 8250.nr_uarts=0"
            .into(),
        vmm: vmm.with_file_name("../caisson-vmm"),
        seconds: 120,
        describe: false,
        snapshot: None,
        after: 5,
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(flag) = arguments.next() {
        if flag == "--describe" {
            options.describe = true;
            continue;
        }
        let value = arguments.next().ok_or("a value must follow")?;
        match flag.as_str() {
            "--kernel" => options.kernel = value.into(),
            "--rootfs" => options.rootfs = Some(value.into()),
            "--vcpus" => {
                let (boot, max) = value.split_once('/').unwrap_or((&value, &value));
                options.vcpus = VcpuConfig {
                    boot: boot.parse()?,
                    max: max.parse()?,
                };
            }
            "--mib" => options.mib = value.parse()?,
            "--cmdline" => options.cmdline = value,
            "--vmm" => options.vmm = value.into(),
            "--snapshot" => options.snapshot = Some(value.into()),
            "--after" => options.after = value.parse()?,
            "--seconds" => options.seconds = value.parse()?,
            _ => return Err(format!("{flag}: unknown").into()),
        }
    }
    Ok(options)
}

fn spawn(options: &Options) -> Result<(Channel, Child), Failure> {
    let (ours, theirs) = Channel::pair()?;
    let theirs = OwnedFd::from(theirs);
    rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty())?;
    let child = Command::new(&options.vmm)
        .arg("--api-fd")
        .arg(theirs.as_raw_fd().to_string())
        .spawn()
        .map_err(|error| format!("{}: {error}", options.vmm.display()))?;
    Ok((ours, child))
}

/// The devices, over descriptors that are appended to `fds`.
fn devices(
    options: &Options,
    output: &OwnedFd,
    fds: &mut Vec<OwnedFd>,
) -> Result<Vec<DeviceConfig>, Failure> {
    let mut add = |fd: OwnedFd| {
        fds.push(fd);
        Fd(fds.len() as u32 - 1)
    };
    let mut devices = vec![
        DeviceConfig::Console {
            output: Some(add(output.try_clone()?)),
        },
        DeviceConfig::Rng,
        DeviceConfig::Balloon,
    ];
    if let Some(rootfs) = &options.rootfs {
        devices.push(DeviceConfig::Block(BlockConfig {
            serial: "root".into(),
            contents: BlockContents::File(add(File::open(rootfs)?.into())),
            read_only: true,
            rate_limit: None,
        }));
    }
    Ok(devices)
}

fn open_kvm() -> Result<OwnedFd, Failure> {
    Ok(OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")?
        .into())
}

fn call(channel: &Channel, id: u64, request: Request, fds: &[OwnedFd]) -> Result<(), Failure> {
    let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    Ok(channel.send(&Call { id, request }, &borrowed)?)
}

fn boot(options: &Options, channel: &Channel, output: &OwnedFd) -> Result<(), Failure> {
    let mut fds = vec![open_kvm()?, File::open(&options.kernel)?.into()];
    let devices = devices(options, output, &mut fds)?;
    let mut cmdline = options.cmdline.clone();
    if options.rootfs.is_some() {
        cmdline.push_str(" root=/dev/vda rootfstype=erofs ro");
    }
    let config = BootConfig {
        kvm: Fd(0),
        kernel: Fd(1),
        cmdline,
        vcpus: options.vcpus,
        memory: MemoryConfig {
            boot_mib: options.mib,
            hotplug_mib: 0,
            shared: false,
        },
        devices,
    };
    call(channel, 1, Request::Boot(Box::new(config)), &fds)
}

fn save(options: &Options, channel: &Channel, directory: &Path) -> Result<(), Failure> {
    std::thread::sleep(Duration::from_secs(options.after));
    let create = |name| File::create(directory.join(name)).map(OwnedFd::from);
    let files = [create("state")?, create("memory")?];
    call(channel, 2, Request::Describe, &[])?;
    call(channel, 3, Request::Pause, &[])?;
    call(channel, 4, Request::Describe, &[])?;
    let request = Request::Save {
        state: Fd(0),
        memory: Fd(1),
    };
    call(channel, 5, request, &files)?;
    call(channel, 6, Request::Stop, &[])
}

fn restore(options: &Options, directory: &Path, output: &OwnedFd) -> Result<(), Failure> {
    let open = |name| File::open(directory.join(name)).map(OwnedFd::from);
    let mut fds = vec![open_kvm()?, open("state")?, open("memory")?];
    let devices = devices(options, output, &mut fds)?;
    let (channel, mut child) = spawn(options)?;
    let config = RestoreConfig {
        kvm: Fd(0),
        state: Fd(1),
        memory: Fd(2),
        devices,
    };
    call(&channel, 1, Request::Restore(Box::new(config)), &fds)?;
    call(&channel, 2, Request::Resume, &[])?;
    let result = follow(&channel, true, options.seconds);
    println!("vmm: {}", child.wait()?);
    result
}

fn follow(channel: &Channel, describe: bool, seconds: u64) -> Result<(), Failure> {
    let patience = Some(Duration::from_secs(seconds));
    rustix::net::sockopt::set_socket_timeout(
        channel.as_fd(),
        rustix::net::sockopt::Timeout::Recv,
        patience,
    )?;
    let mut stopping = false;
    loop {
        match channel.receive::<Message>() {
            Ok((Message::Reply { id: 1, result }, _)) => {
                println!("vmm: booted: {:?}", result?);
                if describe {
                    let request = Request::Describe;
                    channel.send(&Call { id: 2, request }, &[])?;
                }
            }
            Ok((Message::Reply { result, .. }, _)) => println!("vmm: {result:?}"),
            Ok((
                Message::Event(Event::Exited {
                    reason,
                    console_tail,
                }),
                _,
            )) => {
                println!("vmm: ended: {reason:?}; last words:\n{console_tail}");
                return Ok(());
            }
            Ok((Message::Event(event), _)) => println!("vmm: {event:?}"),
            Err(ChannelError::TimedOut) if !stopping => {
                stopping = true;
                println!("vmm: still running; stopping it");
                let request = Request::Stop;
                channel.send(&Call { id: 3, request }, &[])?;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn print(mut console: impl Read) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = console.read(&mut buffer) {
        let mut stdout = std::io::stdout();
        let _ = stdout.write_all(&buffer[..count]);
        let _ = stdout.flush();
    }
}
