//! Many at once and many in a row.

use caisson_tests::Host;

#[test]
fn twenty_runs_at_once_all_answer() {
    let host = Host::claim();
    let image = host.busybox();
    let running: Vec<_> = (0..20)
        .map(|n| {
            host.command([
                "run",
                "--rm",
                "--network",
                "none",
                "-m",
                "96m",
                image,
                "sh",
                "-c",
                &format!("echo {n}; exit {n}"),
            ])
            .within(90.0)
            .start()
        })
        .collect();
    for (n, running) in running.into_iter().enumerate() {
        let finished = running.finish().expect_code(n as i32);
        assert_eq!(finished.stdout(), format!("{n}\n"));
    }
}

#[test]
fn ten_runs_in_a_row_leave_nothing() {
    let host = Host::claim();
    for n in 0..10 {
        host.sh([], &format!("echo {n}"))
            .expect_stdout(&format!("{n}\n"));
    }
}

#[test]
fn a_dozen_detached_containers_live_together() {
    let host = Host::claim();
    let names: Vec<String> = (0..12).map(|n| format!("many-{n}")).collect();
    for name in &names {
        host.caisson([
            "run",
            "-d",
            "-m",
            "96m",
            "--name",
            name,
            host.busybox(),
            "sleep",
            "1000",
        ])
        .ok();
    }
    for name in &names {
        host.caisson(["exec", name, "true"]).ok();
    }
    let mut words = vec!["rm", "-f"];
    words.extend(names.iter().map(String::as_str));
    let finished = host.caisson(words).ok();
    assert_eq!(finished.stdout().lines().count(), 12);
}
