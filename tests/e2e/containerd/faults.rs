//! Shims, machines and daemons that die, and requests that make no sense.

use std::fs;

use caisson_tests::{Host, seconds, until};
use rustix::process::{Pid, Signal, kill_process};

use super::{
    daemon::{Daemon, Version, kill, run_words},
    with_containerd,
};

with_containerd!(
    one: [a_killed_shim_is_cleaned_up, requests_that_make_no_sense],
    two: [a_shim_killed_at_any_step, containers_outlive_containerd]
);

fn a_killed_shim_is_cleaned_up(version: Version) {
    let host = Host::claim();
    let daemon = Daemon::start(&host, version);
    daemon.detached(&[], "orphan", &["sleep", "1000"]);
    kill(daemon.shims("orphan")[0]);
    let noticed = until(seconds(20.0), || {
        daemon.status("orphan").is_none().then_some(())
    });
    assert!(noticed.is_some(), "containerd keeps a task whose shim died");
    daemon.ctr(["container", "rm", "orphan"]).ok();
    // Its name can be used again.
    daemon.run_with(&["--rm"], "orphan", &["true"]).ok();
}

/// The shim dies a little later each time: while the machine boots, the container is made, it
/// runs, an exec runs, and while it is deleted. Whatever the client is told, nothing is left.
fn a_shim_killed_at_any_step(version: Version) {
    let host = Host::claim();
    let daemon = Daemon::start(&host, version);
    for step in 0..5 {
        let id = format!("step{step}");
        let running = daemon
            .command(run_words(&["--rm"], &id, &["sh", "-c", "sleep 0.3"]))
            .start();
        let shim = until(seconds(20.0), || daemon.shims(&id).first().copied());
        let shim = shim.expect("a shim is started");
        std::thread::sleep(seconds(0.07) * step);
        // It may have done its work already.
        let _ = kill_process(Pid::from_raw(shim).unwrap(), Signal::KILL);
        running.finish();
        let gone = until(seconds(20.0), || daemon.status(&id).is_none().then_some(()));
        assert!(gone.is_some(), "step {step}: the task is still there");
        // There if the client could not delete it.
        daemon.ctr(["container", "rm", &id]);
        let ended = until(seconds(10.0), || {
            host.processes_of("caisson-vmm").is_empty().then_some(())
        });
        assert!(ended.is_some(), "step {step}: the machine lives on");
    }
    // Sockets of those that died before containerd knew them go with the next that is made.
    daemon.run_with(&["--rm"], "good", &["true"]).ok();
}

fn containers_outlive_containerd(version: Version) {
    let host = Host::claim();
    let mut daemon = Daemon::start(&host, version);
    let log = host.scratch().join("ticks");
    let uri = format!("file://{}", log.display());
    let ticks = "while :; do echo tick; sleep 0.2; done";
    daemon.detached(&["--log-uri", &uri], "lasting", &["sh", "-c", ticks]);
    daemon.detached(
        &[],
        "brief",
        &[
            "sh",
            "-c",
            "while [ ! -e /end ]; do sleep 0.1; done; exit 6",
        ],
    );
    daemon
        .ctr([
            "task",
            "exec",
            "--exec-id",
            "e",
            "brief",
            "sh",
            "-c",
            "(sleep 1; >/end) &",
        ])
        .ok();
    daemon.end(Signal::KILL);
    let before = fs::metadata(&log).unwrap().len();
    // "brief" ends while there is no containerd.
    std::thread::sleep(seconds(0.4));
    assert!(
        fs::metadata(&log).unwrap().len() > before,
        "its output goes on"
    );
    daemon.run();
    assert_eq!(daemon.status("lasting").as_deref(), Some("RUNNING"));
    daemon
        .ctr([
            "task",
            "exec",
            "--exec-id",
            "e",
            "lasting",
            "echo",
            "still here",
        ])
        .expect_stdout("still here\n");
    assert_eq!(daemon.exit_status("brief"), 6);
    daemon.ctr(["container", "rm", "brief"]).ok();
    daemon.remove("lasting");
}

fn requests_that_make_no_sense(version: Version) {
    let host = Host::claim();
    let daemon = Daemon::start(&host, version);
    daemon.detached(&[], "there", &["sleep", "1000"]);
    let fifos = daemon.fifos();
    let exec = |id, exec| {
        daemon.ctr([
            "task",
            "exec",
            "--fifo-dir",
            &fifos,
            "--exec-id",
            exec,
            id,
            "true",
        ])
    };
    exec("nobody", "e").expect_error(&["nobody", "not found"]);
    daemon
        .ctr([
            "task",
            "exec",
            "-d",
            "--fifo-dir",
            &fifos,
            "--exec-id",
            "twice",
            "there",
            "sleep",
            "1000",
        ])
        .ok();
    exec("there", "twice").expect_error(&["twice", "exists"]);
    daemon
        .ctr(["task", "kill", "--exec-id", "never", "there"])
        .expect_error(&["never"]);
    daemon
        .ctr(["task", "kill", "-s", "99", "there"])
        .expect_error(&["signal"]);
    daemon
        .ctr(["task", "checkpoint", "there"])
        .expect_error(&["checkpoint"]);
    daemon
        .run_with(&["-d"], "there", &["true"])
        .expect_error(&["exists"]);
    // A specification that cannot be: found before or while a machine boots, told, and cleaned up.
    for (id, flags, words) in [
        ("cwd", vec!["--cwd", "relative"], vec!["relative"]),
        (
            "source",
            vec!["--mount", "type=bind,src=/not/there,dst=/x,options=rbind"],
            vec!["/not/there"],
        ),
        (
            "options",
            vec!["--runtime-config-path", "/etc/other.toml"],
            vec!["ConfigPath", "/etc/other.toml"],
        ),
    ] {
        let flags = [&flags[..], &["--rm"]].concat();
        daemon.run_with(&flags, id, &["true"]).expect_error(&words);
        assert!(daemon.status(id).is_none());
        daemon.ctr(["container", "rm", id]);
    }
    daemon.remove("there");
}
