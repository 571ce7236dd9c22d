//! `caisson run`: the flags that limit what a container may use.

use caisson_tests::Host;

#[test]
fn cpus_are_whole_processors_and_a_share_of_them() {
    let host = Host::claim();
    host.sh(["--cpus", "2"], "nproc; cat /sys/fs/cgroup/cpu.max")
        .expect_stdout("2\n200000 100000\n");
    host.sh(["--cpus", "0.5"], "nproc; cat /sys/fs/cgroup/cpu.max")
        .expect_stdout("1\n50000 100000\n");
}

#[test]
fn memory_is_limited_and_its_end_is_told() {
    let host = Host::claim();
    host.sh(["-m", "128m"], "cat /sys/fs/cgroup/memory.max")
        .expect_stdout("134217728\n");
    // A shell variable that doubles until the limit ends it.
    host.caisson([
        "run",
        "-m",
        "64m",
        "--name",
        "hungry",
        host.busybox(),
        "sh",
        "-c",
        "x=0123456789abcdef; while :; do x=$x$x; done",
    ])
    .expect_code(137);
    assert_eq!(host.inspect("hungry")["State"]["OOMKilled"], true);
    host.caisson(["rm", "hungry"]).ok();
}

#[test]
fn a_bigger_container_has_bigger_memory() {
    let host = Host::claim();
    let total = |flags: &[&str]| -> u64 {
        host.sh(
            flags.iter().copied(),
            "awk '/MemTotal/ { print $2 }' /proc/meminfo",
        )
        .ok()
        .line()
        .parse()
        .unwrap()
    };
    let (small, large) = (total(&["-m", "128m"]), total(&["-m", "1g"]));
    assert!(
        large > 1024 * 1024 && small < 768 * 1024,
        "{small} KiB, {large} KiB"
    );
}

#[test]
fn pids_are_limited() {
    let host = Host::claim();
    host.sh(["--pids-limit", "20"], "cat /sys/fs/cgroup/pids.max")
        .expect_stdout("20\n");
    let finished = host.sh(
        ["--pids-limit", "20"],
        "n=0; while [ $n -lt 40 ]; do sleep 30 & n=$((n+1)); done",
    );
    assert!(finished.stderr().contains("fork"), "{finished}");
}

#[test]
fn ulimits_are_soft_and_hard() {
    let host = Host::claim();
    host.sh(
        ["--ulimit", "nofile=100:200", "--ulimit", "core=0"],
        "ulimit -Sn; ulimit -Hn; ulimit -c",
    )
    .expect_stdout("100\n200\n0\n");
    host.sh(["--ulimit", "nofile=64"], "ulimit -Sn; ulimit -Hn")
        .expect_stdout("64\n64\n");
}
