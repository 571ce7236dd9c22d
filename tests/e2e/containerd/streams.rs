//! Where output goes: log URIs, and FIFOs that nobody reads.

use std::{fs, os::unix::fs::PermissionsExt};

use caisson_tests::{Host, seconds, until};

use super::{
    daemon::{Daemon, Version, run_words},
    with_containerd,
};

with_containerd!(one: [log_uris], two: [nobody_reads]);

fn log_uris(version: Version) {
    let host = Host::claim();
    let daemon = Daemon::start(&host, version);
    let program = ["sh", "-c", "echo out; echo err >&2"];
    let log = host.scratch().join("log/file");
    let uri = format!("file://{}", log.display());
    daemon.detached(&["--log-uri", &uri], "file", &program);
    daemon.remove_ended("file");
    let written = fs::read_to_string(&log).unwrap();
    let mut lines: Vec<&str> = written.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["err", "out"]);

    let logger = host.scratch().join("logger");
    let script = "#!/bin/sh\nexec 5>&-\n\
        { echo \"$CONTAINER_NAMESPACE $CONTAINER_ID $1 $2\"; cat <&3; cat <&4; } >\"${0%/*}/logged\"\n";
    fs::write(&logger, script).unwrap();
    fs::set_permissions(&logger, fs::Permissions::from_mode(0o755)).unwrap();
    let uri = format!("binary://{}?key=a+value", logger.display());
    daemon.detached(&["--log-uri", &uri], "binary", &program);
    daemon.remove_ended("binary");
    assert_eq!(
        fs::read_to_string(host.scratch().join("logged")).unwrap(),
        "default binary key a value\nout\nerr\n"
    );
    daemon
        .run_with(&["-d", "--log-uri", "ftp://x/y"], "scheme", &program)
        .expect_error(&["ftp"]);
    daemon.ctr(["container", "rm", "scheme"]).ok();
}

/// `ctr run` reads what its container writes until it is stopped; then the pipes fill up.
fn nobody_reads(version: Version) {
    let host = Host::claim();
    let daemon = Daemon::start(&host, version);
    let flood = daemon
        .command(run_words(&[], "flood", &["sh", "-c", "echo begun; yes"]))
        .start();
    let begun = until(seconds(20.0), || {
        flood.stdout_so_far().contains("begun").then_some(())
    });
    assert!(begun.is_some());
    flood.signal(rustix::process::Signal::STOP);
    std::thread::sleep(seconds(0.5));
    // It is stuck in its write, but everything else goes on: an exec, and its end.
    daemon
        .ctr(["task", "exec", "--exec-id", "e", "flood", "echo", "alive"])
        .expect_stdout("alive\n");
    daemon.ctr(["task", "kill", "-s", "KILL", "flood"]).ok();
    // Told although its output is not taken.
    assert_eq!(daemon.exit_status("flood"), 137);
    daemon.ctr(["container", "rm", "flood"]).ok();
    drop(flood);
}
