//! A sandbox's life on a fake machine.

use caisson_sandbox::Config;

use super::*;
use crate::tasks::tests::fake::{Bench, Manners};

/// The pod of [`Bench`].
const POD: &str = "p";

/// A bundle without a specification.
const NOWHERE: &str = "/nowhere";

fn bench() -> (Bench, Sandbox) {
    let bench = Bench::new(Manners::default());
    let sandbox = Sandbox::new(Config::default(), bench.tasks.clone());
    (bench, sandbox)
}

#[tokio::test(flavor = "current_thread", start_paused = true)]
async fn it_lives_without_containers() {
    let (bench, sandbox) = bench();
    assert!(matches!(sandbox.status(POD), Err(Error::NotFound(_))));
    assert!(matches!(sandbox.start(POD).await, Err(Error::NotFound(_))));
    assert!(matches!(
        sandbox.create("another", NOWHERE.as_ref(), None, ""),
        Err(Error::NotFound(_))
    ));
    sandbox
        .create(POD, NOWHERE.as_ref(), None, "/run/netns/a")
        .unwrap();
    assert!(matches!(
        sandbox.create(POD, NOWHERE.as_ref(), None, ""),
        Err(Error::AlreadyExists(_))
    ));
    assert!(sandbox.ping(POD).is_err(), "it is not started");
    let started = sandbox.start(POD).await.unwrap();
    assert_eq!(started.pid, 4711);
    assert!(sandbox.start(POD).await.is_err());
    sandbox.ping(POD).unwrap();
    sandbox.stats(POD).await.unwrap();

    // Containers come and go in the same machine.
    for _ in 0..2 {
        bench.tasks.create(bench.creation("c")).await.unwrap();
        bench.tasks.start("c", "").await.unwrap();
        bench.tasks.kill("c", "", 9, false).await.unwrap();
        bench.tasks.wait("c", "").await.unwrap();
        bench.tasks.delete("c", "").await.unwrap();
    }
    assert!(bench.tasks.is_held(), "Shutdown of a task does not end it");
    let status = sandbox.status(POD).unwrap();
    assert_eq!((status.started, status.exit), (Some(started), None));

    // What runs at its end is told, and can be deleted after it.
    bench.tasks.create(bench.creation("d")).await.unwrap();
    bench.tasks.start("d", "").await.unwrap();
    for _ in 0..2 {
        sandbox.stop(POD, Duration::ZERO).await.unwrap();
    }
    assert_eq!(sandbox.wait(POD).await.unwrap().status, 0);
    assert_eq!(bench.tasks.wait("d", "").await.unwrap().status, 137);
    bench.tasks.delete("d", "").await.unwrap();
    assert!(sandbox.ping(POD).is_err());
    assert!(bench.tasks.create(bench.creation("e")).await.is_err());
    bench.tasks.clone().shut_down().await;
    bench.tasks.ended.notified().await;
}

#[tokio::test(flavor = "current_thread", start_paused = true)]
async fn a_machine_that_dies_is_told() {
    let (bench, sandbox) = bench();
    sandbox.create(POD, NOWHERE.as_ref(), None, "").unwrap();
    sandbox.start(POD).await.unwrap();
    let pod = bench.pod();
    let (end, ()) = tokio::join!(sandbox.wait(POD), pod.die());
    assert_eq!(end.unwrap().status, 137);
    assert!(sandbox.status(POD).unwrap().exit.is_some());
    assert!(bench.tasks.create(bench.creation("c")).await.is_err());
}

#[tokio::test(flavor = "current_thread", start_paused = true)]
async fn one_that_never_started_can_be_stopped() {
    let (_bench, sandbox) = bench();
    sandbox.create(POD, NOWHERE.as_ref(), None, "").unwrap();
    sandbox.stop(POD, Duration::ZERO).await.unwrap();
    assert_eq!(sandbox.wait(POD).await.unwrap().status, 0);
    assert!(sandbox.start(POD).await.is_err());
}

#[tokio::test(flavor = "current_thread", start_paused = true)]
async fn a_specification_in_the_bundle_counts_where_there_are_no_options() {
    let (_bench, sandbox) = bench();
    let bundle = tempfile::tempdir().unwrap();
    let write = |text: &str| std::fs::write(bundle.path().join("config.json"), text).unwrap();
    write("{");
    assert!(sandbox.create(POD, bundle.path(), None, "").is_err());
    write(r#"{"ociVersion":"1.2.0","linux":{}}"#);
    let error = sandbox.create(POD, bundle.path(), None, "").unwrap_err();
    assert!(error.to_string().contains("host's network"), "{error}");
    write(r#"{"ociVersion":"1.2.0","linux":{"namespaces":[{"type":"network"}]}}"#);
    sandbox.create(POD, bundle.path(), None, "").unwrap();
    sandbox.start(POD).await.unwrap();
}
