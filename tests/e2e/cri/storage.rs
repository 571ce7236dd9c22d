//! Volumes as kubelet hands them to CRI.

use std::fs;
use std::path::{Path, PathBuf};

use caisson_tests::{Command, Host, seconds, until};
use k8s_cri::v1::{Device, Mount, MountPropagation};

use super::client::{Cri, container};
use crate::containerd::daemon::Version;

/// A tmpfs of the host until this is dropped.
struct Memory(PathBuf);

impl Memory {
    fn mount(at: PathBuf, options: &str) -> Self {
        fs::create_dir_all(&at).unwrap();
        let at_text = at.to_str().unwrap();
        Command::new(["mount", "-t", "tmpfs", "-o", options, "x", at_text])
            .run()
            .ok();
        Self(at)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let unmounted = Command::new(["umount", self.0.to_str().unwrap()]).run();
        if !std::thread::panicking() {
            // Nothing of the pod holds it either.
            unmounted.ok();
        }
    }
}

/// A loop device over a file until this is dropped.
struct Loop(String);

impl Loop {
    fn over(file: &Path) -> Self {
        let words = ["losetup", "--show", "-f", file.to_str().unwrap()];
        Self(Command::new(words).run().ok().line())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup")
            .args(["-d", &self.0])
            .status();
    }
}

fn mount(source: &Path, target: &str) -> Mount {
    Mount {
        host_path: source.display().to_string(),
        container_path: target.to_owned(),
        ..Default::default()
    }
}

/// `readOnly` is of one mount; emptyDir in memory has its size; later mounts of the host come where they
/// are to; volumes of the mode `Block` are disks, one disk even by two names and in two containers.
#[test]
fn volumes_of_all_modes() {
    let host = Host::claim();
    let cri = Cri::start(&host, Version::Two);
    let directory = host.scratch().join("volume");
    fs::create_dir(&directory).unwrap();
    let below = Memory::mount(directory.join("below"), "size=1m");
    let limited = Memory::mount(host.scratch().join("limited"), "size=256k");
    let disk = host.scratch().join("disk");
    let contents: Vec<u8> = (0..1_u32 << 18).flat_map(u32::to_le_bytes).collect();
    fs::write(&disk, &contents).unwrap();
    let (node, other) = (Loop::over(&disk), Loop::over(&disk));

    let config = cri.pod("volumes");
    let pod = cri.run_pod(&config);
    let mut app = container("app", "exec sleep 1000");
    app.mounts = vec![
        Mount {
            readonly: true,
            ..mount(&directory, "/once")
        },
        mount(&limited.0, "/limited"),
        Mount {
            propagation: MountPropagation::PropagationHostToContainer.into(),
            ..mount(&directory, "/later")
        },
    ];
    app.devices = [
        ("/dev/xvda", &node, "rwm"),
        ("/dev/xvdr", &other, "r"),
        ("/dev/again", &node, "r"),
    ]
    .map(|(path, node, permissions)| Device {
        container_path: path.to_owned(),
        host_path: node.0.clone(),
        permissions: permissions.to_owned(),
    })
    .to_vec();
    let app = cri.run(&pod, &config, app);
    let tried = "for f in /once/x /once/below/x; do
        touch $f 2>/dev/null && echo yes || echo no; done";
    assert_eq!(cri.output(&app, tried), "no\nyes\n");
    let fill =
        "dd if=/dev/zero of=/limited/x bs=64k count=16 2>&1 | grep -o 'No space left on device'
        stat -c %s /limited/x";
    assert_eq!(cri.output(&app, fill), "No space left on device\n262144\n");

    let late = Memory::mount(directory.join("late"), "size=1m");
    fs::write(late.0.join("here"), "").unwrap();
    let come = "until [ -e /later/late/here ]; do sleep 0.1; done; ls /later/late /once/late";
    assert_eq!(
        cri.output(&app, come),
        "/later/late:\nhere\n\n/once/late:\n"
    );

    let sum = Command::new(["md5sum", disk.to_str().unwrap()])
        .run()
        .ok()
        .stdout();
    let sum = sum.split(' ').next().unwrap();
    let script = "md5sum </dev/xvda; echo written | dd of=/dev/xvda bs=512 seek=8 conv=sync,fsync 2>/dev/null
        echo x 2>/dev/null >/dev/xvdr && echo written || echo refused
        test -b /dev/xvda && echo disk
        dd if=/dev/again bs=512 skip=8 count=1 2>/dev/null | tr -d '\\0'";
    assert_eq!(
        cri.output(&app, script),
        format!("{sum}  -\nrefused\ndisk\nwritten\n")
    );
    assert_eq!(&fs::read(&disk).unwrap()[4096..4104], b"written\n");

    // Another container has the same disk, and remembers what was there as long as it has it open.
    let mut beside = container("beside", "exec sleep 1000 </dev/xvda");
    beside.devices = vec![Device {
        container_path: "/dev/xvda".to_owned(),
        host_path: node.0.clone(),
        permissions: "rwm".to_owned(),
    }];
    let beside = cri.run(&pod, &config, beside);
    let read = "dd if=/dev/xvda bs=512 skip=9 count=1 2>/dev/null | head -c 6";
    assert_ne!(cri.output(&beside, read), "shared");
    let write = "echo shared | dd of=/dev/xvda bs=512 seek=9 conv=sync 2>/dev/null";
    cri.output(&app, write);
    assert_eq!(cri.output(&beside, read), "shared");
    cri.stop(&beside, 0);
    cri.remove(&beside);
    assert_eq!(cri.output(&app, read), "shared");

    // What is behind a disk vanishes: an error for the program, and one for the operator. (The first
    // blocks were read for a partition table.)
    let backing = fs::File::options().write(true).open(&disk).unwrap();
    backing.set_len(0).unwrap();
    let read = "dd if=/dev/xvdr of=/dev/null bs=4k skip=200 count=1 2>&1 | grep -o 'Input/output error'; echo alive";
    assert_eq!(cri.output(&app, read), "Input/output error\nalive\n");
    let told = until(seconds(10.0), || {
        let log = cri.daemon.log();
        let mut lines = log.lines();
        lines
            .any(|line| line.contains("volume-") && line.contains("I/O error"))
            .then_some(())
    });
    assert!(told.is_some(), "{}", cri.daemon.log());

    cri.stop(&app, 0);
    cri.remove(&app);
    cri.remove_pod(&pod);
    drop((below, limited, late, node, other));
}
