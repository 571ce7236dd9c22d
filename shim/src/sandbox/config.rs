//! What CRI says of a pod, as a sandbox.

use std::{collections::HashMap, fs, path::PathBuf};

use caisson_sandbox::{
    Config, InterfaceLimits, Limits, NetworkNamespace, SandboxSpec, Size, cgroup_parent,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use prost::Message;

use crate::error::Error;

/// Name of the message that containerd's CRI plugin gives as a sandbox's options.
const CONFIG: &str = "runtime.v1.PodSandboxConfig";

/// `NamespaceMode::POD`.
const POD: i32 = 0;

/// `NamespaceMode::NODE`.
const NODE: i32 = 2;

/// The part of CRI's message (kubernetes: cri-api, runtime/v1) that concerns a sandbox; files, names
/// and labels are the caller's own business.
#[derive(Clone, PartialEq, Message)]
pub struct PodSandboxConfig {
    #[prost(string, tag = "2")]
    hostname: String,
    #[prost(message, optional, tag = "4")]
    dns_config: Option<DnsConfig>,
    #[prost(map = "string, string", tag = "7")]
    annotations: HashMap<String, String>,
    #[prost(message, optional, tag = "8")]
    linux: Option<LinuxPodSandboxConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct DnsConfig {
    #[prost(string, repeated, tag = "1")]
    servers: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    searches: Vec<String>,
    #[prost(string, repeated, tag = "3")]
    options: Vec<String>,
}

#[derive(Clone, PartialEq, Message)]
struct LinuxPodSandboxConfig {
    #[prost(string, tag = "1")]
    cgroup_parent: String,
    #[prost(message, optional, tag = "2")]
    security_context: Option<SecurityContext>,
    #[prost(map = "string, string", tag = "3")]
    sysctls: HashMap<String, String>,
    #[prost(message, optional, tag = "5")]
    resources: Option<Resources>,
}

#[derive(Clone, PartialEq, Message)]
struct SecurityContext {
    #[prost(message, optional, tag = "1")]
    namespace_options: Option<NamespaceOption>,
}

#[derive(Clone, PartialEq, Message)]
struct NamespaceOption {
    #[prost(int32, tag = "1")]
    network: i32,
    #[prost(int32, tag = "2")]
    pid: i32,
    #[prost(message, optional, tag = "5")]
    user: Option<UserNamespace>,
}

#[derive(Clone, PartialEq, Message)]
struct UserNamespace {
    #[prost(int32, tag = "1")]
    mode: i32,
}

#[derive(Clone, PartialEq, Message)]
struct Resources {
    #[prost(int64, tag = "1")]
    cpu_period: i64,
    #[prost(int64, tag = "2")]
    cpu_quota: i64,
    #[prost(int64, tag = "4")]
    memory_limit_in_bytes: i64,
}

impl PodSandboxConfig {
    /// Reads the options of a sandbox; none are those of a pod without wishes.
    ///
    /// # Errors
    /// They are of another kind, or malformed.
    pub fn of(options: Option<&Any>) -> Result<Self, Error> {
        let Some(options) = options else {
            return Ok(Self::default());
        };
        let name = options.type_url.rsplit('/').next().unwrap_or_default();
        if name != CONFIG {
            return Err(Error::Invalid(format!(
                "the sandbox's options are {}; {CONFIG} is what is understood",
                options.type_url
            )));
        }
        Self::decode(options.value.as_slice())
            .map_err(|error| Error::Invalid(format!("malformed {CONFIG}: {error}")))
    }

    /// The sandbox `id` that it asks for, whose interfaces are in `network`.
    ///
    /// # Errors
    /// Namespaces of the host are asked for, which a microVM cannot be in, or limits that are none.
    pub fn sandbox(self, config: &Config, id: String, network: &str) -> Result<SandboxSpec, Error> {
        let linux = self.linux.unwrap_or_default();
        let security = linux.security_context.unwrap_or_default();
        let namespaces = security.namespace_options.unwrap_or_default();
        refuse_host(&namespaces)?;
        let limits = linux.resources.map_or_else(Limits::default, |asked| {
            Limits::of_cri(
                asked.cpu_quota,
                asked.cpu_period,
                asked.memory_limit_in_bytes,
            )
        });
        let size = Size::within(config, &limits);
        let dns = self.dns_config.unwrap_or_else(DnsConfig::of_host);
        let cgroup = Some(linux.cgroup_parent).filter(|parent| !parent.is_empty());
        let cgroup = cgroup.map(|parent| cgroups_path(&parent, &id));
        Ok(SandboxSpec {
            hostname: self.hostname,
            vcpus: size.vcpus,
            memory_mib: size.memory_mib,
            cgroup_parent: cgroup.and_then(|path| cgroup_parent(&path)),
            dns_servers: dns.servers,
            dns_searches: dns.searches,
            dns_options: dns.options,
            sysctls: linux.sysctls,
            shared_pid_namespace: namespaces.pid == POD,
            // CRI's managers mount a hosts file of their own.
            extra_hosts: Vec::new(),
            network: if network.is_empty() {
                NetworkNamespace::Vmm
            } else {
                NetworkNamespace::Path(network.into())
            },
            limits: InterfaceLimits::of_annotations(&self.annotations)?,
            // What the pod's containers want is not known yet.
            shares_directories: true,
            id,
        })
    }
}

fn refuse_host(namespaces: &NamespaceOption) -> Result<(), Error> {
    // The host's IPC namespace is left to mean the guest's, as for containers.
    for (name, mode) in [("network", namespaces.network), ("PID", namespaces.pid)] {
        if mode == NODE {
            return Err(Error::Unsupported(format!(
                "the pod wants the host's {name} namespace: a microVM has its own, so run it with \
                 another runtime class"
            )));
        }
    }
    match &namespaces.user {
        Some(user) if user.mode == POD => Err(Error::Unsupported(
            "the pod wants a user namespace, which a microVM does not have yet: set hostUsers \
             to true, or leave it out"
                .to_owned(),
        )),
        _ => Ok(()),
    }
}

/// As a specification would say it: a path, or for a slice of systemd that is named without its
/// path `SLICE:PREFIX:NAME`.
fn cgroups_path(parent: &str, id: &str) -> PathBuf {
    if parent.contains('/') {
        PathBuf::from(parent).join(id)
    } else {
        format!("{parent}:caisson:{id}").into()
    }
}

impl DnsConfig {
    /// The host's, which Kubernetes calls its default.
    fn of_host() -> Self {
        Self::parse(&fs::read_to_string("/etc/resolv.conf").unwrap_or_default())
    }

    /// resolv.conf(5).
    fn parse(text: &str) -> Self {
        let mut dns = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace().map(str::to_owned);
            match words.next().as_deref() {
                Some("nameserver") => dns.servers.extend(words.next()),
                // The last one counts.
                Some("search") => dns.searches = words.collect(),
                Some("options") => dns.options.extend(words),
                _ => {}
            }
        }
        dns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(linux: LinuxPodSandboxConfig) -> Result<SandboxSpec, Error> {
        let message = PodSandboxConfig {
            annotations: HashMap::from([(
                "io.caisson.network-tx-bytes-per-second".to_owned(),
                "5000".to_owned(),
            )]),
            hostname: "h".to_owned(),
            dns_config: Some(DnsConfig {
                servers: vec!["10.0.0.1".to_owned()],
                ..Default::default()
            }),
            linux: Some(linux),
        };
        let options = Any {
            type_url: CONFIG.to_owned(),
            value: message.encode_to_vec(),
            ..Default::default()
        };
        PodSandboxConfig::of(Some(&options))?.sandbox(
            &Config::default(),
            "k8s.io.p".to_owned(),
            "/run/netns/a",
        )
    }

    fn namespaces(options: NamespaceOption) -> LinuxPodSandboxConfig {
        LinuxPodSandboxConfig {
            security_context: Some(SecurityContext {
                namespace_options: Some(options),
            }),
            ..Default::default()
        }
    }

    #[test]
    fn a_pod_is_what_it_asks_for() {
        let spec = pod(LinuxPodSandboxConfig {
            resources: Some(Resources {
                cpu_period: 100_000,
                cpu_quota: 150_000,
                memory_limit_in_bytes: 512 << 20,
            }),
            sysctls: HashMap::from([("a.b".to_owned(), "1".to_owned())]),
            ..namespaces(NamespaceOption {
                pid: 1,
                ..Default::default()
            })
        })
        .unwrap();
        assert_eq!((spec.hostname.as_str(), spec.vcpus), ("h", 2));
        assert!(spec.memory_mib > 512);
        assert_eq!(spec.dns_servers, ["10.0.0.1"]);
        assert_eq!(spec.sysctls["a.b"], "1");
        assert!(!spec.shared_pid_namespace && spec.shares_directories);
        assert_eq!(spec.network, NetworkNamespace::Path("/run/netns/a".into()));
        assert_eq!(spec.limits.tx.bytes_per_second, 5000);
        let shared = pod(namespaces(NamespaceOption::default())).unwrap();
        assert!(shared.shared_pid_namespace);
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let node = |network, pid| NamespaceOption {
            network,
            pid,
            user: None,
        };
        for options in [node(NODE, 0), node(0, NODE)] {
            let error = pod(namespaces(options)).unwrap_err();
            assert!(matches!(error, Error::Unsupported(_)), "{error}");
        }
        let user = NamespaceOption {
            user: Some(UserNamespace { mode: POD }),
            ..Default::default()
        };
        assert!(pod(namespaces(user)).is_err());
        let mut options = Any {
            type_url: "other".to_owned(),
            ..Default::default()
        };
        assert!(PodSandboxConfig::of(Some(&options)).is_err());
        options.type_url = CONFIG.to_owned();
        options.value = vec![0xFF; 3];
        assert!(PodSandboxConfig::of(Some(&options)).is_err());
        assert!(PodSandboxConfig::of(None).is_ok());
    }

    #[test]
    fn the_hosts_resolver_is_read() {
        let dns = DnsConfig::parse(
            "# made by hand\nsearch old\nnameserver 10.0.0.1\nsearch a b\noptions ndots:2 edns0\n",
        );
        assert_eq!(dns.servers, ["10.0.0.1"]);
        assert_eq!(dns.searches, ["a", "b"]);
        assert_eq!(dns.options, ["ndots:2", "edns0"]);
    }

    #[test]
    fn cgroups_of_both_kinds() {
        let parent = |text: &str| cgroup_parent(&cgroups_path(text, "i")).unwrap();
        assert_eq!(parent("/kubepods/x"), PathBuf::from("/kubepods/x"));
        let slice = PathBuf::from("/kubepods.slice/kubepods-x.slice");
        assert_eq!(parent(slice.to_str().unwrap()), slice);
        assert_eq!(parent("kubepods-x.slice"), slice);
    }
}
