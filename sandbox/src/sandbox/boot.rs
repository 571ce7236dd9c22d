//! From nothing to a guest whose agent answers.

use std::{
    fs::File,
    io::Read,
    os::{fd::AsFd, unix::net::UnixListener},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use caisson_protocol::agent::{ConfigureSandboxRequest, HelloResponse};
use caisson_vmm_api::{
    BlockConfig, BlockContents, BootConfig, DeviceConfig, Fd, MemoryConfig, Request, Response,
    VcpuConfig,
};

use super::{SandboxSpec, process, sizing::Sizing};
use crate::{
    agent::Agent,
    cgroup,
    config::Config,
    error::Error,
    figures::Stage,
    record::{self, Record, Resource},
    size::Room,
    socket,
    vmm::Vmm,
};

/// The guest's side of every vsock is this; each VM has a socket of its own, so all may share it.
const GUEST_CID: u32 = 3;

pub(super) struct Assets {
    kvm: File,
    kernel: File,
    image: File,
}

impl Assets {
    pub(super) fn open(config: &Config) -> Result<Self, Error> {
        let kernel = asset(
            "guest kernel",
            &config.kernel,
            |head| head.starts_with(b"\x7fELF"),
            0,
            "not an ELF vmlinux",
        )?;
        // The magic of EROFS, little-endian, at the superblock's offset 1024.
        let image = asset(
            "guest image",
            &config.guest_image,
            |head| head.starts_with(&[0xe2, 0xe1, 0xf5, 0xe0]),
            1024,
            "not an EROFS image",
        )?;
        if !config.vmm.is_file() {
            return Err(Error::Asset {
                what: "VMM",
                path: config.vmm.clone(),
                reason: "no such file".to_owned(),
            });
        }
        let kvm = File::options()
            .read(true)
            .write(true)
            .open(&config.kvm)
            .map_err(|source| Error::Kvm {
                path: config.kvm.clone(),
                source,
            })?;
        Ok(Self { kvm, kernel, image })
    }
}

fn asset(
    what: &'static str,
    path: &Path,
    right: impl Fn(&[u8]) -> bool,
    offset: u64,
    wrong: &str,
) -> Result<File, Error> {
    use std::os::unix::fs::FileExt;
    let broken = |reason: String| Error::Asset {
        what,
        path: path.to_owned(),
        reason,
    };
    let file = File::open(path).map_err(|error| broken(error.to_string()))?;
    let mut head = [0; 4];
    let read = file
        .read_at(&mut head, offset)
        .map_err(|error| broken(error.to_string()))?;
    if read < head.len() || !right(&head) {
        return Err(broken(wrong.to_owned()));
    }
    Ok(file)
}

/// What a boot ends in.
pub(super) struct Booted {
    pub(super) vmm: Arc<Vmm>,
    pub(super) agent: Agent,
    pub(super) hello: HelloResponse,
    /// The socket to the guest's ports.
    pub(super) vsock: PathBuf,
    pub(super) sizing: Sizing,
    /// Its stages.
    pub(super) stages: Vec<Stage>,
}

pub(super) async fn boot(
    config: &Config,
    spec: &SandboxSpec,
    room: Room,
    assets: &Assets,
    record: &mut Record,
) -> Result<Booted, Error> {
    let uid = record::claim_uid(
        record,
        &config.run_dir,
        &spec.id,
        config.uid_base,
        config.uid_count,
    )?;
    let mut cgroup = cgroup::path_for(&spec.id, spec.cgroup_parent.as_deref());
    if let Some(path) = &cgroup {
        record.add(Resource::Cgroup(path.clone()))?;
    }
    let vsock = record.directory().join("vsock.sock");
    let listener =
        socket::listen(&vsock).map_err(Error::io(format!("listen on {}", vsock.display())))?;
    let begin = Instant::now();
    let vmm = Arc::new(Vmm::spawn(&config.vmm, uid, &spec.id)?);
    if let Some(resource) = process(vmm.pid()) {
        record.add(resource)?;
    }
    if let Some(path) = &cgroup {
        let entered = cgroup::create(path).and_then(|()| cgroup::add(path, vmm.pid()));
        if let Err(error) = entered {
            log::warn!(
                "the sandbox has no cgroup of its own, and no limits on the host ({}): {error}",
                path.display()
            );
            cgroup = None;
        }
    }
    let sizing = Sizing::new(config, room, cgroup);
    let spawned = begin.elapsed();
    let (request, fds) = boot_request(config, spec, room, assets, &listener);
    vmm.call("boot", request, &fds).await?;
    let booting = begin.elapsed();
    let (agent, hello) = Agent::connect(&vsock, vmm.clone()).await?;
    let answered = begin.elapsed();
    configure(&agent, spec).await?;
    let stages = stages(&vmm, &hello, [spawned, booting, answered, begin.elapsed()]).await;
    log_stages(&stages);
    Ok(Booted {
        vmm,
        agent,
        hello,
        vsock,
        sizing,
        stages,
    })
}

/// Where the time of a boot went.
async fn stages(vmm: &Vmm, hello: &HelloResponse, host: [Duration; 4]) -> Vec<Stage> {
    let mut stages: Vec<Stage> = ["spawned", "vCPUs run", "agent answers", "configured"]
        .iter()
        .zip(host)
        .map(|(name, at)| Stage::new("host", name, at.as_secs_f64()))
        .collect();
    if let Ok(Response::Description(description)) =
        vmm.call("describe itself", Request::Describe, &[]).await
    {
        let of_vmm = description.stages.iter();
        stages.extend(of_vmm.map(|(name, at)| Stage::new("vmm", name, *at as f64 / 1e9)));
    }
    // The guest's words: bounded, and without anything that a terminal would obey.
    stages.extend(hello.stages.iter().take(16).map(|stage| {
        let name = stage.name.chars().filter(char::is_ascii_graphic).take(32);
        let name: String = name.collect();
        Stage::new("guest", &name, stage.nanoseconds as f64 / 1e9)
    }));
    stages
}

fn log_stages(stages: &[Stage]) {
    let mut line = String::from("booted; ms");
    for (clock, since) in [
        ("host", " since the VMM's start:"),
        ("vmm", " in the VMM:"),
        ("guest", " in the guest:"),
    ] {
        line.push_str(since);
        for stage in stages.iter().filter(|stage| stage.clock == clock) {
            line.push_str(&format!(" {} {:.1},", stage.name, stage.seconds * 1e3));
        }
    }
    log::info!("{}", line.trim_end_matches(','));
}

fn boot_request<'a>(
    config: &Config,
    spec: &SandboxSpec,
    room: Room,
    assets: &'a Assets,
    listener: &'a UnixListener,
) -> (Request, Vec<std::os::fd::BorrowedFd<'a>>) {
    let fds = vec![
        assets.kvm.as_fd(),
        assets.kernel.as_fd(),
        assets.image.as_fd(),
        listener.as_fd(),
    ];
    let mut cmdline = String::from(
        "root=/dev/vda ro rootfstype=erofs init=/sbin/caisson-agent console=hvc0 quiet \
         reboot=k panic=-1 noreplace-smp swiotlb=noforce 8250.nr_uarts=0 random.trust_cpu=on \
         dummy.numdummies=0 ifb.numifbs=0",
    );
    if !config.kernel_parameters.is_empty() {
        cmdline.push(' ');
        cmdline.push_str(&config.kernel_parameters);
    }
    let growing = room.region_mib() > 0;
    if growing {
        // What is plugged can be unplugged again as far as it is movable.
        cmdline.push_str(" memory_hotplug.online_policy=auto-movable");
    }
    let mut boot = BootConfig {
        kvm: Fd(0),
        kernel: Fd(1),
        cmdline,
        vcpus: VcpuConfig {
            boot: room.boot_vcpus,
            max: room.max_vcpus,
        },
        memory: MemoryConfig {
            boot_mib: room.boot_mib,
            hotplug_mib: room.region_mib(),
            shared: spec.shares_directories,
        },
        devices: vec![
            DeviceConfig::Block(BlockConfig {
                serial: "guest".to_owned(),
                contents: BlockContents::File(Fd(2)),
                read_only: true,
                rate_limit: None,
            }),
            DeviceConfig::Vsock {
                cid: GUEST_CID,
                listener: Fd(3),
                acceptor: None,
            },
            DeviceConfig::Console { output: None },
            DeviceConfig::Rng,
            DeviceConfig::Balloon,
        ],
    };
    if growing {
        boot.devices.push(DeviceConfig::Mem);
    }
    (Request::Boot(Box::new(boot)), fds)
}

async fn configure(agent: &Agent, spec: &SandboxSpec) -> Result<(), Error> {
    let mut seed = [0; 64];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut seed))
        .map_err(Error::io("read /dev/urandom"))?;
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let request = ConfigureSandboxRequest {
        sandbox_id: spec.id.clone(),
        hostname: spec.hostname.clone(),
        realtime_ns: i64::try_from(since.as_nanos()).unwrap_or(i64::MAX),
        entropy_seed: seed.to_vec(),
        dns_servers: spec.dns_servers.clone(),
        dns_searches: spec.dns_searches.clone(),
        dns_options: spec.dns_options.clone(),
        extra_hosts: spec.extra_hosts.clone(),
        sysctls: spec.sysctls.clone(),
        shared_pid_namespace: spec.shared_pid_namespace,
        ..Default::default()
    };
    agent
        .call("configure the guest", |client, context| async move {
            client.configure_sandbox(context, &request).await
        })
        .await
        .map(drop)
}
