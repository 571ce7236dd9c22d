//! What containers in guests may have, as the OCI runtime-spec's "Features Structure" tells it.

use serde_json::{Value, json};

/// Every capability of Linux 6.12, in the order of their numbers.
pub const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The structure: for `caisson features`, and for containerd, which looks there for what it may ask.
pub fn features() -> Value {
    let capabilities: Vec<String> = CAPABILITIES
        .iter()
        .map(|name| format!("CAP_{name}"))
        .collect();
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": "1.2.0",
        "hooks": ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"],
        "mountOptions": [
            "async", "atime", "bind", "defaults", "dev", "diratime", "dirsync", "exec", "lazytime", "noatime",
            "nodev", "nodiratime", "noexec", "nolazytime", "nosuid", "nosymfollow", "private", "rbind", "relatime",
            "rnodev", "rnoexec", "rnosuid", "ro", "rprivate", "rro", "rshared", "rslave", "runbindable", "rw",
            "shared", "slave", "strictatime", "suid", "symfollow", "sync", "tmpcopyup", "unbindable",
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "uts"],
            "capabilities": capabilities,
            "cgroup": { "v1": false, "v2": true, "systemd": true, "systemdUser": false, "rdma": false },
            "seccomp": { "enabled": true },
            "apparmor": { "enabled": false },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": false } },
        },
        "annotations": {
            "io.caisson.version": env!("CARGO_PKG_VERSION"),
        },
        "potentiallyUnsafeConfigAnnotations": [],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_features_structure() {
        let features: oci_spec::runtime::Features = serde_json::from_value(features()).unwrap();
        assert_eq!(features.oci_version_max(), "1.2.0");
    }
}
