//! The OCI specification of a container, with docker's defaults.

use std::path::{Path, PathBuf};

use caisson_rootfs_builder::ImageConfiguration;
use caisson_sandbox::CAPABILITIES as ALL_CAPABILITIES;
use serde_json::{Value, json};

use crate::{
    container::{Request, Shared},
    error::Error,
    network::{Mode, Resolver},
    options::Ulimit,
    seccomp,
};

/// Capabilities that docker gives.
const CAPABILITIES: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

const MASKED: [&str; 10] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
];

const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a container's specification is made of, besides what `inspect` tells.
#[derive(Debug, Default)]
pub struct Extra {
    /// --tmpfs: target and options.
    pub tmpfs: Vec<(String, Vec<String>)>,
    /// -v, --mount: where they are on the host.
    pub shares: Vec<Shared>,
    /// --ulimit.
    pub ulimits: Vec<Ulimit>,
    /// --shm-size: bytes of /dev/shm; `None` = [`SHM_BYTES`].
    pub shm_size: Option<u64>,
    /// Its networks.
    pub network: Network,
}

/// What a container's microVM finds of its networks.
#[derive(Debug, Default)]
pub struct Network {
    /// Where its interfaces are; `None` = it has none.
    pub namespace: Option<PathBuf>,
    /// Its resolv.conf.
    pub resolver: Resolver,
    /// Lines of its /etc/hosts beside its own.
    pub hosts: Vec<String>,
}

/// Docker's size of /dev/shm.
pub const SHM_BYTES: u64 = 64 << 20;

impl Extra {
    /// A --tmpfs or -v has this target.
    pub fn mounts_on(&self, target: &str) -> bool {
        let volumes = self.shares.iter().map(|share| &share.target);
        self.tmpfs
            .iter()
            .map(|(other, _)| other)
            .chain(volumes)
            .any(|other| Path::new(other) == Path::new(target))
    }
}

/// Docker's capabilities, less those dropped, and those added, as "CAP_…".
///
/// # Errors
/// An unknown name.
pub fn capabilities(add: &[&str], drop: &[&str]) -> Result<Vec<String>, Error> {
    let plain = |flag: &str, text: &str| -> Result<String, Error> {
        let upper = text.to_ascii_uppercase();
        let name = upper.strip_prefix("CAP_").unwrap_or(&upper).to_owned();
        if name == "ALL" || ALL_CAPABILITIES.contains(&name.as_str()) {
            return Ok(name);
        }
        Err(Error::Usage(format!("{flag} {text}: unknown capability")))
    };
    let add = add
        .iter()
        .map(|text| plain("--cap-add", text))
        .collect::<Result<Vec<_>, _>>()?;
    let drop = drop
        .iter()
        .map(|text| plain("--cap-drop", text))
        .collect::<Result<Vec<_>, _>>()?;
    let (add_all, drop_all) = (
        add.iter().any(|name| name == "ALL"),
        drop.iter().any(|name| name == "ALL"),
    );
    let has = |name: &str| {
        let base = (CAPABILITIES.contains(&name) && !drop_all) || add_all;
        let dropped = drop.iter().any(|one| one == name);
        (base && !dropped) || add.iter().any(|one| one == name)
    };
    Ok(ALL_CAPABILITIES
        .iter()
        .filter(|name| has(name))
        .map(|name| format!("CAP_{name}"))
        .collect())
}

/// Image's variables, then the flags', of which a later one of the same name wins.
pub fn environment(
    image: &ImageConfiguration,
    flags: &[String],
    hostname: &str,
    tty: bool,
) -> Vec<String> {
    let mut all: Vec<String> = vec![PATH.to_owned(), format!("HOSTNAME={hostname}")];
    if tty {
        all.push("TERM=xterm".to_owned());
    }
    let given = image
        .config()
        .as_ref()
        .and_then(|config| config.env().clone())
        .unwrap_or_default();
    for variable in given.iter().chain(flags) {
        let name = variable.split('=').next().unwrap_or_default();
        match all
            .iter_mut()
            .find(|other| other.split('=').next() == Some(name))
        {
            Some(other) => other.clone_from(variable),
            None => all.push(variable.clone()),
        }
    }
    all
}

/// The `process` object of a program with the container's rights.
pub fn process(
    request: &Request,
    args: &[String],
    capabilities: &[String],
    ulimits: &[Ulimit],
) -> Value {
    let limits: Vec<Value> = ulimits
        .iter()
        .map(|limit| json!({ "type": limit.name, "soft": limit.soft, "hard": limit.hard }))
        .collect();
    json!({
        "terminal": request.tty,
        "user": { "uid": 0, "gid": 0, "username": request.user },
        "args": args,
        "env": request.env,
        "cwd": request.working_dir,
        "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
        "rlimits": limits,
        "noNewPrivileges": false,
        "oomScoreAdj": 0,
    })
}

/// The whole config.json.
pub fn container(request: &Request, capabilities: &[String], extra: &Extra) -> Value {
    let args: Vec<String> = request
        .entrypoint
        .iter()
        .chain(&request.cmd)
        .cloned()
        .collect();
    let mut resources = json!({
        "devices": [{ "allow": false, "access": "rwm" }],
    });
    if request.memory > 0 {
        // Docker: as much swap again as memory.
        resources["memory"] = json!({ "limit": request.memory, "swap": request.memory * 2 });
    }
    if request.cpu_quota > 0 {
        resources["cpu"] = json!({ "quota": request.cpu_quota, "period": 100_000 });
    }
    if request.pids_limit != 0 {
        resources["pids"] = json!({ "limit": request.pids_limit });
    }
    let mut annotations = network_annotations(request, &extra.network);
    if !request.user.is_empty() {
        annotations.insert("caisson.user".to_owned(), json!(request.user));
    }
    let mut network = json!({ "type": "network" });
    if let Some(path) = &extra.network.namespace {
        network["path"] = json!(path);
    }
    json!({
        "ociVersion": "1.2.0",
        "root": { "path": "rootfs", "readonly": request.read_only },
        "hostname": request.hostname,
        "process": process(request, &args, capabilities, &extra.ulimits),
        "mounts": mounts(extra),
        "annotations": annotations,
        "linux": {
            "resources": resources,
            "namespaces": [
                network,
                { "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, { "type": "cgroup" },
            ],
            "seccomp": seccomp::profile(capabilities),
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
        },
    })
}

/// What the shim is to tell the guest, and whose microVM it is.
fn network_annotations(request: &Request, network: &Network) -> serde_json::Map<String, Value> {
    let Resolver {
        servers,
        searches,
        options,
    } = &network.resolver;
    let servers: Vec<String> = servers.iter().map(ToString::to_string).collect();
    let mut annotations = serde_json::Map::new();
    for (name, value) in [
        ("caisson.dns.servers", servers.join(" ")),
        ("caisson.dns.searches", searches.join(" ")),
        ("caisson.dns.options", options.join(" ")),
        ("caisson.hosts", network.hosts.join("\n")),
    ] {
        if !value.is_empty() {
            annotations.insert(name.to_owned(), json!(value));
        }
    }
    if let Mode::Container(id) = &request.network.mode {
        for (name, value) in [("container-type", "container"), ("sandbox-id", id)] {
            annotations.insert(format!("io.kubernetes.cri.{name}"), json!(value));
        }
    }
    annotations
}

fn mounts(extra: &Extra) -> Vec<Value> {
    let shm_size = format!("size={}", extra.shm_size.unwrap_or(SHM_BYTES));
    let fixed = [
        ("/proc", "proc", vec!["nosuid", "noexec", "nodev"]),
        (
            "/dev",
            "tmpfs",
            vec!["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        (
            "/dev/pts",
            "devpts",
            vec![
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        ("/sys", "sysfs", vec!["nosuid", "noexec", "nodev", "ro"]),
        (
            "/sys/fs/cgroup",
            "cgroup",
            vec!["nosuid", "noexec", "nodev", "ro"],
        ),
        ("/dev/mqueue", "mqueue", vec!["nosuid", "noexec", "nodev"]),
        (
            "/dev/shm",
            "tmpfs",
            vec!["nosuid", "noexec", "nodev", "mode=1777", &shm_size],
        ),
    ];
    let mut all: Vec<Value> = fixed
        .iter()
        .filter(|(target, ..)| !extra.mounts_on(target))
        .map(|(target, kind, options)| json!({ "destination": target, "type": kind, "source": kind, "options": options }))
        .collect();
    let mut given: Vec<(String, Value)> = Vec::new();
    for (target, options) in &extra.tmpfs {
        let mount = json!({ "destination": target, "type": "tmpfs", "source": "tmpfs", "options": options });
        given.push((target.clone(), mount));
    }
    for share in &extra.shares {
        let propagation = if share.follows { "rslave" } else { "rprivate" };
        let mut options = vec!["rbind", propagation];
        // As docker: what is mounted below cannot be written either.
        options.push(if share.read_only { "rro" } else { "rw" });
        // One that is not to be written cannot be filled.
        if share.copies && !share.read_only {
            options.push("x-caisson.copyup");
        }
        let mount = json!({ "destination": share.target, "type": "bind", "source": share.source, "options": options });
        given.push((share.target.clone(), mount));
    }
    // A mount must not hide one below it.
    given.sort_by_key(|(target, _)| Path::new(target).components().count());
    all.extend(given.into_iter().map(|(_, mount)| mount));
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_dockers() {
        assert_eq!(capabilities(&[], &[]).unwrap().len(), 14);
        assert!(capabilities(&[], &["ALL"]).unwrap().is_empty());
        assert_eq!(
            capabilities(&["net_bind_service"], &["all"]).unwrap(),
            ["CAP_NET_BIND_SERVICE"]
        );
        assert_eq!(capabilities(&["ALL"], &["CAP_CHOWN"]).unwrap().len(), 40);
        assert!(
            capabilities(&["FLY"], &[])
                .unwrap_err()
                .to_string()
                .contains("FLY")
        );
    }

    #[test]
    fn it_is_an_oci_specification() {
        let request = Request {
            hostname: "box".to_owned(),
            working_dir: "/".to_owned(),
            cmd: vec!["true".to_owned()],
            memory: 64 << 20,
            cpu_quota: 50_000,
            pids_limit: 20,
            ..Request::default()
        };
        let extra = Extra {
            tmpfs: vec![("/a/b".to_owned(), vec![]), ("/a".to_owned(), vec![])],
            shares: vec![Shared {
                source: "/s".to_owned(),
                target: "/dev/shm".to_owned(),
                read_only: true,
                copies: true,
                follows: false,
                volume: None,
            }],
            ulimits: vec![crate::options::ulimit("nofile=5").unwrap()],
            ..Extra::default()
        };
        let document = container(&request, &capabilities(&[], &[]).unwrap(), &extra);
        let spec: oci_spec::runtime::Spec = serde_json::from_value(document).unwrap();
        let targets: Vec<_> = spec
            .mounts()
            .iter()
            .flatten()
            .map(|mount| mount.destination().display().to_string())
            .collect();
        assert_eq!(targets[targets.len() - 3..], ["/a", "/a/b", "/dev/shm"]);
        assert_eq!(
            targets
                .iter()
                .filter(|target| *target == "/dev/shm")
                .count(),
            1
        );
    }

    #[test]
    fn networks_are_told_to_the_shim() {
        let mut request = Request {
            cmd: vec!["true".to_owned()],
            ..Request::default()
        };
        let extra = Extra {
            network: Network {
                namespace: Some("/run/caisson/netns/a".into()),
                resolver: Resolver {
                    servers: vec!["10.0.0.1".parse().unwrap()],
                    searches: vec!["a".to_owned(), "b".to_owned()],
                    options: vec![],
                },
                hosts: vec!["10.0.0.2\tdb".to_owned()],
            },
            ..Extra::default()
        };
        let document = container(&request, &[], &extra);
        let network = &document["linux"]["namespaces"][0];
        assert_eq!(
            network,
            &json!({ "type": "network", "path": "/run/caisson/netns/a" })
        );
        assert_eq!(
            document["annotations"],
            json!({ "caisson.dns.servers": "10.0.0.1", "caisson.dns.searches": "a b", "caisson.hosts": "10.0.0.2\tdb" })
        );
        request.network.mode = Mode::Container("owner".to_owned());
        let document = container(&request, &[], &Extra::default());
        assert_eq!(
            document["linux"]["namespaces"][0],
            json!({ "type": "network" })
        );
        let spec = serde_json::from_value(document).unwrap();
        assert_eq!(
            caisson_sandbox::pod_of(&spec).map(String::as_str),
            Some("owner")
        );
    }
}
