//! `features` (OCI runtime-spec, "Features Structure").

use serde_json::{Value, json};

use super::report::print_json;
use crate::{error::Error, spec::ALL_CAPABILITIES};

/// Runs the verb.
///
/// # Errors
/// Nobody reads.
pub fn run() -> Result<u8, Error> {
    print_json(&features())?;
    Ok(0)
}

fn features() -> Value {
    let capabilities: Vec<String> = ALL_CAPABILITIES
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
