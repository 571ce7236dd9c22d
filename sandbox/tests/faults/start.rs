//! Faults while a sandbox starts, and while it runs.

use std::time::{Duration, Instant};

use caisson_sandbox::{
    AgentErrorKind, ContainerSpec, Error, Event, ExitReason, RootfsSource, Stdio, Upper,
};
use libtest_mimic::Trial;

use crate::{host::Host, trial};

/// Longest for what needs no deadline to be noticed.
const SOON: Duration = Duration::from_secs(5);

pub fn trials() -> Vec<Trial> {
    vec![
        trial("a_sandbox_starts_and_stops", starts_and_stops),
        trial("a_vmm_that_exits", || async {
            let error = Host::new("exits").fails_within(SOON).await;
            assert!(error.to_string().contains("no such luck"), "{error}");
            assert!(matches!(error, Error::Gone(_)), "{error:?}");
        }),
        trial("a_vmm_that_dies_at_boot", || async {
            for behaviour in ["dies-at-boot", "killed-at-boot"] {
                let error = Host::new(behaviour).fails_within(SOON).await;
                assert!(matches!(error, Error::Gone(_)), "{error:?}");
            }
        }),
        trial("a_vmm_that_never_answers", || async {
            let error = Host::new("silent").fails_within(SOON).await;
            assert!(
                matches!(error, Error::Vmm { what: "boot", .. }),
                "{error:?}"
            );
        }),
        trial("a_vmm_that_refuses", || async {
            let error = Host::new("refuses").fails_within(SOON).await;
            assert!(matches!(error, Error::Vmm { .. }), "{error:?}");
            assert!(error.to_string().contains("not with me"), "{error}");
        }),
        trial("a_vmm_that_talks_nonsense", || async {
            let error = Host::new("garbage").fails_within(SOON).await;
            assert!(matches!(error, Error::Gone(_)), "{error:?}");
        }),
        trial("a_guest_that_never_answers", || async {
            for behaviour in ["guest-deaf", "guest-refuses", "guest-endless"] {
                let error = Host::new(behaviour).fails_within(SOON).await;
                assert!(
                    matches!(error, Error::Late { .. }),
                    "{behaviour}: {error:?}"
                );
            }
        }),
        trial("an_agent_that_talks_nonsense", || async {
            let error = Host::new("agent-garbage").fails_within(SOON).await;
            assert!(matches!(error, Error::Late { .. }), "{error:?}");
        }),
        trial("an_agent_of_another_version", || async {
            let error = Host::new("agent-older").fails_within(SOON).await;
            let kind = AgentErrorKind::InvalidArgument;
            assert!(
                matches!(error, Error::Agent { kind: k, .. } if k == kind),
                "{error:?}"
            );
        }),
        trial("a_vm_that_dies_while_it_is_configured", || async {
            let error = Host::new("dies-at-configure").fails_within(SOON).await;
            assert!(matches!(error, Error::Gone(_)), "{error:?}");
        }),
        trial("an_agent_that_hangs", || async {
            let error = Host::new("configure-hangs").fails_within(2 * SOON).await;
            assert!(matches!(error, Error::Late { .. }), "{error:?}");
        }),
        trial("an_agent_that_floods_the_error", || async {
            let error = Host::new("configure-refused").fails_within(SOON).await;
            let message = error.to_string();
            assert!(matches!(error, Error::Agent { .. }), "{error:?}");
            assert!(message.len() < 4096 && !message.contains(['\x1b', '\n']));
        }),
        trial("what_is_missing_is_named", missing_files),
        trial("an_id_that_exists", twice),
        trial("a_vm_that_dies_tells_its_owner", dies_running),
        trial("an_agent_without_events", without_events),
        trial("containers_that_cannot_be_made", containers),
    ]
}

async fn starts_and_stops() {
    let host = Host::new("ok");
    let (sandbox, mut events) = host.start().await.unwrap();
    assert_eq!(host.processes(), [sandbox.vmm_pid()]);
    sandbox.stop(Duration::ZERO).await.unwrap();
    let Some(Event::Gone(gone)) = events.recv().await else {
        panic!("no last event");
    };
    assert_eq!(gone.reason, ExitReason::Stopped);
    sandbox.stop(Duration::ZERO).await.unwrap();
    host.assert_empty();
}

async fn missing_files() {
    for name in ["vmlinux", "guest.erofs", "vmm-ok"] {
        let host = Host::new("ok");
        std::fs::remove_file(host.path(name)).unwrap();
        let error = host.fails_within(SOON).await;
        assert!(matches!(error, Error::Asset { .. }), "{error:?}");
        assert!(error.to_string().contains(name), "{error}");
    }
    let mut host = Host::new("ok");
    host.config.kvm = host.path("kvm");
    let error = host.fails_within(SOON).await;
    assert!(matches!(error, Error::Kvm { .. }), "{error:?}");
    assert!(error.to_string().contains("/kvm"), "{error}");
}

async fn twice() {
    let host = Host::new("ok");
    let (sandbox, _events) = host.start().await.unwrap();
    let error = host.start().await.err().unwrap();
    assert!(error.to_string().contains("exists already"), "{error}");
    // The first one has lost nothing by it.
    sandbox.describe().await.unwrap();
    sandbox.stop(Duration::ZERO).await.unwrap();
    host.assert_empty();
}

pub fn container(id: &str, spec: &str) -> ContainerSpec {
    ContainerSpec {
        id: id.to_owned(),
        spec_json: spec.as_bytes().to_vec(),
        rootfs: RootfsSource::Layers {
            erofs: vec!["/dev/null".into()],
            upper: Upper::ReadOnly,
        },
        stdio: Stdio::default(),
        pod_files: false,
    }
}

async fn dies_running() {
    let host = Host::new("dies-at-create");
    let (sandbox, mut events) = host.start().await.unwrap();
    let begin = Instant::now();
    let error = sandbox
        .create_container(container("a", "{\"ociVersion\":\"1.2.0\"}"))
        .await;
    assert!(matches!(error, Err(Error::Gone(_))), "{error:?}");
    assert!(matches!(events.recv().await, Some(Event::Gone(_))));
    assert!(begin.elapsed() < SOON);
    assert!(sandbox.gone().is_some());
    sandbox.stop(Duration::from_secs(10)).await.unwrap();
    assert!(begin.elapsed() < SOON, "a dead VM was given time to end");
    host.assert_empty();
}

async fn without_events() {
    let host = Host::new("events-refused");
    let (sandbox, mut events) = host.start().await.unwrap();
    let event = tokio::time::timeout(SOON, events.recv()).await.unwrap();
    assert!(matches!(event, Some(Event::Gone(_))), "{event:?}");
    sandbox.stop(Duration::ZERO).await.unwrap();
    host.assert_empty();
}

async fn containers() {
    let spec = "{\"ociVersion\":\"1.2.0\"}";
    for (behaviour, word, deleted) in [
        ("disk-elsewhere", "named a disk", false),
        ("short-token", "malformed token", true),
        ("create-refused", "not such a one", true),
        ("create-twice", "there is one", false),
        ("create-late", "did not create the container", true),
    ] {
        let host = Host::new(behaviour);
        let (sandbox, _events) = host.start().await.unwrap();
        let error = sandbox
            .create_container(container("a", spec))
            .await
            .unwrap_err();
        assert!(error.to_string().contains(word), "{behaviour}: {error}");
        // What the guest may have of it goes before its disk does.
        let mut requests = host.requests();
        requests.retain(|line| line.starts_with("detach") || line.starts_with("delete"));
        let expected = ["delete a", "detach 6"];
        let expected = &expected[usize::from(!deleted)..];
        assert_eq!(requests, expected, "{behaviour}");
        sandbox.stop(Duration::ZERO).await.unwrap();
        host.assert_empty();
    }
    let host = Host::new("ok");
    let (sandbox, _events) = host.start().await.unwrap();
    let error = sandbox
        .create_container(container("a", "{"))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Invalid(_)), "{error:?}");
    sandbox.stop(Duration::ZERO).await.unwrap();
}
