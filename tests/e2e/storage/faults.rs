//! Disks that are full and a file server that dies.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use caisson_tests::{Command, Host, seconds, until};
use rustix::process::{Pid, Signal, kill_process};

use super::{shim_log, volume};
use crate::configuration::with_files;

/// A small ext4 on a file of the host, mounted until this is dropped.
pub struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Makes and mounts one.
    pub fn mount(host: &Host, mib: u32) -> Self {
        let image = host.scratch().join("small.ext4");
        let image = image.to_str().unwrap();
        let at = host.scratch().join("small");
        fs::create_dir(&at).unwrap();
        let size = format!("{mib}M");
        Command::new(["mkfs.ext4", "-q", "-m", "0", image, &size])
            .run()
            .ok();
        Command::new(["mount", "-o", "loop", image, at.to_str().unwrap()])
            .run()
            .ok();
        Self(at)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = Command::new(["umount", self.0.to_str().unwrap()]).run();
        if !std::thread::panicking() {
            // Nothing of the container holds it either.
            unmounted.ok();
        }
    }
}

#[test]
fn a_full_disk_behind_a_volume_is_told_and_survived() {
    let host = Host::claim();
    let disk = SmallDisk::mount(&host, 16);
    let flag = format!("{}:/data", disk.0.display());
    let script = "echo kept >/data/kept; sync
        dd if=/dev/zero of=/data/big bs=64k count=1024 2>&1 | grep -o 'No space left on device'
        head -c 8192 /dev/zero >/data/other || echo 'no more'
        cat /data/kept; df -P /data | grep -o '100%'; rm /data/big
        dd if=/dev/zero of=/data/small bs=64k count=16 2>/dev/null && sync && stat -c %s /data/small";
    host.sh(["-v", &flag], script)
        .expect_stdout("No space left on device\nno more\nkept\n100%\n1048576\n");
    assert_eq!(fs::metadata(disk.0.join("small")).unwrap().len(), 1 << 20);
}

#[test]
fn a_full_writable_layer_is_told_and_survived() {
    let host = Host::claim();
    let script = "dd if=/dev/zero of=/big bs=64k count=1024 2>&1 | grep -o \"No space left on device\"; rm /big; echo fits >/small; cat /small";
    let words = format!("run --rm {} sh -c '{script}'", host.busybox());
    with_files(&host, &[("config.toml", "upper_disk_mib = 16\n")], &words)
        .expect_stdout("No space left on device\nfits\n");
}

/// The layer is sparse: the host may have no room for what its file system has. What is removed gives
/// the host its room back.
#[test]
fn a_full_disk_below_a_writable_layer_is_told_and_survived() {
    let host = Host::claim();
    let disk = SmallDisk::mount(&host, 48);
    let script = "dd if=/dev/zero of=/big bs=1M count=64 conv=fsync 2>&1 | grep -o \"Input/output error\"
        echo alive >/dev/shm/x; cat /dev/shm/x; until [ -e /dev/shm/go ]; do sleep 0.2; done
        rm /big; echo removed; until [ -e /dev/shm/room ]; do sleep 0.2; done
        head -c 8388608 /dev/urandom >/dev/shm/noise; dd if=/dev/shm/noise of=/small bs=1M conv=fsync 2>/dev/null
        mount -o remount,rw /proc/sys; echo 3 >/proc/sys/vm/drop_caches; cmp /dev/shm/noise /small && echo fits";
    // In the place where writable layers are made, for this container alone.
    let script = format!(
        "mkdir -p /var/lib/caisson/uppers && mount --bind '{}' /var/lib/caisson/uppers &&
         exec '{}' run --name one --network none --cap-add SYS_ADMIN {} sh -c '{script}'",
        disk.0.display(),
        host.program().display(),
        host.busybox(),
    );
    let mut running = Command::new(["unshare", "-m", "sh", "-c", &script])
        .within(120.0)
        .start();
    running.wait_for_stdout("Input/output error\nalive\n");
    let free = || {
        let found = rustix::fs::statvfs(&disk.0).unwrap();
        found.f_bfree * found.f_frsize
    };
    assert!(free() < 4 << 20, "{} bytes are free", free());
    let log = shim_log(&host, "one");
    assert!(
        log.lines().any(|line| line.contains("level=error")
            && line.contains("block device \\\"upper")
            && line.contains("No space left on device")
            && line.contains("I/O error")),
        "{log}"
    );
    host.caisson(["exec", "one", "touch", "/dev/shm/go"]).ok();
    running.wait_for_stdout("removed");
    let room = until(seconds(60.0), || (free() > 32 << 20).then_some(()));
    assert!(room.is_some(), "{} bytes are free", free());
    host.caisson(["exec", "one", "touch", "/dev/shm/room"]).ok();
    running
        .finish()
        .expect_stdout("Input/output error\nalive\nremoved\nfits\n");
    host.caisson(["rm", "one"]).ok();
}

#[test]
fn a_killed_file_server_is_told_and_nobody_waits_for_it() {
    let host = Host::claim();
    let (directory, flag) = volume(&host);
    // Requests are on their way at any time; each that fails leaves a line outside the volume.
    let script = "echo 1 >/data/file; exec 3</data/file; echo ready
        for work in 'cat /data/file' 'ls /data' 'echo x >/data/other' 'stat /data/file' 'sync /data/file'; do
            (while sh -c \"$work\" >/dev/null 2>>/tmp/errors; do :; done; echo ended) &
        done
        wait; cat <&3; grep -o 'Input/output error' /tmp/errors | sort -u; echo alive; sleep 1000";
    let words = [
        "run",
        "--name",
        "one",
        "-v",
        &flag,
        host.busybox(),
        "sh",
        "-c",
        script,
    ];
    let mut running = host.command(words).within(60.0).start();
    running.wait_for_stdout("ready");
    let busy = until(seconds(5.0), || {
        directory.join("other").exists().then_some(())
    });
    assert!(busy.is_some(), "no work is done");
    let servers = host.processes_of("caisson-fs");
    assert_eq!(servers.len(), 1);
    let killed = Instant::now();
    kill_process(Pid::from_raw(servers[0]).unwrap(), Signal::KILL).unwrap();
    running.wait_for_stdout("alive");
    assert!(killed.elapsed() < seconds(10.0), "{:?}", killed.elapsed());
    let said = running.stdout_so_far();
    assert!(
        said.matches("ended\n").count() == 5 && said.contains("Input/output error\n"),
        "{said}"
    );
    // What did not use the volume goes on.
    host.caisson(["exec", "one", "sh", "-c", "echo fine >/root/x; cat /root/x"])
        .expect_stdout("fine\n");
    let id = host.inspect("one")["Id"].as_str().unwrap().to_owned();
    let log = shim_log(&host, "one");
    assert!(
        log.lines().any(|line| line.contains("level=error")
            && line.contains(&id)
            && line.contains("file server")
            && line.contains("I/O errors")),
        "{log}"
    );
    host.caisson(["rm", "-f", "one"]).ok();
    running.finish().expect_code(137);
}
