//! Kinds of mounts and their options.

use std::fs;
use std::path::PathBuf;

use caisson_tests::{Command, Host, seconds, until};
use serde_json::json;

use super::{SmallDisk, volume};
use crate::oci::Oci;

/// A tmpfs on the host with the file `within`, until this is dropped.
struct HostMount(PathBuf);

impl HostMount {
    fn on(at: PathBuf) -> Self {
        fs::create_dir(&at).unwrap();
        fs::write(at.join("beneath"), "").unwrap();
        Command::new(["mount", "-t", "tmpfs", "test", at.to_str().unwrap()])
            .run()
            .ok();
        fs::write(at.join("within"), "").unwrap();
        Self(at)
    }

    /// The directory on itself, shared as on hosts of systemd: what is mounted below it then is
    /// mounted below both, and once of the two it is hidden.
    fn of_itself(at: PathBuf) -> Self {
        let path = at.to_str().unwrap();
        Command::new(["mount", "--bind", path, path]).run().ok();
        let shared = Command::new(["mount", "--make-rshared", path]).run();
        let mount = Self(at);
        shared.ok();
        mount
    }
}

impl Drop for HostMount {
    fn drop(&mut self) {
        let unmounted = Command::new(["umount", self.0.to_str().unwrap()]).run();
        if !std::thread::panicking() {
            unmounted.ok();
        }
    }
}

#[test]
fn mounts_within_a_volume_come_with_it() {
    let host = Host::claim();
    let (directory, flag) = volume(&host);
    let inner = HostMount::on(directory.join("inner"));
    host.sh(["-v", &flag], "ls /data/inner; echo guest >/data/inner/new")
        .expect_stdout("within\n");
    assert_eq!(fs::read_to_string(inner.0.join("new")).unwrap(), "guest\n");
    // Read-only goes for them too, whatever the guest does.
    let read_only = format!("{flag}:ro");
    host.sh(
        ["--cap-add", "SYS_ADMIN", "-v", &read_only],
        "mount -o remount,rw /data; touch /data/inner/more || echo refused; rm /data/inner/new || echo refused",
    )
    .expect_stdout("refused\nrefused\n");
    assert!(inner.0.join("new").exists() && !inner.0.join("more").exists());
}

/// With `rslave` what the host mounts later comes, and goes with the host's: which can unmount it at
/// any time, and whose disk is free then, though the guest has looked at all of it.
#[test]
fn later_mounts_of_the_host_come_and_go() {
    let host = Host::claim();
    let (directory, flag) = volume(&host);
    let _itself = HostMount::of_itself(directory.clone());
    let early = HostMount::on(directory.join("early"));
    let image = host.scratch().join("disk");
    fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let shown = image.to_str().unwrap().to_owned();
    Command::new(["mkfs.ext4", "-q", &shown]).run().ok();
    let point = directory.join("late/r");
    fs::create_dir_all(&point).unwrap();
    let script = "cd /data; ls early; until [ -d late/r/lost+found ]; do sleep 0.1; done
        echo guest >late/r/new; ls -lR late >/dev/null; echo came
        until [ ! -e late/r/new ]; do sleep 0.1; done; echo went
        until [ ! -e early/within ]; do sleep 0.1; done; ls early";
    let flag = format!("{flag}:rslave");
    let words = [
        "run",
        "--rm",
        "-v",
        &flag,
        host.busybox(),
        "sh",
        "-c",
        script,
    ];
    let mut running = host.command(words).start();
    running.wait_for_stdout("within");
    let late = point.to_str().unwrap();
    Command::new(["mount", "-o", "loop", &shown, late])
        .run()
        .ok();
    running.wait_for_stdout("came");
    assert_eq!(fs::read_to_string(point.join("new")).unwrap(), "guest\n");
    Command::new(["umount", late]).run().ok();
    let free = until(seconds(20.0), || {
        let disks = Command::new(["losetup", "-j", &shown]).run().ok();
        disks.stdout().is_empty().then_some(())
    });
    assert!(free.is_some(), "the disk is in use after its unmount");
    running.wait_for_stdout("went");
    drop(early);
    running
        .finish()
        .expect_stdout("within\ncame\nwent\nbeneath\n");
}

/// What a container of several has had is free once it has gone, though the guest has seen all of it.
#[test]
fn a_disk_is_free_after_its_container() {
    let host = Host::claim();
    let disk = SmallDisk::mount(&host, 16);
    let flag = format!("{}:/data", disk.path().display());
    let image = host.scratch().join("small.ext4");
    let run = |words: &[&str], script: &str| {
        let words = ["run"].iter().chain(words);
        host.caisson(words.chain(&[host.busybox(), "sh", "-c", script]))
            .ok();
    };
    let base = host.scratch().join("base");
    fs::create_dir(&base).unwrap();
    // A machine has a file server if its first container wants one.
    let base = format!("{}:/base", base.display());
    let words = ["-d", "--name", "base", "--network", "none", "-v", &base];
    run(&words, "sleep 1000");
    let script = "cd /data; for n in $(seq 100); do echo $n >$n; done; cat * >/tmp/all; ls -l";
    run(
        &["--rm", "--network", "container:base", "-v", &flag],
        script,
    );
    drop(disk);
    let shown = image.to_str().unwrap();
    let free = until(seconds(10.0), || {
        let disks = Command::new(["losetup", "-j", shown]).run().ok();
        disks.stdout().is_empty().then_some(())
    });
    assert!(free.is_some(), "the disk is in use after its container");
    host.caisson(["rm", "-f", "base"]).ok();
}

#[test]
fn propagation_and_unknown_options_of_volumes_are_refused() {
    let host = Host::claim();
    let (_directory, flag) = volume(&host);
    for option in ["rshared", "z", "nocopy", "ro,noexec"] {
        let value = format!("{flag}:{option}");
        let name = option.rsplit(',').next().unwrap();
        host.caisson(["run", "--rm", "-v", &value, host.busybox(), "true"])
            .expect_error(&["-v", name, "not supported"]);
    }
}

#[test]
fn a_tmpfs_has_the_options_given() {
    let host = Host::claim();
    let script = "df -Pk /t | awk 'NR==2 { print $2 }'; stat -c '%a %u' /t
        grep ' /t ' /proc/mounts | grep -o 'nosuid,nodev,noexec'
        cp /bin/busybox /t/b 2>/dev/null || echo full
        printf '#!/bin/sh\\n' >/t/s; chmod 755 /t/s; /t/s 2>/dev/null || echo 'no execution'
        printf '#!/bin/sh\\necho executed\\n' >/e/s; chmod 755 /e/s; /e/s
        touch /r/x 2>/dev/null || echo 'read-only'";
    host.sh(
        [
            "--tmpfs",
            "/t:size=512k,mode=1770,uid=1000",
            "--tmpfs",
            "/e:exec",
            "--tmpfs",
            "/r:ro",
        ],
        script,
    )
    .expect_stdout(
        "512\n1770 1000\nnosuid,nodev,noexec\nfull\nno execution\nexecuted\nread-only\n",
    );
    host.caisson([
        "run",
        "--rm",
        "--tmpfs",
        "/t:colour=blue",
        host.busybox(),
        "true",
    ])
    .expect_error(&["/t", "colour"]);
}

#[test]
fn shared_memory_has_the_size_given() {
    let host = Host::claim();
    let script = "df -Pk /dev/shm | awk 'NR==2 { print $2 }'; dd if=/dev/zero of=/dev/shm/x bs=1M count=20 2>&1 | grep -o 'No space.*'; ls -l /dev/shm/x | awk '{ print $5 }'";
    host.sh(["--shm-size", "16m"], script)
        .expect_stdout("16384\nNo space left on device\n16777216\n");
    host.sh([], script).expect_stdout("65536\n20971520\n");
    for wrong in ["0", "many", "-1"] {
        let flag = format!("--shm-size={wrong}");
        host.caisson(["run", "--rm", &flag, host.busybox(), "true"])
            .expect_error(&["--shm-size", wrong]);
    }
    host.caisson([
        "run",
        "--rm",
        "--shm-size",
        "1g",
        "--tmpfs",
        "/dev/shm",
        host.busybox(),
        "true",
    ])
    .expect_error(&["--shm-size", "--tmpfs"]);
}

/// `bind` is the mount alone, `rbind` all below it: as with mount(8).
#[test]
fn a_bind_that_is_not_recursive_leaves_mounts_below_out() {
    let host = Host::claim();
    let (directory, _) = volume(&host);
    let _inner = HostMount::on(directory.join("inner"));
    let oci = Oci::new(&host);
    let bundle = oci.bundle("ls /alone/inner /all/inner", |config| {
        let mounts = config["mounts"].as_array_mut().unwrap();
        for (target, option) in [("/alone", "bind"), ("/all", "rbind")] {
            mounts.push(json!({
                "destination": target, "type": "bind", "source": directory, "options": [option],
            }));
        }
    });
    let running = oci.create("one", &bundle, "");
    oci.run(&["start", "one"]).ok();
    running
        .finish()
        .expect_stdout("/all/inner:\nwithin\n\n/alone/inner:\nbeneath\n");
    oci.run(&["delete", "one"]).ok();
}
