//! `check` and `version`.

use caisson_tests::{Command, Host};

/// Runs a `caisson` command where /dev/kvm is something else.
fn without_kvm(host: &Host, instead: &str, words: &str) -> caisson_tests::Finished {
    let script = format!("{instead} && exec '{}' {words}", host.program().display());
    Command::new(["unshare", "-m", "sh", "-c", &script]).run()
}

#[test]
fn a_host_that_can_run_microvms_is_told_so() {
    let host = Host::claim();
    let finished = host.caisson(["check"]).ok();
    let text = finished.stdout().to_lowercase();
    for word in ["kvm", "cmpxchg16b"] {
        assert!(text.contains(word), "{word}\n{finished}");
    }
    let finished = host.caisson(["check", "--format", "json"]).ok();
    assert!(finished.json().is_object(), "{finished}");
}

#[test]
fn a_host_without_kvm_is_told_what_to_do() {
    let host = Host::claim();
    for instead in [
        "mount --bind /dev/null /dev/kvm",
        "mkdir /tmp/dev && mount --bind /tmp/dev /dev && rmdir /tmp/dev",
    ] {
        let finished = without_kvm(&host, instead, "check");
        assert_eq!(finished.code(), 1, "{finished}");
        let text = format!("{}{}", finished.stdout(), finished.stderr());
        assert!(
            text.contains("/dev/kvm") && !text.contains("panicked"),
            "{finished}"
        );
        let finished = without_kvm(&host, instead, "check --format json");
        assert_eq!(finished.code(), 1, "{finished}");
        assert!(finished.json().is_object(), "{finished}");
    }
    let _ = std::fs::remove_dir("/tmp/dev");
}

#[test]
fn run_without_kvm_fails_clearly() {
    let host = Host::claim();
    let words = format!("run --rm {} true", host.busybox());
    without_kvm(&host, "mount --bind /dev/null /dev/kvm", &words)
        .expect_error(&["kvm"])
        .expect_code(125);
}

#[test]
fn version_says_its_version() {
    let host = Host::claim();
    host.caisson(["version"])
        .ok()
        .expect_in_stdout(env!("CARGO_PKG_VERSION"));
    let finished = host.caisson(["version", "--format", "json"]).ok();
    assert!(
        finished.stdout().contains(env!("CARGO_PKG_VERSION")) && finished.json().is_object(),
        "{finished}"
    );
}

#[test]
fn help_lists_every_verb() {
    let host = Host::claim();
    let text = host.caisson(["--help"]).ok().stdout();
    for verb in [
        "run", "ps", "logs", "exec", "stop", "kill", "wait", "rm", "inspect", "images", "load",
        "rmi", "check", "version",
    ] {
        assert!(text.contains(verb), "{verb}\n{text}");
    }
    host.caisson(["no-such-verb"])
        .expect_error(&["no-such-verb"]);
}
