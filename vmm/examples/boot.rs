//! Boots a kernel with a root image in a fresh `caisson-vmm` and prints its console:
//!
//!     cargo run --example boot -- --kernel vmlinux [--rootfs guest.erofs] [--vcpus N[/MAX]] [--mib N]
//!         [--cmdline "..."] [--vmm PATH] [--seconds N] [--describe]
//!
//! It ends when the guest does, or after `--seconds`.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::PathBuf,
    process::{Child, Command},
    time::Duration,
};

use caisson_vmm_api::{
    BlockConfig, BlockContents, BootConfig, Call, Channel, ChannelError, DeviceConfig, Event, Fd,
    MemoryConfig, Message, Request, VcpuConfig,
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
}

fn main() -> Result<(), Failure> {
    let options = parse()?;
    let (channel, mut child) = spawn(&options)?;
    rustix::net::sockopt::set_socket_timeout(
        channel.as_fd(),
        rustix::net::sockopt::Timeout::Recv,
        Some(Duration::from_secs(options.seconds)),
    )?;
    let (console, output) = std::io::pipe()?;
    let printer = std::thread::spawn(move || print(console));
    boot(&options, &channel, output.into())?;
    let result = follow(&channel, options.describe);
    drop(channel);
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

fn boot(options: &Options, channel: &Channel, output: OwnedFd) -> Result<(), Failure> {
    let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm")?;
    let mut fds: Vec<OwnedFd> = vec![kvm.into(), File::open(&options.kernel)?.into(), output];
    let mut devices = vec![
        DeviceConfig::Console {
            output: Some(Fd(2)),
        },
        DeviceConfig::Rng,
    ];
    let mut cmdline = options.cmdline.clone();
    if let Some(rootfs) = &options.rootfs {
        devices.push(DeviceConfig::Block(BlockConfig {
            serial: "root".into(),
            contents: BlockContents::File(Fd(3)),
            read_only: true,
            rate_limit: None,
        }));
        fds.push(File::open(rootfs)?.into());
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
    let call = Call {
        id: 1,
        request: Request::Boot(Box::new(config)),
    };
    let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    Ok(channel.send(&call, &borrowed)?)
}

fn follow(channel: &Channel, describe: bool) -> Result<(), Failure> {
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
            Err(ChannelError::TimedOut) => {
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
