//! `ps`, `stop`, `kill`, `wait`, `rm`, `inspect`: a container's life from outside.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, time::Duration};

use caisson_tests::{Host, seconds};
use serde_json::Value;

/// Where containers are.
const CONTAINERS: &str = "/var/lib/caisson/containers";

/// A detached container named `name` that runs a shell script; gives its id.
fn detached(host: &Host, name: &str, script: &str) -> String {
    host.caisson([
        "run",
        "-d",
        "--name",
        name,
        host.busybox(),
        "sh",
        "-c",
        script,
    ])
    .ok()
    .line()
}

#[test]
fn a_detached_container_is_listed_by_id_name_and_state() {
    let host = Host::claim();
    // Its input stays open: nobody is there to end it.
    let words = ["run", "-d", "-i", "--name", "web", host.busybox(), "cat"];
    let id = host.caisson(words).ok().line();
    assert!(
        id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit()),
        "{id}"
    );
    let listed = host.caisson(["ps"]).ok().stdout();
    let mut lines = listed.lines();
    let head = lines.next().unwrap();
    assert!(
        head.starts_with("CONTAINER ID")
            && head.contains("IMAGE")
            && head.contains("STATUS")
            && head.ends_with("NAMES"),
        "{listed}"
    );
    let line = lines.next().unwrap();
    assert!(
        line.starts_with(&id[..12]) && line.contains(" Up ") && line.ends_with("web"),
        "{listed}"
    );
    host.caisson(["ps", "-q"])
        .expect_stdout(&format!("{}\n", &id[..12]));
    host.caisson(["exec", "web", "true"]).ok();
    host.caisson(["stop", "-t", "0", "web"])
        .expect_stdout("web\n");
    assert_eq!(host.caisson(["ps", "-q"]).ok().stdout(), "");
    host.caisson(["ps", "-a"])
        .ok()
        .expect_in_stdout("Exited (137)");
    host.caisson(["rm", &id[..12]])
        .expect_stdout(&format!("{}\n", &id[..12]));
    assert_eq!(host.caisson(["ps", "-aq"]).ok().stdout(), "");
}

#[test]
fn ps_speaks_json() {
    let host = Host::claim();
    let id = detached(&host, "web", "exec sleep 1000");
    let listed = host.caisson(["ps", "--format", "json"]).ok();
    // Docker's form: one object a line.
    let lines: Vec<Value> = listed
        .stdout()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}\n{listed}")))
        .collect();
    assert_eq!(lines.len(), 1, "{listed}");
    assert_eq!(lines[0]["Names"], "web");
    assert_eq!(lines[0]["State"], "running");
    assert!(id.starts_with(lines[0]["ID"].as_str().unwrap()), "{listed}");
    host.caisson(["rm", "-f", "web"]).ok();
}

#[test]
fn stop_asks_first_and_the_exit_code_is_kept() {
    let host = Host::claim();
    detached(
        &host,
        "polite",
        "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.2; done",
    );
    ready(&host, "polite");
    host.caisson(["stop", "-t", "600", "polite"])
        .expect_stdout("polite\n");
    host.caisson(["wait", "polite"]).expect_stdout("3\n");
    host.caisson(["logs", "polite"])
        .expect_stdout("ready\nbye\n");
    host.caisson(["rm", "polite"]).ok();
}

#[test]
fn stop_kills_what_does_not_listen() {
    let host = Host::claim();
    detached(
        &host,
        "deaf",
        "trap '' TERM; echo ready; while :; do sleep 0.2; done",
    );
    ready(&host, "deaf");
    let finished = host.caisson(["stop", "-t", "1", "deaf"]).ok();
    assert!(finished.elapsed >= Duration::from_secs(1), "{finished}");
    assert!(finished.elapsed < seconds(10.0), "{finished}");
    host.caisson(["wait", "deaf"]).expect_stdout("137\n");
    host.caisson(["rm", "deaf"]).ok();
}

#[test]
fn kill_sends_the_signal_named() {
    let host = Host::claim();
    detached(
        &host,
        "trap",
        "trap 'echo usr1' USR1; trap 'exit 12' INT; echo ready; while :; do sleep 0.2; done",
    );
    ready(&host, "trap");
    host.caisson(["kill", "-s", "USR1", "trap"])
        .expect_stdout("trap\n");
    let seen = caisson_tests::until(seconds(10.0), || {
        host.caisson(["logs", "trap"])
            .stdout()
            .contains("usr1")
            .then_some(())
    });
    assert!(seen.is_some());
    host.caisson(["kill", "-s", "SIGINT", "trap"]).ok();
    host.caisson(["wait", "trap"]).expect_stdout("12\n");
    host.caisson(["kill", "trap"])
        .expect_error(&["not running"])
        .expect_code(1);
    host.caisson(["rm", "trap"]).ok();
}

#[test]
fn kill_is_final_without_a_signal_and_refuses_unknown_ones() {
    let host = Host::claim();
    detached(&host, "victim", "exec sleep 1000");
    host.caisson(["kill", "-s", "NOSUCH", "victim"])
        .expect_error(&["nosuch"])
        .expect_code(1);
    host.caisson(["kill", "victim"]).ok();
    host.caisson(["wait", "victim"]).expect_stdout("137\n");
    host.caisson(["rm", "victim"]).ok();
}

#[test]
fn wait_blocks_until_the_end() {
    let host = Host::claim();
    detached(&host, "slow", "sleep 3; exit 8");
    let finished = host.caisson(["wait", "slow"]).expect_stdout("8\n");
    assert!(finished.elapsed >= Duration::from_millis(500), "{finished}");
    host.caisson(["wait", "slow"]).expect_stdout("8\n");
    host.caisson(["rm", "slow"]).ok();
}

#[test]
fn rm_spares_the_running_unless_forced() {
    let host = Host::claim();
    detached(&host, "busy", "exec sleep 1000");
    host.caisson(["rm", "busy"])
        .expect_error(&["running"])
        .expect_code(1);
    host.caisson(["exec", "busy", "true"]).ok();
    host.caisson(["rm", "-f", "busy"]).expect_stdout("busy\n");
    host.caisson(["inspect", "busy"])
        .expect_error(&["no such", "busy"])
        .expect_code(1);
    // What is to be gone is gone.
    let again = host.caisson(["rm", "-f", "busy"]).expect_stdout("");
    assert!(
        again.stderr().contains("No such container: busy"),
        "{again}"
    );
}

#[test]
fn a_damaged_container_is_told_and_can_be_removed() {
    let host = Host::claim();
    let id = detached(&host, "whole", "exec sleep 1000");
    let directory = Path::new(CONTAINERS).join(&id);
    let mode = fs::metadata(CONTAINERS).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    fs::write(directory.join("container.json"), "").unwrap();
    assert_eq!(host.caisson(["ps", "-aq"]).ok().stdout(), "");
    let short = &id[..12];
    host.caisson(["rm", short])
        .expect_error(&["damaged", &id, "rm -f"]);
    // It may be the one that uses them.
    host.caisson(["volume", "prune", "-a", "-f"])
        .expect_error(&["damaged"]);
    host.caisson(["rm", "-f", short]).ok();
    assert!(!directory.exists());
}

#[test]
fn unknown_containers_are_named_in_the_error() {
    let host = Host::claim();
    for words in [
        vec!["stop", "nobody"],
        vec!["kill", "nobody"],
        vec!["wait", "nobody"],
        vec!["rm", "nobody"],
        vec!["logs", "nobody"],
        vec!["inspect", "nobody"],
    ] {
        let finished = host.caisson(&words).expect_error(&["no such", "nobody"]);
        assert_eq!(finished.code(), 1, "{finished}");
    }
}

#[test]
fn inspect_tells_what_was_asked_for_and_what_became_of_it() {
    let host = Host::claim();
    let id = host
        .caisson([
            "run",
            "-d",
            "--name",
            "seen",
            "--hostname",
            "box",
            "-e",
            "A=1",
            "-w",
            "/tmp",
            "-u",
            "app",
            host.busybox(),
            "sleep",
            "1000",
        ])
        .ok()
        .line();
    let seen = host.inspect("seen");
    assert_eq!(seen["Id"], id.as_str());
    assert_eq!(
        seen["Name"].as_str().unwrap().trim_start_matches('/'),
        "seen"
    );
    assert_eq!(seen["State"]["Status"], "running");
    assert_eq!(seen["State"]["Running"], true);
    assert!(seen["State"]["Pid"].as_u64().unwrap() > 0);
    let config = &seen["Config"];
    assert_eq!(config["Hostname"], "box");
    assert_eq!(config["User"], "app");
    assert_eq!(config["WorkingDir"], "/tmp");
    assert_eq!(config["Image"], host.busybox());
    assert!(
        config["Env"]
            .as_array()
            .unwrap()
            .contains(&Value::from("A=1"))
    );
    host.caisson(["kill", "seen"]).ok();
    host.caisson(["wait", "seen"]).expect_stdout("137\n");
    let seen = host.inspect("seen");
    assert_eq!(seen["State"]["Status"], "exited");
    assert_eq!(seen["State"]["Running"], false);
    assert_eq!(seen["State"]["ExitCode"], 137);
    host.caisson(["rm", "seen"]).ok();
}

#[test]
fn an_exited_container_has_no_processes() {
    let host = Host::claim();
    host.caisson(["run", "--name", "done", host.busybox(), "true"])
        .ok();
    let left = caisson_tests::until(seconds(5.0), || {
        host.processes_of("caisson-vmm").is_empty().then_some(())
    });
    assert!(left.is_some(), "a VMM runs though its container has exited");
    host.caisson(["rm", "done"]).ok();
}

fn ready(host: &Host, name: &str) {
    let seen = caisson_tests::until(seconds(20.0), || {
        host.caisson(["logs", name])
            .stdout()
            .contains("ready")
            .then_some(())
    });
    assert!(seen.is_some(), "{name} did not get ready");
}
