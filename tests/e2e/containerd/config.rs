//! The configuration of a containerd that has all that tests need.

use std::{fs, io::ErrorKind, path::Path};

use caisson_tests::{Command, seconds};
use serde_json::json;

use super::{daemon::Version, networks};

/// What holds a pod of CRI.
pub const PAUSE: &str = "docker.io/library/pause:1";

/// Handler of CRI whose pods are made by the sandbox API; containerd 2.x has it.
pub const SANDBOX_API: &str = "caisson-by-shim";

/// Empties a directory and writes everything that containerd reads into it.
pub fn write(directory: &Path, version: Version) {
    // A test program that was killed may have left mounts.
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    for point in mounts.lines().filter_map(|line| line.split(' ').nth(4)) {
        if Path::new(point).starts_with(directory) {
            Command::new(["umount", "-l", point]).run().ok();
        }
    }
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            panic!("{}: {error}", directory.display())
        }
        _ => fs::create_dir_all(directory.join("net.d")).unwrap(),
    }
    let network = directory.join("net.d");
    // The pods' network: veth pairs (CNI's ptp plugin).
    let plugins = json!({
        "cniVersion": "1.0.0",
        "name": "test",
        "plugins": [{
            "type": "ptp",
            "ipam": {
                "type": "host-local",
                "ranges": [[{ "subnet": "10.77.0.0/24" }]],
                "routes": [{ "dst": "0.0.0.0/0" }],
                "dataDir": directory.join("addresses"),
            },
        }],
    });
    fs::write(network.join("10-test.conflist"), plugins.to_string()).unwrap();
    let scratch = directory.join("scratch.ext4").display().to_string();
    Command::new(["truncate", "-s", "64M", &scratch]).run().ok();
    Command::new(["mkfs.ext4", "-q", &scratch]).run().ok();
    let (head, cri, network) = match version {
        Version::One => ("2", "io.containerd.grpc.v1.cri", network.display()),
        Version::Two => ("3", "io.containerd.cri.v1.runtime", network.display()),
    };
    let sandbox_image = match version {
        Version::One => format!("[plugins.\"{cri}\"]\nsandbox_image = \"{PAUSE}\""),
        Version::Two => format!(
            "[plugins.\"io.containerd.cri.v1.images\".pinned_images]\nsandbox = \"{PAUSE}\"\n\
             [plugins.\"io.containerd.service.v1.diff-service\"]\ndefault = [\"erofs\", \"walking\"]"
        ),
    };
    let programs = match version {
        Version::One => r#"bin_dir = "/usr/lib/cni""#,
        Version::Two => r#"bin_dirs = ["/usr/lib/cni"]"#,
    };
    // The pods of one are containers that hold them, those of the other are machines.
    let by_shim = match version {
        Version::One => String::new(),
        Version::Two => format!(
            "[plugins.\"{cri}\".containerd.runtimes.{SANDBOX_API}]\n\
             runtime_type = \"io.containerd.caisson.v2\"\n\
             sandboxer = \"shim\""
        ),
    };
    let networks = networks::write(directory, cri);
    let config = format!(
        r#"version = {head}
{limits}
{sandbox_image}
[plugins."{cri}".containerd]
default_runtime_name = "caisson"
[plugins."{cri}".containerd.runtimes.caisson]
runtime_type = "io.containerd.caisson.v2"
privileged_without_host_devices = true
{by_shim}
{networks}
[plugins."{cri}".cni]
{programs}
conf_dir = "{network}"
[plugins."io.containerd.snapshotter.v1.blockfile"]
scratch_file = "{scratch}"
fs_type = "ext4"
mount_options = []
"#,
        limits = timeouts()
    );
    fs::write(directory.join("config.toml"), config).unwrap();
}

/// containerd's own limits on shims, stretched like everything else.
fn timeouts() -> String {
    let limits = [
        ("shim.cleanup", 5.0),
        ("shim.load", 5.0),
        ("shim.shutdown", 3.0),
        ("task.state", 2.0),
    ];
    let mut text = "[timeouts]\n".to_owned();
    for (name, limit) in limits {
        let limit = seconds(limit).as_secs();
        text += &format!("\"io.containerd.timeout.{name}\" = \"{limit}s\"\n");
    }
    text
}
