//! An OCI specification made for the host, turned into one for the guest.

use std::path::{Path, PathBuf};

use caisson_protocol::SHARE_PREFIX;
use oci_spec::runtime::{LinuxNamespaceType, LinuxResources, Spec};

use crate::error::Error;

/// Annotations that tell a Kubernetes pod's first container, which only holds the pod, from others.
const CONTAINER_TYPES: [&str; 2] = [
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri-o.ContainerType",
];

/// A bind mount whose source is on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostBind {
    /// Index in the specification's mounts.
    pub mount: usize,
    /// On the host.
    pub source: PathBuf,
    /// The host's side enforces it too.
    pub read_only: bool,
}

/// Reads a specification.
///
/// # Errors
/// It is none.
pub fn parse(json: &[u8]) -> Result<Spec, Error> {
    serde_json::from_slice(json).map_err(|error| {
        Error::Invalid(format!(
            "the container's config.json is no OCI specification: {error}"
        ))
    })
}

/// Whether the container with this specification only holds a Kubernetes pod.
pub fn holds_pod(spec: &Spec) -> bool {
    CONTAINER_TYPES
        .iter()
        .filter_map(|key| spec.annotations().as_ref()?.get(*key))
        .any(|kind| kind == "sandbox")
}

/// Takes out what belongs to the host and has no meaning in the guest. `machine` is the process id
/// that callers know the pod's containers by; true when this container joins the PID namespace of
/// the pod (Kubernetes' `shareProcessNamespace`).
///
/// # Errors
/// Something that cannot be left out without betraying the caller.
pub fn translate(spec: &mut Spec, machine: u32) -> Result<bool, Error> {
    let mut joins_pod = false;
    let holds_pod = holds_pod(spec);
    if let Some(hooks) = spec.hooks_mut() {
        // Those of the host are for whoever runs the sandbox ([`crate::hooks`]).
        #[allow(deprecated, reason = "docker uses prestart for its networks")]
        hooks.set_prestart(None);
        hooks
            .set_create_runtime(None)
            .set_poststart(None)
            .set_poststop(None);
    }
    if let Some(linux) = spec.linux_mut() {
        // The agent decides where a container's cgroup is.
        linux.set_cgroups_path(None);
        if let Some(resources) = linux.resources_mut() {
            take_host_sets(resources);
        }
        let mut kept = Vec::new();
        for namespace in linux.namespaces().clone().unwrap_or_default() {
            match (namespace.typ(), namespace.path()) {
                // The guest's own network is the pod's.
                (LinuxNamespaceType::Network, _) => {}
                // The pod's, or one of the pod's on the host; that of the pod is the guest's, which
                // therefore gets the names and sysctls of the container that holds the pod.
                (LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts, path)
                    if holds_pod || path.is_some() => {}
                (_, None) => kept.push(namespace),
                (LinuxNamespaceType::Pid, Some(path)) if is_pid_namespace_of(path, machine) => {
                    joins_pod = true;
                }
                (kind, Some(path)) => {
                    return Err(Error::Unsupported(format!(
                        "the container wants to join the host's {kind:?} namespace {}: a microVM cannot",
                        path.display()
                    )));
                }
            }
        }
        linux.set_namespaces(Some(kept));
    }
    Ok(joins_pod)
}

fn is_pid_namespace_of(path: &Path, process: u32) -> bool {
    path == Path::new(&format!("/proc/{process}/ns/pid"))
}

/// Takes out processors and memory nodes: they are numbers of the host's, and mean others in the
/// guest or none. The sandbox's cgroup on the host is bound to them.
pub fn take_host_sets(resources: &mut LinuxResources) {
    if let Some(cpu) = resources.cpu_mut() {
        cpu.set_cpus(None).set_mems(None);
    }
}

/// The bind mounts whose sources are on the host.
pub fn host_binds(spec: &Spec) -> Vec<HostBind> {
    let mounts = spec.mounts().iter().flatten().enumerate();
    mounts
        .filter_map(|(index, mount)| {
            let options = mount.options().as_deref().unwrap_or_default();
            let bind = mount.typ().as_deref() == Some("bind")
                || options
                    .iter()
                    .any(|option| option == "bind" || option == "rbind");
            let source = mount.source().clone().filter(|_| bind)?;
            let read_only = options
                .iter()
                .any(|option| option == "ro" || option == "rro");
            Some(HostBind {
                mount: index,
                source,
                read_only,
            })
        })
        .collect()
}

/// Replaces the source of a mount by an entry of the pod's share.
pub fn use_share(spec: &mut Spec, mount: usize, entry: &str) {
    if let Some(mount) = spec
        .mounts_mut()
        .as_mut()
        .and_then(|mounts| mounts.get_mut(mount))
    {
        mount.set_source(Some(format!("{SHARE_PREFIX}{entry}").into()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(linux: &str, mounts: &str) -> Spec {
        parse(format!(r#"{{"ociVersion":"1.2.0","linux":{linux},"mounts":{mounts}}}"#).as_bytes())
            .unwrap()
    }

    #[test]
    fn hooks_of_the_host_stay_there() {
        let hook = r#"[{"path":"/bin/true"}]"#;
        let names = [
            "prestart",
            "createRuntime",
            "createContainer",
            "startContainer",
            "poststart",
            "poststop",
        ];
        let hooks: Vec<String> = names
            .iter()
            .map(|name| format!("\"{name}\":{hook}"))
            .collect();
        let text = format!(
            r#"{{"ociVersion":"1.2.0","hooks":{{{}}}}}"#,
            hooks.join(",")
        );
        let mut spec: Spec = serde_json::from_str(&text).unwrap();
        translate(&mut spec, 7).unwrap();
        let left = serde_json::to_value(spec.hooks()).unwrap();
        let left: Vec<&String> = left.as_object().unwrap().keys().collect();
        assert_eq!(left, ["createContainer", "startContainer"]);
    }

    #[test]
    fn host_things_go() {
        let mut one = spec(
            r#"{"cgroupsPath":"/kubepods/x","resources":{"cpu":{"cpus":"2","mems":"0","shares":7}},"namespaces":[{"type":"network","path":"/run/netns/a"},{"type":"pid"},{"type":"uts","path":"/proc/7/ns/uts"}]}"#,
            "[]",
        );
        assert!(!translate(&mut one, 7).unwrap());
        let linux = one.linux().as_ref().unwrap();
        assert_eq!(linux.cgroups_path(), &None);
        let cpu = linux.resources().as_ref().unwrap().cpu().as_ref().unwrap();
        assert_eq!(
            (cpu.cpus(), cpu.mems(), cpu.shares()),
            (&None, &None, Some(7))
        );
        assert_eq!(linux.namespaces().as_ref().unwrap().len(), 1);
        let mut other = spec(
            r#"{"namespaces":[{"type":"pid","path":"/proc/1/ns/pid"}]}"#,
            "[]",
        );
        assert!(
            translate(&mut other, 7)
                .unwrap_err()
                .to_string()
                .contains("/proc/1/ns/pid")
        );
        assert!(translate(&mut other, 1).unwrap(), "the pod's own");
        let linux = other.linux().as_ref().unwrap();
        assert!(linux.namespaces().as_ref().unwrap().is_empty());
    }

    #[test]
    fn a_pods_namespaces_are_the_guests() {
        let namespaces =
            r#""namespaces":[{"type":"ipc"},{"type":"uts"},{"type":"pid"},{"type":"network"}]"#;
        for (kind, left) in [("sandbox", 1), ("container", 3)] {
            let text = format!(
                r#"{{"ociVersion":"1.2.0","linux":{{{namespaces}}},
                    "annotations":{{"io.kubernetes.cri.container-type":"{kind}"}}}}"#
            );
            let mut one = parse(text.as_bytes()).unwrap();
            translate(&mut one, 7).unwrap();
            let linux = one.linux().as_ref().unwrap();
            assert_eq!(linux.namespaces().as_ref().unwrap().len(), left, "{kind}");
        }
    }

    #[test]
    fn binds_are_found_and_replaced() {
        let mut one = spec(
            "{}",
            r#"[{"destination":"/proc","type":"proc"},{"destination":"/a","source":"/srv/a","options":["rbind","ro"]}]"#,
        );
        let binds = host_binds(&one);
        assert_eq!(
            binds,
            [HostBind {
                mount: 1,
                source: "/srv/a".into(),
                read_only: true
            }]
        );
        use_share(&mut one, 1, "4");
        assert_eq!(
            one.mounts().as_ref().unwrap()[1].source().as_ref().unwrap(),
            &PathBuf::from("share:4")
        );
    }
}
