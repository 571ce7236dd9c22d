//! Kubernetes' volumes with `medium: HugePages`, as kubelet hands them to CRI.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use caisson_tests::{Command, Host};
use k8s_cri::v1::{ContainerConfig, Mount};

use super::client::{Cri, container};
use crate::containerd::daemon::Version;

/// A hugetlbfs of the host.
pub struct Volume(pub PathBuf);

impl Volume {
    pub fn mount(at: PathBuf, options: &str) -> Self {
        fs::create_dir_all(&at).unwrap();
        let at_text = at.to_str().unwrap();
        Command::new(["mount", "-t", "hugetlbfs", "-o", options, "nodev", at_text])
            .run()
            .ok();
        Self(at)
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let unmounted = Command::new(["umount", self.0.to_str().unwrap()]).run();
        if !std::thread::panicking() {
            // Nothing of the pod holds it.
            unmounted.ok();
        }
    }
}

/// The cgroup of a pod, to which kubelet has given so many huge pages.
struct PodCgroup(PathBuf);

impl PodCgroup {
    fn with_limit(name: &str, bytes: u64) -> Self {
        let root = Path::new("/sys/fs/cgroup");
        fs::write(root.join("cgroup.subtree_control"), "+hugetlb").unwrap();
        let path = root.join(name);
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("hugetlb.2MB.max"), bytes.to_string()).unwrap();
        Self(path)
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        let removed = fs::remove_dir(&self.0);
        if !std::thread::panicking() {
            removed.unwrap();
        }
    }
}

fn with_huge(name: &str, volume: &Volume) -> ContainerConfig {
    let mut config = container(name, "exec sleep 1000");
    config.mounts = vec![Mount {
        host_path: volume.0.display().to_string(),
        container_path: "/huge".to_owned(),
        ..Default::default()
    }];
    config
}

fn meminfo(what: &str) -> String {
    format!("awk '/^HugePages_{what}:/ {{ print $2 }}' /proc/meminfo")
}

/// containerd as it comes does not pass the containers' limits on: the pod's counts.
#[test]
fn a_volume_of_a_pod() {
    const LIMIT: u64 = 8 << 20;
    let host = Host::claim();
    let cri = Cri::start(&host, Version::Two);
    // As kubelet mounts it: without a size, and for the pod's group.
    let volume = Volume::mount(host.scratch().join("volume"), "pagesize=2M,gid=1000");
    fs::set_permissions(&volume.0, fs::Permissions::from_mode(0o2770)).unwrap();
    let cgroup = PodCgroup::with_limit("caisson-test-huge", LIMIT);
    let mut config = cri.pod("huge");
    config.linux.as_mut().unwrap().cgroup_parent = "/caisson-test-huge".to_owned();
    let pod = cri.run_pod(&config);
    let writer = cri.run(&pod, &config, with_huge("writer", &volume));
    let reader = cri.run(&pod, &config, with_huge("reader", &volume));

    let seen = cri.output(
        &writer,
        &format!("stat -c '%a %g' /huge; {}", meminfo("Total")),
    );
    assert_eq!(seen, "2770 1000\n4\n");
    let fill = format!("fallocate -l 6291456 /huge/x && {}", meminfo("Free"));
    assert_eq!(cri.output(&writer, &fill), "1\n");
    // The other has the same files, and what is left of the pages.
    let more = "stat -c %s /huge/x; fallocate -l 4194304 /huge/y 2>&1 | grep -o 'No space left\\|Cannot allocate'";
    let told = cri.output(&reader, more);
    assert!(
        told.starts_with("6291456\n") && told.lines().count() == 2,
        "{told}"
    );
    // Nothing of it is on the host.
    assert_eq!(fs::read_dir(&volume.0).unwrap().count(), 0);

    // Files stay for the pod, whoever made them; a container that comes again finds them.
    cri.stop(&writer, 0);
    cri.remove(&writer);
    let mut again = with_huge("writer", &volume);
    again.metadata.as_mut().unwrap().attempt = 1;
    let writer = cri.run(&pod, &config, again);
    let cleared = format!(
        "rm -f /huge/y; stat -c %s /huge/x; rm /huge/x; {}",
        meminfo("Free")
    );
    assert_eq!(cri.output(&writer, &cleared), "6291456\n4\n");

    // The last one that may use pages takes them with it.
    let plain = cri.run(&pod, &config, container("plain", "exec sleep 1000"));
    assert_eq!(cri.output(&plain, &meminfo("Total")), "4\n");
    for id in [&writer, &reader] {
        cri.stop(id, 0);
        cri.remove(id);
    }
    assert_eq!(cri.output(&plain, &meminfo("Total")), "0\n");
    cri.remove_pod(&pod);
    drop((volume, cgroup));
}
