//! Root file systems by each snapshotter that containerd has.

use caisson_tests::{Host, Image, Layer};

use super::{
    daemon::{Daemon, Version, run_words_on},
    with_containerd,
};

with_containerd!(one: [overlayfs, native], two: [blockfile, erofs]);

const LAYERED: &str = "docker.io/library/layered:1";

/// A container on what a snapshotter yields: it sees the image's layers, what it writes is there for
/// its execs and not for the next container, owners and modes are the image's.
fn check(daemon: &Daemon, snapshotter: &str) {
    let fifos = daemon.fifos();
    let flags = ["--snapshotter", snapshotter, "-d", "--fifo-dir", &fifos];
    daemon
        .ctr(run_words_on(LAYERED, &flags, "long", &["sleep", "1000"]))
        .ok();
    let exec =
        |id, script| daemon.ctr(["task", "exec", "--exec-id", id, "long", "sh", "-c", script]);
    exec(
        "see",
        "cat /etc/second && stat -c '%u %a' /home/app && test ! -e /etc/gone && cat /etc/changed",
    )
    .expect_stdout("second layer\n1000 755\nafter\n");
    exec(
        "write",
        "echo mine >/root/mine && rm /etc/passwd && ln /root/mine /link \
         && dd if=/dev/zero of=/big bs=1M count=8 2>/dev/null && sync",
    )
    .ok();
    exec(
        "read",
        "test ! -e /etc/passwd && stat -c %s /big && cat /link",
    )
    .expect_stdout("8388608\nmine\n");
    daemon.remove("long");
    let flags = ["--snapshotter", snapshotter, "--rm", "--read-only"];
    let script = "test ! -e /root/mine && test -e /etc/passwd && cat /etc/second; >/new";
    daemon
        .ctr(run_words_on(LAYERED, &flags, "next", &["sh", "-c", script]))
        .expect_code(1)
        .expect_in_stdout("second layer");
}

/// An image whose upper layer adds, changes and removes.
fn image() -> Image {
    Image::busybox(LAYERED)
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
    on(version, "overlayfs");
}

fn native(version: Version) {
    on(version, "native");
}

fn blockfile(version: Version) {
    on(version, "blockfile");
}

fn on(version: Version, snapshotter: &str) {
    let host = Host::claim();
    let daemon = Daemon::start(&host, version);
    daemon.import(&image(), &["--snapshotter", snapshotter]);
    check(&daemon, snapshotter);
    // Its layers are mounts with some.
    daemon.ctr(["image", "rm", "--sync", LAYERED]).ok();
}

/// Only containerd 2.x has it.
fn erofs(version: Version) {
    on(version, "erofs");
}
