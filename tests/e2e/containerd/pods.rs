//! Several containers in one microVM, by the annotations of CRI, and many pods at once.

use caisson_tests::{Host, seconds, until};

use super::{
    daemon::{Daemon, Version, run_words},
    with_containerd,
};

with_containerd!(two: [one_shim_for_a_pod, many_at_once]);

fn one_shim_for_a_pod(version: Version) {
    let host = Host::claim();
    let daemon = Daemon::start(&host, version);
    let kind = |kind| format!("io.kubernetes.cri.container-type={kind}");
    let (sandbox, container) = (kind("sandbox"), kind("container"));
    let pod = [
        "--annotation",
        "io.kubernetes.cri.sandbox-id=pod",
        "--annotation",
    ];
    let flags = |kind| [&pod[..], &[kind]].concat();
    daemon.detached(&flags(&sandbox), "pod", &["sleep", "1000"]);
    // The second comes when the pod's only other container but the first has gone.
    for id in ["first", "second"] {
        daemon.detached(&flags(&container), id, &["sleep", "1000"]);
        assert_eq!(daemon.status(id).as_deref(), Some("RUNNING"));
        assert_eq!(host.processes_of("containerd-shim-caisson-v2").len(), 1);
        assert_eq!(host.processes_of("caisson-vmm").len(), 1);
        daemon.remove(id);
        assert_eq!(daemon.status("pod").as_deref(), Some("RUNNING"));
    }
    // Two at a time, side by side.
    for id in ["left", "right"] {
        daemon.detached(&flags(&container), id, &["sleep", "1000"]);
    }
    daemon.remove("left");
    assert_eq!(daemon.status("right").as_deref(), Some("RUNNING"));
    // The sandbox container's end is not the others'.
    daemon.remove("right");
    daemon.remove("pod");
    let ended = until(seconds(10.0), || {
        daemon.shims("pod").is_empty().then_some(())
    });
    assert!(ended.is_some(), "the pod's shim lives on");
}

/// As many as the testbed's 4 GiB bear, or `CAISSON_SOAK=PODSxROUNDS` (`make soak`); every round
/// ends with nothing left of it.
fn many_at_once(version: Version) {
    let (pods, rounds) = match std::env::var("CAISSON_SOAK") {
        Ok(text) => text
            .split_once('x')
            .and_then(|(pods, rounds)| Some((pods.parse().ok()?, rounds.parse().ok()?)))
            .unwrap_or_else(|| panic!("CAISSON_SOAK={text:?} is not PODSxROUNDS")),
        Err(_) => (3u32, 2u32),
    };
    let host = Host::claim();
    let daemon = Daemon::start(&host, version);
    let script = ["sh", "-c", "echo hello; exit 3"];
    let mut after_first = None;
    for round in 0..rounds {
        let ids: Vec<String> = (0..pods).map(|pod| format!("many{round}-{pod}")).collect();
        let running: Vec<_> = ids
            .iter()
            .map(|id| {
                daemon
                    .command(run_words(&["--rm"], id, &script))
                    .within(60.0 + 2.0 * f64::from(pods))
                    .start()
            })
            .collect();
        for one in running {
            let finished = one.finish().expect_code(3);
            assert_eq!(finished.stdout(), "hello\n");
        }
        assert_eq!(daemon.ctr(["task", "ls", "-q"]).ok().stdout(), "");
        for program in ["caisson-vmm", "caisson-fs", "containerd-shim-caisson-v2"] {
            let ended = until(seconds(10.0), || {
                host.processes_of(program).is_empty().then_some(())
            });
            assert!(ended.is_some(), "round {round}: {program} lives on");
        }
        // The first round opens what containerd keeps; a pod that left one would be seen `pods` times.
        let most = *after_first.get_or_insert_with(|| daemon.descriptors()) + pods as usize;
        let closed = until(seconds(10.0), || {
            (daemon.descriptors() < most).then_some(())
        });
        assert!(
            closed.is_some(),
            "round {round}: containerd has {} descriptors",
            daemon.descriptors()
        );
    }
}
