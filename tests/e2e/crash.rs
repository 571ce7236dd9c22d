//! Processes that are killed and guests that panic: told within seconds, and cleaned up.

use std::fs;

use caisson_tests::{Host, seconds, until};
use rustix::process::{Pid, Signal, kill_process};

fn kill_all(host: &Host, program: &str) {
    kill_at_once(host, &[program]);
}

/// Finds the processes of all `programs` before it kills the first: some end when others do.
fn kill_at_once(host: &Host, programs: &[&str]) {
    let mut pids = Vec::new();
    for program in programs {
        let running = host.processes_of(program);
        assert!(!running.is_empty(), "no {program} runs");
        pids.extend(running);
    }
    for pid in pids {
        match kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => panic!("cannot kill {pid}: {error}"),
        }
    }
}

fn start(host: &Host, name: &str, flags: &[&str]) {
    let mut words = vec!["run", "-d", "--name", name];
    words.extend(flags);
    words.extend([host.busybox(), "sleep", "1000"]);
    host.caisson(words).ok();
}

#[test]
fn a_killed_vmm_ends_its_container() {
    let host = Host::claim();
    start(&host, "one", &[]);
    kill_all(&host, "caisson-vmm");
    host.wait_for_status("one", "exited");
    assert_ne!(host.inspect("one")["State"]["ExitCode"], 0);
    host.caisson(["exec", "one", "true"])
        .expect_error(&["not running"]);
    host.caisson(["rm", "one"]).ok();
}

#[test]
fn an_attached_run_tells_that_its_vmm_died() {
    let host = Host::claim();
    let mut running = host
        .command([
            "run",
            "--rm",
            host.busybox(),
            "sh",
            "-c",
            "echo ready; sleep 1000",
        ])
        .start();
    running.wait_for_stdout("ready");
    kill_all(&host, "caisson-vmm");
    let killed = std::time::Instant::now();
    let finished = running.finish();
    assert!(
        finished.code() != 0 && killed.elapsed() < seconds(10.0),
        "{finished}"
    );
    finished.expect_error(&["vm"]);
}

#[test]
fn a_killed_shim_leaves_a_container_that_can_be_removed() {
    let host = Host::claim();
    start(&host, "one", &[]);
    kill_all(&host, "containerd-shim-caisson-v2");
    let stopped = until(seconds(10.0), || {
        let listed = host.caisson(["ps", "-q"]).ok().stdout();
        listed.is_empty().then_some(())
    });
    assert!(stopped.is_some(), "{}", host.caisson(["ps", "-a"]));
    host.caisson(["rm", "-f", "one"]).ok();
    assert!(host.processes_of("caisson-vmm").is_empty());
}

#[test]
fn all_killed_at_once_leaves_a_container_that_can_be_removed() {
    let host = Host::claim();
    let shared = host.scratch().join("shared");
    fs::create_dir(&shared).unwrap();
    start(
        &host,
        "one",
        &["-v", &format!("{}:/data", shared.display())],
    );
    kill_at_once(
        &host,
        &["containerd-shim-caisson-v2", "caisson-vmm", "caisson-fs"],
    );
    host.caisson(["rm", "-f", "one"]).ok();
}

#[test]
fn a_killed_file_server_does_not_hang_the_removal() {
    let host = Host::claim();
    let shared = host.scratch().join("shared");
    fs::create_dir(&shared).unwrap();
    start(
        &host,
        "one",
        &["-v", &format!("{}:/data", shared.display())],
    );
    kill_all(&host, "caisson-fs");
    // Whether the container ends or its volume fails, nobody waits for ever.
    let finished = host
        .command(["exec", "one", "sh", "-c", "ls /data"])
        .within(20.0)
        .run();
    assert_ne!(finished.code(), 0, "{finished}");
    host.caisson(["rm", "-f", "one"]).ok();
}

#[test]
fn a_killed_client_leaves_the_container_running() {
    let host = Host::claim();
    let mut running = host
        .command([
            "run",
            "--name",
            "one",
            host.busybox(),
            "sh",
            "-c",
            "echo ready; sleep 1000",
        ])
        .start();
    running.wait_for_stdout("ready");
    running.signal(Signal::KILL);
    running.finish().expect_code(137);
    host.caisson(["exec", "one", "echo", "alive"])
        .expect_stdout("alive\n");
    host.caisson(["rm", "-f", "one"]).ok();
}

/// A kernel that may not run out of memory panics when a container does; so does one whose first
/// process, the agent, dies.
const PANIC: &str = "mkdir /p && mount -t proc proc /p && echo 2 >/p/sys/vm/panic_on_oom &&
    x=0123456789abcdef; while :; do x=$x$x; done";

#[test]
fn a_guest_panic_is_told_with_the_end_of_its_console() {
    let host = Host::claim();
    let finished = host.sh(["--cap-add", "SYS_ADMIN", "-m", "64m"], PANIC);
    assert!(finished.code() != 0, "{finished}");
    finished.expect_error(&["panic"]);
}

#[test]
fn a_guest_panic_ends_a_detached_container() {
    let host = Host::claim();
    host.caisson([
        "run",
        "-d",
        "--name",
        "one",
        "--cap-add",
        "SYS_ADMIN",
        "-m",
        "64m",
        host.busybox(),
        "sh",
        "-c",
        PANIC,
    ])
    .ok();
    host.wait_for_status("one", "exited");
    assert_ne!(host.inspect("one")["State"]["ExitCode"], 0);
    host.caisson(["rm", "one"]).ok();
}
