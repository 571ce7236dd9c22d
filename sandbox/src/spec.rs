//! An OCI specification made for the host, turned into one for the guest.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use caisson_fs::ReadOnly;
use caisson_protocol::POD_SHM;
use oci_spec::runtime::{
    LinuxDeviceCgroup, LinuxDeviceType, LinuxNamespaceType, LinuxResources, Mount, Spec,
};

use crate::error::Error;

/// Annotations that tell a Kubernetes pod's first container, which only holds the pod, from others.
const CONTAINER_TYPES: [&str; 2] = [
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri-o.ContainerType",
];

/// Annotations that name the pod of a container: containerd's CRI plugin, CRI-O.
const POD_ANNOTATIONS: [&str; 2] = [
    "io.kubernetes.cri.sandbox-id",
    "io.kubernetes.cri-o.SandboxID",
];

/// The pod that a container belongs to, if it belongs to one.
pub fn pod_of(spec: &Spec) -> Option<&String> {
    let annotations = spec.annotations().as_ref()?;
    POD_ANNOTATIONS
        .iter()
        .find_map(|name| annotations.get(*name))
}

/// A bind mount whose source is on the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostBind {
    /// Index in the specification's mounts.
    pub mount: usize,
    /// On the host.
    pub source: PathBuf,
    /// With what the host has mounted below.
    pub recursive: bool,
    /// What the host mounts and unmounts below later is seen.
    pub follows: bool,
    /// The host's side enforces it too.
    pub read_only: ReadOnly,
}

/// A block device of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostDisk {
    /// In the container; the first of several.
    pub path: PathBuf,
    /// Major and minor number on the host.
    pub numbers: (i64, i64),
    /// The container may write to it.
    pub writable: bool,
}

/// The block devices that the container may use by a rule for just that device, each once. One that
/// may use all devices (a privileged container that has the nodes of all of them) gets none of the
/// host's.
pub fn host_disks(spec: &Spec) -> Vec<HostDisk> {
    let Some(linux) = spec.linux() else {
        return Vec::new();
    };
    let Some(resources) = linux.resources() else {
        return Vec::new();
    };
    let mut disks: Vec<HostDisk> = Vec::new();
    for device in linux.devices().iter().flatten() {
        let numbers = (device.major(), device.minor());
        if device.typ() != LinuxDeviceType::B || disks.iter().any(|disk| disk.numbers == numbers) {
            continue;
        }
        if let Some(writable) = may_write(resources, numbers) {
            disks.push(HostDisk {
                path: device.path().clone(),
                numbers,
                writable,
            });
        }
    }
    disks
}

/// Whether the rules for just this disk, which add up, let it be written; none if there are none.
fn may_write(resources: &LinuxResources, (major, minor): (i64, i64)) -> Option<bool> {
    let rules = resources.devices().iter().flatten();
    let own = rules.filter(|rule| {
        rule.allow()
            && rule.typ() == Some(LinuxDeviceType::B)
            && (rule.major(), rule.minor()) == (Some(major), Some(minor))
    });
    own.map(|rule| rule.access().as_ref().is_none_or(|a| a.contains('w')))
        .reduce(|one, other| one || other)
}

/// Replaces the host's numbers of the disks by the guest's. All at once: what is one disk's number in
/// the guest can be another's on the host.
pub fn use_disks(spec: &mut Spec, disks: &[(HostDisk, (i64, i64))]) {
    let Some(linux) = spec.linux_mut() else {
        return;
    };
    let in_guest = |numbers| {
        let disk = disks.iter().find(|(disk, _)| disk.numbers == numbers)?;
        Some(disk.1)
    };
    for device in linux.devices_mut().iter_mut().flatten() {
        if device.typ() == LinuxDeviceType::B
            && let Some((major, minor)) = in_guest((device.major(), device.minor()))
        {
            device.set_major(major);
            device.set_minor(minor);
        }
    }
    let resources = linux.resources_mut().as_mut();
    if let Some(rules) = resources.and_then(|resources| resources.devices_mut().as_mut()) {
        rules.retain_mut(|rule| use_rule(rule, in_guest));
    }
}

/// Gives a rule the guest's numbers. False: it is for a block device of the host that the guest has
/// not, where its numbers would be another disk's.
fn use_rule(
    rule: &mut LinuxDeviceCgroup,
    in_guest: impl Fn((i64, i64)) -> Option<(i64, i64)>,
) -> bool {
    // No number, or a negative one, stands for all.
    let Some(major) = rule.major().filter(|major| *major >= 0) else {
        return true;
    };
    if rule.typ() != Some(LinuxDeviceType::B) {
        return true;
    }
    let minor = rule.minor().filter(|minor| *minor >= 0);
    match minor.and_then(|minor| in_guest((major, minor))) {
        Some((major, minor)) => {
            rule.set_major(Some(major));
            rule.set_minor(Some(minor));
            true
        }
        None => {
            let minor = minor.map_or("*".to_owned(), |minor| minor.to_string());
            log::warn!(
                "the rule for the host's block device {major}:{minor} is left out: the guest has no such disk"
            );
            false
        }
    }
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
    let mut joins_ipc = false;
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
    if let Some(process) = spec.process_mut() {
        // AppArmor and SELinux confine processes on the kernel that loaded the policy: the host's.
        process.set_apparmor_profile(None).set_selinux_label(None);
    }
    if let Some(linux) = spec.linux_mut() {
        // The agent decides where a container's cgroup is.
        linux.set_cgroups_path(None);
        if let Some(resources) = linux.resources_mut() {
            take_host_sets(resources);
        }
        let mut kept = Vec::new();
        let namespaces = linux.namespaces().clone().unwrap_or_default();
        // In the guest that would be the agent's.
        if !namespaces
            .iter()
            .any(|namespace| namespace.typ() == LinuxNamespaceType::Pid)
        {
            return Err(Error::Unsupported(
                "the container wants the host's PID namespace (--pid host, hostPID): a microVM has \
                 its own, so run it with another runtime, or without that"
                    .to_owned(),
            ));
        }
        for namespace in namespaces {
            match (namespace.typ(), namespace.path()) {
                // The guest's own network is the pod's.
                (LinuxNamespaceType::Network, _) => {}
                // The pod's, or one of the pod's on the host; that of the pod is the guest's, which
                // therefore gets the names and sysctls of the container that holds the pod.
                (kind @ (LinuxNamespaceType::Ipc | LinuxNamespaceType::Uts), path)
                    if holds_pod || path.is_some() =>
                {
                    joins_ipc |= kind == LinuxNamespaceType::Ipc;
                }
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
    if joins_ipc {
        share_memory(spec);
    }
    Ok(joins_pod)
}

/// Turns the specification of a further process, made for the host, into one for the guest. What is
/// not of OCI's stays in it: the agent is asked for copies of files so.
///
/// # Errors
/// It is none.
pub fn translate_process(json: &[u8]) -> Result<Vec<u8>, Error> {
    let malformed = |error| Error::Invalid(format!("malformed process specification: {error}"));
    let mut process: BTreeMap<String, serde_json::Value> =
        serde_json::from_slice(json).map_err(malformed)?;
    // As of a first process.
    process.retain(|name, _| name != "apparmorProfile" && name != "selinuxLabel");
    serde_json::to_vec(&process).map_err(malformed)
}

/// Gives a container of the pod's IPC namespace the pod's `/dev/shm`. Its caller has made one on
/// the host, where a microVM has no use for it, or leaves it to the runtime and so would have each
/// container get one of its own (containerd's sandbox API). A volume that is mounted there stays.
fn share_memory(spec: &mut Spec) {
    let pod = pod_of(spec).cloned();
    for mount in spec.mounts_mut().iter_mut().flatten() {
        let kind = mount.typ().as_deref();
        let of_pod = mount
            .source()
            .as_ref()
            .zip(pod.as_ref())
            .is_some_and(|(source, pod)| is_shm_of(source, pod));
        if mount.destination() == Path::new("/dev/shm") && (kind == Some("tmpfs") || of_pod) {
            let options = ["bind", "nosuid", "nodev", "noexec"];
            mount
                .set_typ(Some("bind".to_owned()))
                .set_source(Some(POD_SHM.into()))
                .set_options(Some(options.map(str::to_owned).to_vec()));
        }
    }
}

/// `.../sandboxes/POD/shm` of containerd, `.../POD/userdata/shm` of CRI-O.
fn is_shm_of(source: &Path, pod: &str) -> bool {
    source.ends_with("shm") && source.iter().any(|part| part == pod)
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

fn is_bind(mount: &Mount) -> bool {
    let options = mount.options().as_deref().unwrap_or_default();
    mount.typ().as_deref() == Some("bind")
        || options
            .iter()
            .any(|option| option == "bind" || option == "rbind")
}

/// The mounts of a file system of this type.
pub fn mounts_of_type<'a>(spec: &'a Spec, kind: &'a str) -> impl Iterator<Item = &'a Mount> {
    let mounts = spec.mounts().iter().flatten();
    mounts.filter(move |mount| mount.typ().as_deref() == Some(kind) && !is_bind(mount))
}

/// The bind mounts whose sources are on the host.
pub fn host_binds(spec: &Spec) -> Vec<HostBind> {
    let mounts = spec.mounts().iter().flatten().enumerate();
    mounts
        .filter_map(|(index, mount)| {
            let options = mount.options().as_deref().unwrap_or_default();
            let source = mount.source().clone().filter(|_| is_bind(mount))?;
            if source == Path::new(POD_SHM) {
                return None;
            }
            let has = |wanted: &str| options.iter().any(|option| option == wanted);
            let read_only = match (has("ro"), has("rro")) {
                (_, true) => ReadOnly::Tree,
                (true, false) => ReadOnly::Mount,
                (false, false) => ReadOnly::Nothing,
            };
            Some(HostBind {
                mount: index,
                source,
                recursive: has("rbind"),
                // Of `shared` that is the one half: nothing of the guest's is mounted on the host.
                follows: ["slave", "rslave", "shared", "rshared"]
                    .into_iter()
                    .any(has),
                read_only,
            })
        })
        .collect()
}

/// Lets the guest write below a mount that is `ro`: there it is one mount with what the host has
/// mounted below, which may be written. The host's side goes on to refuse the rest.
pub fn leave_read_only_to_host(spec: &mut Spec, mount: usize) {
    let mount = spec
        .mounts_mut()
        .as_mut()
        .and_then(|mounts| mounts.get_mut(mount));
    if let Some(options) = mount.and_then(|mount| mount.options_mut().as_mut()) {
        options.retain(|option| option != "ro");
    }
}

/// Replaces the source of a mount by one that the guest knows.
pub fn use_source(spec: &mut Spec, mount: usize, source: String) {
    if let Some(mount) = spec
        .mounts_mut()
        .as_mut()
        .and_then(|mounts| mounts.get_mut(mount))
    {
        mount.set_source(Some(source.into()));
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
    fn the_hosts_processes_are_not_for_a_guest() {
        let mut one = spec(r#"{"namespaces":[{"type":"network"}]}"#, "[]");
        let error = translate(&mut one, 7).unwrap_err();
        assert!(error.to_string().contains("PID namespace"), "{error}");
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
    fn disks_are_those_with_a_rule_of_their_own() {
        let mut one = spec(
            r#"{"devices":[
                {"path":"/dev/block","type":"b","major":7,"minor":1},
                {"path":"/dev/read","type":"b","major":253,"minor":16},
                {"path":"/dev/none","type":"b","major":7,"minor":3},
                {"path":"/dev/null","type":"c","major":7,"minor":1},
                {"path":"/dev/again","type":"b","major":7,"minor":1}],
              "resources":{"devices":[{"allow":false,"access":"rwm"},
                {"allow":true,"type":"b","major":7,"minor":1,"access":"rwm"},
                {"allow":true,"type":"b","major":253,"minor":16,"access":"r"},
                {"allow":true,"type":"b","major":7,"minor":1,"access":"r"},
                {"allow":true,"type":"b","major":253,"minor":48,"access":"rwm"},
                {"allow":true,"type":"b","major":8,"access":"rwm"}]}}"#,
            "[]",
        );
        let found = host_disks(&one);
        let writable: Vec<_> = found
            .iter()
            .map(|disk| (disk.numbers, disk.writable))
            .collect();
        assert_eq!(writable, [((7, 1), true), ((253, 16), false)]);
        // The guest's number of the one is the host's of the other.
        let disks: Vec<_> = found.into_iter().zip([(253, 16), (253, 32)]).collect();
        use_disks(&mut one, &disks);
        let text = serde_json::to_string(&one).unwrap();
        for (numbers, times) in [
            (r#""major":253,"minor":16"#, 4),
            (r#""major":253,"minor":32"#, 2),
            (r#""major":7,"minor":3"#, 1),
            (r#""type":"c","major":7,"minor":1"#, 1),
            // What is nobody's disk in the guest is somebody's number there.
            (r#""minor":48"#, 0),
            (r#""major":8"#, 0),
        ] {
            assert_eq!(text.matches(numbers).count(), times, "{numbers}: {text}");
        }
        // A privileged container with all nodes of the host.
        let all = spec(
            r#"{"devices":[{"path":"/dev/sda","type":"b","major":8,"minor":0}],
              "resources":{"devices":[{"allow":true,"access":"rwm"}]}}"#,
            "[]",
        );
        assert_eq!(host_disks(&all), []);
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
    fn labels_of_the_hosts_kernel_go() {
        let process = r#"{"cwd":"/","args":["x"],"user":{"uid":0,"gid":0},"noNewPrivileges":true,
            "apparmorProfile":"cri-containerd.apparmor.d","selinuxLabel":"system_u:system_r:c","x":1}"#;
        let text = format!(r#"{{"ociVersion":"1.2.0","process":{process}}}"#);
        let mut one = parse(text.as_bytes()).unwrap();
        translate(&mut one, 7).unwrap();
        let further = translate_process(process.as_bytes()).unwrap();
        assert!(String::from_utf8_lossy(&further).contains(r#""x":1"#));
        let further: oci_spec::runtime::Process = serde_json::from_slice(&further).unwrap();
        for process in [one.process().as_ref().unwrap(), &further] {
            let labels = (process.apparmor_profile(), process.selinux_label());
            assert_eq!(labels, (&None, &None));
            assert_eq!(process.no_new_privileges(), Some(true));
        }
        assert!(translate_process(b"{").is_err());
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
    fn containers_of_a_pod_share_its_memory() {
        let shm = |namespace: &str, mount: &str| {
            let text = format!(
                r#"{{"ociVersion":"1.2.0","linux":{{"namespaces":[{namespace},{{"type":"pid"}}]}},
                    "mounts":[{{"destination":"/dev/shm",{mount}}}],
                    "annotations":{{"io.kubernetes.cri.sandbox-id":"p"}}}}"#
            );
            let mut one = parse(text.as_bytes()).unwrap();
            translate(&mut one, 7).unwrap();
            (
                one.mounts().as_ref().unwrap()[0].source() == &Some(POD_SHM.into()),
                host_binds(&one).len(),
            )
        };
        let (joined, own) = (
            r#"{"type":"ipc","path":"/proc/7/ns/ipc"}"#,
            r#"{"type":"ipc"}"#,
        );
        let private = r#""type":"tmpfs","source":"shm""#;
        let bind = |source: &str| format!(r#""type":"bind","source":"{source}""#);
        assert_eq!(shm(joined, private), (true, 0));
        assert_eq!(shm(own, private), (false, 0));
        assert_eq!(shm(joined, &bind("/run/c/sandboxes/p/shm")), (true, 0));
        assert_eq!(shm(joined, &bind("/var/lib/kubelet/volume")), (false, 1));
        assert_eq!(shm(joined, &bind("/dev/shm")), (false, 1), "the host's");
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
                recursive: true,
                follows: false,
                read_only: ReadOnly::Mount
            }]
        );
        for (option, follows) in [("rslave", true), ("shared", true), ("rprivate", false)] {
            let mount =
                format!(r#"[{{"destination":"/a","source":"/a","options":["bind","{option}"]}}]"#);
            assert_eq!(
                host_binds(&spec("{}", &mount))[0].follows,
                follows,
                "{option}"
            );
        }
        use_source(&mut one, 1, "share:4".to_owned());
        assert_eq!(
            one.mounts().as_ref().unwrap()[1].source().as_ref().unwrap(),
            &PathBuf::from("share:4")
        );
    }
}
