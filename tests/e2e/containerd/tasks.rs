//! A container's life with `ctr`: run, terminals, attach, exec, pause, kill, metrics, events.

use caisson_tests::{Command, Host, seconds, until};
use serde_json::Value;

use super::{
    daemon::{Daemon, Version, run_words},
    with_containerd,
};

with_containerd!(
    one: [run_to_the_end, terminals, short_lives_in_order, removed_after_every_kind_of_death],
    two: [run_to_the_end, life_and_its_events]
);

fn run_to_the_end(version: Version) {
    let host = Host::claim();
    let daemon = Daemon::start(&host, version);
    let script = "cat /etc/second; echo x >/root/x && cat /root/x; uname -r; exit 7";
    let ran = daemon
        .run_with(&["--rm"], "run", &["sh", "-c", script])
        .expect_code(7);
    let out = ran.stdout();
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines[..2], ["second layer", "x"], "{ran}");
    let host_kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_ne!(lines[2], host_kernel.trim(), "a kernel of its own");
    // ctr 1.7 forgets to tell of the end of its input when that comes before the task is made.
    let words = |words: Vec<&str>| {
        let words = daemon.words(words).into_iter();
        let words: Vec<String> = words.map(|word| word.into_string().unwrap()).collect();
        words.join(" ")
    };
    let script = format!(
        "{{ until {} | grep -q 'input.*RUNNING'; do sleep 0.1; done; printf typed; }} | {}",
        words(vec!["task", "ls"]),
        words(run_words(&["--rm"], "input", &["cat"])),
    );
    Command::new(["sh", "-c", &script])
        .run()
        .expect_stdout("typed");
    daemon
        .run_with(&["--rm"], "missing", &["/not/there"])
        .expect_error(&["/not/there"]);
}

fn terminals(version: Version) {
    let host = Host::claim();
    let daemon = Daemon::start(&host, version);
    let mut terminal = daemon.terminal(run_words(
        &["-t", "--rm"],
        "tty",
        &["sh", "-c", "stty size; read word; stty size; exit 4"],
    ));
    terminal.expect("24 80");
    terminal.resize(30, 100);
    // ctr tells of the size when it hears of the change; the shell waits for the word.
    std::thread::sleep(seconds(0.3));
    terminal.send("go\n");
    terminal.expect("30 100");
    assert_eq!(terminal.finish(), 4);

    // Attached to later, by somebody else than who started it.
    let words = run_words(
        &["-t", "-d"],
        "later",
        &["sh", "-c", "read word; echo got $word; exit 5"],
    );
    assert_eq!(daemon.terminal(words).finish(), 0);
    let mut attached = daemon.terminal(["task", "attach", "later"]);
    attached.send("hello\n");
    attached.expect("got hello");
    assert_eq!(attached.finish(), 5);
    // `attach` has removed the task.
    daemon.ctr(["container", "rm", "later"]).ok();
}

/// Names of the events that were heard of a container, in order; waits until the last is `last`.
fn heard(events: &caisson_tests::Running, id: &str, last: &str) -> Vec<(String, Value)> {
    let mut all = Vec::new();
    let seen = until(seconds(10.0), || {
        all = events
            .stdout_so_far()
            .lines()
            .filter_map(|line| {
                let (head, body) = line.split_once(" {")?;
                let body: Value = serde_json::from_str(&format!("{{{body}")).ok()?;
                let topic = head.rsplit(' ').next()?.strip_prefix("/tasks/")?.to_owned();
                (body["container_id"] == id).then_some((topic, body))
            })
            .collect();
        all.last()
            .is_some_and(|(topic, _)| topic == last)
            .then_some(())
    });
    assert!(seen.is_some(), "{last} of {id} is not told: {all:?}");
    all
}

fn topics(events: &[(String, Value)]) -> Vec<&str> {
    events.iter().map(|(topic, _)| topic.as_str()).collect()
}

fn life_and_its_events(version: Version) {
    let host = Host::claim();
    let daemon = Daemon::start(&host, version);
    let events = daemon.events();
    let fifos = daemon.fifos();
    // The host's kernel would have it; the guest's has none, and the execs are told of it, too.
    let label = ["--apparmor-profile", "cri-containerd.apparmor.d"];
    daemon.detached(&label, "life", &["sleep", "1000"]);
    assert_eq!(daemon.status("life").as_deref(), Some("RUNNING"));
    daemon
        .ctr([
            "task",
            "exec",
            "--exec-id",
            "e1",
            "life",
            "sh",
            "-c",
            "echo in exec; exit 5",
        ])
        .expect_code(5)
        .expect_in_stdout("in exec");
    let mut shell = daemon.terminal(["task", "exec", "-t", "--exec-id", "tty", "life", "sh"]);
    shell.send("tty; exit 6\n");
    shell.expect("/dev/pts/");
    assert_eq!(shell.finish(), 6);
    daemon
        .ctr(["task", "exec", "--exec-id", "no", "life", "/not/there"])
        .expect_error(&["/not/there"]);
    daemon
        .ctr([
            "task",
            "exec",
            "-d",
            "--fifo-dir",
            &fifos,
            "--exec-id",
            "e2",
            "life",
            "sleep",
            "500",
        ])
        .ok();
    let listed = daemon.ctr(["task", "ps", "life"]).ok();
    assert_eq!(listed.stdout().lines().count(), 3, "{listed}");
    let metrics = daemon.ctr(["task", "metrics", "life"]).ok();
    let of = |name: &str| {
        metrics
            .stdout()
            .lines()
            .find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok())
            .unwrap_or_else(|| panic!("no {name}\n{metrics}"))
    };
    assert_eq!(of("pids.current "), 2);
    assert!(
        of("memory.usage ") > 4096 && of("cpu.usage_usec ") > 0,
        "{metrics}"
    );
    daemon.ctr(["task", "pause", "life"]).ok();
    assert_eq!(daemon.status("life").as_deref(), Some("PAUSED"));
    daemon.ctr(["task", "resume", "life"]).ok();
    assert_eq!(daemon.status("life").as_deref(), Some("RUNNING"));
    daemon.remove("life");

    let heard = heard(&events, "life", "delete");
    let expected = "create start exec-added exec-started exit exec-added exec-started exit \
                    exec-added exec-added exec-started paused resumed exit exit delete";
    let expected: Vec<&str> = expected.split_whitespace().collect();
    assert_eq!(topics(&heard), expected);
    let exits: Vec<_> = heard
        .iter()
        .filter(|(topic, _)| topic == "exit")
        .map(|(_, body)| {
            let status = body["exit_status"].as_u64().unwrap_or(0);
            (body["id"].as_str().unwrap(), status)
        })
        .collect();
    // What runs in a container ends before it.
    assert_eq!(exits, [("e1", 5), ("tty", 6), ("e2", 137), ("life", 137)]);
}

fn short_lives_in_order(version: Version) {
    let host = Host::claim();
    let daemon = Daemon::start(&host, version);
    let events = daemon.events();
    for (id, program, status) in [("t", "true", 0), ("f", "false", 1)] {
        daemon
            .run_with(&["--rm"], id, &[program])
            .expect_code(status);
        let heard = heard(&events, id, "delete");
        assert_eq!(topics(&heard), ["create", "start", "exit", "delete"]);
        assert_eq!(
            i32::try_from(heard[2].1["exit_status"].as_u64().unwrap_or(0)).unwrap(),
            status
        );
    }
}

fn removed_after_every_kind_of_death(version: Version) {
    let host = Host::claim();
    let daemon = Daemon::start(&host, version);
    let forget = |id: &str| daemon.ctr(["container", "rm", id]).ok();
    // By itself, and as its child does by a signal (the first process is immune to its own).
    for (id, script, status) in [
        ("itself", "exit 9", 9),
        ("signal", "sh -c 'kill -ABRT $$'; exit $?", 134),
    ] {
        daemon.detached(&[], id, &["sh", "-c", script]);
        assert_eq!(daemon.exit_status(id), status);
        forget(id);
    }
    // By a signal from outside that it could have caught.
    daemon.detached(
        &[],
        "term",
        &[
            "sh",
            "-c",
            "trap 'exit 3' TERM; while :; do sleep 0.1; done",
        ],
    );
    daemon
        .ctr(["task", "rm", "term"])
        .expect_error(&["running"]);
    daemon.ctr(["task", "kill", "term"]).ok();
    daemon.wait_for_status("term", "STOPPED");
    daemon
        .ctr(["task", "kill", "term"])
        .expect_error(&["already finished"]);
    assert_eq!(daemon.exit_status("term"), 3);
    forget("term");
    // Still alive.
    daemon.detached(&[], "forced", &["sleep", "1000"]);
    daemon.ctr(["task", "rm", "-f", "forced"]);
    assert!(daemon.status("forced").is_none());
    forget("forced");
    // With its machine.
    daemon.detached(&[], "machine", &["sleep", "1000"]);
    super::daemon::kill(host.processes_of("caisson-vmm")[0]);
    assert_eq!(daemon.exit_status("machine"), 137);
    forget("machine");
}
