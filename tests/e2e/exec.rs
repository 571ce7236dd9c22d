//! `caisson exec`.

use caisson_tests::Host;

/// A container that runs until it is removed.
fn base(host: &Host) {
    host.caisson([
        "run",
        "-d",
        "--name",
        "base",
        "-e",
        "A=container",
        "-w",
        "/tmp",
        host.busybox(),
        "sleep",
        "1000",
    ])
    .ok();
}

#[test]
fn output_and_exit_code_are_the_commands() {
    let host = Host::claim();
    base(&host);
    let finished = host
        .caisson(["exec", "base", "sh", "-c", "echo out; echo err >&2; exit 7"])
        .expect_code(7);
    assert_eq!(
        (finished.stdout(), finished.stderr()),
        ("out\n".into(), "err\n".into())
    );
    host.caisson(["rm", "-f", "base"]).ok();
}

#[test]
fn it_runs_in_the_container() {
    let host = Host::claim();
    base(&host);
    host.caisson([
        "exec",
        "base",
        "sh",
        "-c",
        "echo $A; pwd; cat /proc/1/comm; id -u; cat /proc/self/oom_score_adj; ulimit -Sn; ulimit -Hn
         grep -c 'Max processes *unlimited *unlimited' /proc/self/limits",
    ])
    .expect_stdout("container\n/tmp\nsleep\n0\n0\n1048576\n1048576\n1\n");
    host.caisson(["exec", "base", "sh", "-c", "echo kept >/file"])
        .ok();
    host.caisson(["exec", "base", "cat", "/file"])
        .expect_stdout("kept\n");
    host.caisson(["rm", "-f", "base"]).ok();
}

#[test]
fn standard_input_is_passed_with_i() {
    let host = Host::claim();
    base(&host);
    host.command(["exec", "-i", "base", "wc", "-c"])
        .stdin(vec![b'x'; 300_000])
        .run()
        .expect_stdout("300000\n");
    host.command(["exec", "base", "cat"])
        .stdin("no")
        .run()
        .expect_stdout("");
    host.caisson(["rm", "-f", "base"]).ok();
}

#[test]
fn errors_are_dockers() {
    let host = Host::claim();
    base(&host);
    host.caisson(["exec", "base", "no-such-program"])
        .expect_error(&["no-such-program"])
        .expect_code(127);
    host.caisson(["exec", "base", "/etc/passwd"])
        .expect_error(&["/etc/passwd"])
        .expect_code(126);
    host.caisson(["exec", "no-such-container", "true"])
        .expect_error(&["no such container", "no-such-container"])
        .expect_code(1);
    host.caisson(["stop", "-t", "0", "base"]).ok();
    host.caisson(["exec", "base", "true"])
        .expect_error(&["not running"])
        .expect_code(1);
    host.caisson(["rm", "base"]).ok();
}

#[test]
fn ten_at_once_keep_apart() {
    let host = Host::claim();
    base(&host);
    let running: Vec<_> = (0..10)
        .map(|n| {
            host.command([
                "exec",
                "base",
                "sh",
                "-c",
                &format!("sleep 1; echo {n}; exit {n}"),
            ])
            .start()
        })
        .collect();
    for (n, running) in running.into_iter().enumerate() {
        let finished = running.finish().expect_code(n as i32);
        assert_eq!(finished.stdout(), format!("{n}\n"));
    }
    host.caisson(["rm", "-f", "base"]).ok();
}

#[test]
fn it_ends_with_the_container() {
    let host = Host::claim();
    base(&host);
    let mut running = host
        .command(["exec", "base", "sh", "-c", "echo started; sleep 1000"])
        .start();
    running.wait_for_stdout("started");
    host.caisson(["stop", "-t", "0", "base"]).ok();
    let finished = running.finish();
    assert_eq!(finished.code(), 137, "{finished}");
    host.caisson(["rm", "base"]).ok();
}

#[test]
fn it_has_the_containers_limits() {
    let host = Host::claim();
    // As systemd and docker do in a container: only inner cgroups have processes.
    let delegate =
        "mkdir /c && mount -t cgroup2 none /c && mkdir /c/inner && echo 1 >/c/inner/cgroup.procs &&
        echo +memory >/c/cgroup.subtree_control && echo ready && exec sleep 1000";
    let mut running = host
        .command([
            "run",
            "--name",
            "base",
            "--ulimit",
            "nofile=77:99",
            "--cap-add",
            "SYS_ADMIN",
            host.busybox(),
            "sh",
            "-c",
            delegate,
        ])
        .start();
    running.wait_for_stdout("ready");
    host.caisson([
        "exec",
        "base",
        "sh",
        "-c",
        "ulimit -Sn; ulimit -Hn; cat /proc/self/cgroup",
    ])
    .expect_stdout("77\n99\n0::/inner\n");
    host.caisson(["rm", "-f", "base"]).ok();
    running.finish();
}
