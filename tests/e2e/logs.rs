//! `caisson logs`.

use caisson_tests::Host;

#[test]
fn streams_are_kept_apart_and_stay_after_the_end() {
    let host = Host::claim();
    host.caisson([
        "run",
        "-d",
        "--name",
        "talk",
        host.busybox(),
        "sh",
        "-c",
        "echo out; echo err >&2; printf last",
    ])
    .ok();
    host.caisson(["wait", "talk"]).expect_stdout("0\n");
    let finished = host.caisson(["logs", "talk"]).ok();
    assert_eq!(finished.stdout(), "out\nlast");
    assert_eq!(finished.stderr(), "err\n");
    host.caisson(["rm", "talk"]).ok();
}

#[test]
fn follow_ends_with_the_container_and_misses_nothing() {
    let host = Host::claim();
    host.caisson([
        "run",
        "-d",
        "--name",
        "talk",
        host.busybox(),
        "sh",
        "-c",
        "n=0; while [ $n -lt 5 ]; do n=$((n+1)); echo line $n; sleep 0.5; done",
    ])
    .ok();
    host.caisson(["logs", "-f", "talk"])
        .expect_stdout("line 1\nline 2\nline 3\nline 4\nline 5\n");
    host.caisson(["rm", "talk"]).ok();
}

#[test]
fn an_attached_container_is_logged_too() {
    let host = Host::claim();
    host.caisson(["run", "--name", "talk", host.busybox(), "echo", "seen"])
        .expect_stdout("seen\n");
    host.caisson(["logs", "talk"]).expect_stdout("seen\n");
    host.caisson(["rm", "talk"]).ok();
}

#[test]
fn large_output_is_whole() {
    let host = Host::claim();
    host.caisson([
        "run",
        "-d",
        "--name",
        "big",
        host.busybox(),
        "sh",
        "-c",
        "yes 0123456789abcdef0123456789abcde | head -n 100000",
    ])
    .ok();
    host.caisson(["wait", "big"]).expect_stdout("0\n");
    let finished = host.caisson(["logs", "big"]).ok();
    assert_eq!(finished.stdout_bytes().len(), 3_200_000);
    host.caisson(["rm", "big"]).ok();
}
