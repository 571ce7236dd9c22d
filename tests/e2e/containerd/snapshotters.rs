//! Root file systems by each snapshotter that containerd has.

use caisson_tests::{Command, Host, Image, Layer};

use super::{
    daemon::{Daemon, IMAGE, Version, run_words},
    with_each_containerd,
};

with_each_containerd!(overlayfs, native, blockfile);

/// A container on what a snapshotter yields: it sees both layers, what it writes is there for its
/// execs and not for the next container, owners and modes are the image's.
fn check(daemon: &Daemon, snapshotter: &str, flags: &[&str]) {
    let flags = [&["--snapshotter", snapshotter], flags].concat();
    let script = "cat /etc/second && test ! -e /root/mine && echo mine >/root/mine && rm /etc/passwd \
                  && stat -c '%u %a' /home/app && test ! -e /etc/gone && cat /etc/changed";
    for id in ["first", "next"] {
        daemon
            .ctr(run_words(
                &[&flags[..], &["--rm"]].concat(),
                id,
                &["sh", "-c", script],
            ))
            .expect_stdout("second layer\n1000 755\nafter\n");
    }
    daemon.detached(&flags, "long", &["sleep", "1000"]);
    let exec = |id, script| {
        daemon
            .ctr(["task", "exec", "--exec-id", id, "long", "sh", "-c", script])
            .ok()
    };
    exec(
        "w",
        "dd if=/dev/zero of=/big bs=1M count=8 2>/dev/null && ln /big /link && sync",
    );
    exec("r", "cmp /big /link");
    daemon.remove("long");
    // A read-only one.
    let read_only = [&flags[..], &["--rm", "--read-only"]].concat();
    daemon
        .ctr(run_words(
            &read_only,
            "ro",
            &["sh", "-c", "cat /etc/second; >/new"],
        ))
        .expect_code(1)
        .expect_in_stdout("second layer");
}

/// An image whose upper layer adds, changes and removes.
fn image() -> Image {
    Image::busybox(IMAGE)
        .layer(
            Layer::new()
                .file("etc/gone", 0o644, "")
                .file("etc/changed", 0o644, "before\n"),
        )
        .layer(
            Layer::new()
                .file("etc/second", 0o644, "second layer\n")
                .file("etc/changed", 0o644, "after\n")
                .whiteout("etc", "gone"),
        )
}

fn overlayfs(version: Version) {
    let host = Host::claim();
    let daemon = Daemon::with_config(&host, version, "");
    daemon.import(&image(), &[]);
    check(&daemon, "overlayfs", &[]);
}

fn native(version: Version) {
    let host = Host::claim();
    let daemon = Daemon::with_config(&host, version, "");
    daemon.import(&image(), &["--snapshotter", "native"]);
    check(&daemon, "native", &[]);
}

fn blockfile(version: Version) {
    let host = Host::claim();
    let scratch = host.scratch().join("scratch.ext4");
    let file = scratch.display().to_string();
    Command::new(["truncate", "-s", "64M", &file]).run().ok();
    Command::new(["mkfs.ext4", "-q", &file]).run().ok();
    let config = format!(
        "[plugins.\"io.containerd.snapshotter.v1.blockfile\"]\n\
         scratch_file = \"{file}\"\nfs_type = \"ext4\"\nmount_options = []\n"
    );
    let daemon = Daemon::with_config(&host, version, &config);
    daemon.import(&image(), &["--snapshotter", "blockfile"]);
    check(&daemon, "blockfile", &[]);
}

mod erofs {
    use super::*;

    /// Only containerd 2.x has it.
    #[test]
    fn two() {
        let host = Host::claim();
        let config = "[plugins.\"io.containerd.service.v1.diff-service\"]\n\
                      default = [\"erofs\", \"walking\"]\n";
        let daemon = Daemon::with_config(&host, Version::Two, config);
        daemon.import(&image(), &["--snapshotter", "erofs"]);
        check(&daemon, "erofs", &[]);
    }
}
