//! What containerd hears of a pod, one case at a time.

pub mod fake;
mod stories;

use std::{sync::atomic::Ordering, time::Duration};

use caisson_sandbox::{Error as SandboxError, Event};
use containerd_shim_protos::{
    events::task::{TaskExit, TaskOOM},
    protobuf::Message,
};
use tokio::time::sleep;

use super::*;
use fake::{Bench, Manners, name_of};

#[tokio::test(flavor = "current_thread", start_paused = true)]
async fn one_that_ends_at_once_has_started_before() {
    let mut bench = Bench::new(Manners {
        ends_at_once: true,
        start_ms: 500,
        ..Default::default()
    });
    bench.tasks.create(bench.creation("c")).await.unwrap();
    assert_eq!(bench.tasks.start("c", "").await.unwrap(), 4711);
    assert_eq!(bench.tasks.wait("c", "").await.unwrap().status, 3);
    bench.tasks.delete("c", "").await.unwrap();
    let expected = [topic::CREATE, topic::START, topic::EXIT, topic::DELETE];
    assert_eq!(bench.topics(), expected);
}

#[tokio::test(flavor = "current_thread", start_paused = true)]
async fn one_that_cannot_be_started_has_neither_started_nor_exited() {
    let mut bench = Bench::new(Manners {
        start_fails: true,
        ..Default::default()
    });
    bench.tasks.create(bench.creation("c")).await.unwrap();
    assert!(bench.tasks.start("c", "").await.is_err());
    assert_eq!(bench.tasks.wait("c", "").await.unwrap().status, 127);
    assert_eq!(bench.tasks.delete("c", "").await.unwrap().1.status, 127);
    assert_eq!(bench.topics(), [topic::CREATE, topic::DELETE]);
}

#[tokio::test(flavor = "current_thread", start_paused = true)]
async fn execs_end_before_their_container() {
    let mut bench = Bench::new(Manners {
        drain_ms: 300,
        ..Default::default()
    });
    bench.tasks.create(bench.creation("c")).await.unwrap();
    bench.tasks.start("c", "").await.unwrap();
    bench.exec("c", "e").await.unwrap();
    assert!(matches!(
        bench.exec("c", "e").await,
        Err(Error::AlreadyExists(_))
    ));
    assert!(matches!(bench.exec("c", "").await, Err(Error::Invalid(_))));
    bench.tasks.start("c", "e").await.unwrap();
    bench.pod().end(&name_of("c", ""), 0).await;
    bench.tasks.wait("c", "").await.unwrap();
    let events = bench.sent.take();
    let exits: Vec<String> = events
        .iter()
        .filter(|event| event.topic == topic::EXIT)
        .map(|event| TaskExit::parse_from_bytes(&event.event.value).unwrap().id)
        .collect();
    assert_eq!(exits, ["e", "c"]);
}

#[tokio::test(flavor = "current_thread", start_paused = true)]
async fn execs_whose_end_the_guest_hides_end_with_their_container() {
    let mut bench = Bench::new(Manners {
        hides_execs: true,
        ..Default::default()
    });
    bench.tasks.create(bench.creation("c")).await.unwrap();
    bench.tasks.start("c", "").await.unwrap();
    bench.exec("c", "e").await.unwrap();
    bench.exec("c", "never-started").await.unwrap();
    bench.tasks.start("c", "e").await.unwrap();
    bench.pod().end(&name_of("c", ""), 0).await;
    bench.tasks.wait("c", "").await.unwrap();
    bench.topics();
    let waiting = tokio::spawn({
        let tasks = bench.tasks.clone();
        async move { tasks.wait("c", "e").await }
    });
    tokio::task::yield_now().await;
    bench.tasks.delete("c", "").await.unwrap();
    assert_eq!(bench.topics(), [topic::EXIT, topic::DELETE]);
    assert_eq!(waiting.await.unwrap().unwrap().status, KILLED);
    assert!(bench.tasks.is_empty());
}

#[tokio::test(flavor = "current_thread", start_paused = true)]
async fn the_machines_end_is_everybodys() {
    let mut bench = Bench::new(Manners::default());
    for id in ["a", "b", "never-started"] {
        bench.tasks.create(bench.creation(id)).await.unwrap();
    }
    bench.tasks.start("a", "").await.unwrap();
    bench.tasks.start("b", "").await.unwrap();
    bench.pod().die().await;
    for id in ["a", "b", "never-started"] {
        assert_eq!(bench.tasks.wait(id, "").await.unwrap().status, KILLED);
        bench.tasks.delete(id, "").await.unwrap();
    }
    let topics = bench.topics();
    assert_eq!(
        topics.iter().filter(|topic| **topic == topic::EXIT).count(),
        3
    );
    assert!(bench.bundle.path().join("vm-exit.json").exists());
    let late = bench.tasks.create(bench.creation("late")).await;
    assert!(matches!(late, Err(Error::Sandbox(SandboxError::Gone(_)))));
}

#[tokio::test(flavor = "current_thread", start_paused = true)]
async fn a_guest_that_cries_for_memory_is_heard_once_in_a_while() {
    let mut bench = Bench::new(Manners::default());
    bench.tasks.create(bench.creation("c")).await.unwrap();
    bench.topics();
    for _ in 0..2 {
        for container in ["c", "stranger", "c", "c"] {
            let container = container.to_owned();
            let event = Event::OutOfMemory { container };
            bench.pod().events.send(event).await.unwrap();
        }
        sleep(Duration::from_secs(2)).await;
    }
    let told = bench.sent.take();
    assert!(told.iter().all(|event| event.topic == topic::OOM));
    let of: Vec<String> = told
        .iter()
        .map(|event| TaskOOM::parse_from_bytes(&event.event.value).unwrap())
        .map(|event| event.container_id)
        .collect();
    assert_eq!(of, ["c", "c"]);
}

#[tokio::test(flavor = "current_thread", start_paused = true)]
async fn a_guest_that_does_not_end_a_container_is_ended() {
    let mut bench = Bench::new(Manners {
        ignores_signals: true,
        ..Default::default()
    });
    for id in ["a", "b"] {
        bench.tasks.create(bench.creation(id)).await.unwrap();
        bench.tasks.start(id, "").await.unwrap();
    }
    bench.exec("a", "e").await.unwrap();
    // Neither is what SIGKILL is.
    bench.tasks.kill("a", "", 15, false).await.unwrap();
    bench.tasks.kill("a", "e", 9, false).await.unwrap();
    sleep(Duration::from_secs(1000)).await;
    assert!(bench.pod().gone().is_none());
    for _ in 0..2 {
        bench.tasks.kill("a", "", 9, true).await.unwrap();
    }
    for id in ["a", "b"] {
        assert_eq!(bench.tasks.wait(id, "").await.unwrap().status, KILLED);
        bench.tasks.delete(id, "").await.unwrap();
    }
    let topics = bench.topics();
    let exits = topics.iter().filter(|topic| **topic == topic::EXIT);
    assert_eq!(exits.count(), 2);
}

#[tokio::test(flavor = "current_thread", start_paused = true)]
async fn a_guest_that_does_not_delete_a_container_is_ended() {
    let bench = Bench::new(Manners {
        ends_at_once: true,
        keeps_containers: true,
        ..Default::default()
    });
    bench.tasks.create(bench.creation("a")).await.unwrap();
    bench.tasks.start("a", "").await.unwrap();
    bench.tasks.wait("a", "").await.unwrap();
    // Those who manage containers try again.
    for _ in 0..2 {
        bench.tasks.delete("a", "").await.unwrap_err();
        assert!(bench.pod().gone().is_none());
    }
    sleep(Duration::from_secs(100)).await;
    bench.tasks.delete("a", "").await.unwrap_err();
    assert!(bench.pod().gone().is_some());
    bench.tasks.delete("a", "").await.unwrap();
}

#[tokio::test(flavor = "current_thread", start_paused = true)]
async fn a_container_that_is_killed_costs_no_other() {
    let bench = Bench::new(Manners::default());
    for id in ["created", "started", "other"] {
        bench.tasks.create(bench.creation(id)).await.unwrap();
    }
    bench.tasks.start("started", "").await.unwrap();
    for id in ["created", "started"] {
        bench.tasks.kill(id, "", 9, false).await.unwrap();
        assert_eq!(bench.tasks.wait(id, "").await.unwrap().status, KILLED);
    }
    bench.tasks.delete("started", "").await.unwrap();
    // One that is deleted and comes again is another.
    bench.tasks.create(bench.creation("started")).await.unwrap();
    sleep(Duration::from_secs(1000)).await;
    assert!(bench.pod().gone().is_none());
}

#[tokio::test(flavor = "current_thread", start_paused = true)]
async fn a_boot_is_given_up_when_the_shim_shall_end() {
    let bench = Bench::new(Manners {
        boot_ms: 60_000,
        ..Default::default()
    });
    let start = tokio::time::Instant::now();
    let creation = bench.creation("c");
    let (created, ()) = tokio::join!(bench.tasks.create(creation), async {
        sleep(Duration::from_millis(100)).await;
        bench.tasks.stop().await;
    });
    assert!(matches!(created, Err(Error::Stopping)));
    assert!(start.elapsed() < Duration::from_secs(1));
    assert!(bench.pods.cleaned.load(Ordering::Relaxed));
    assert!(bench.tasks.is_empty());
    let again = bench.tasks.create(bench.creation("c")).await;
    assert!(matches!(again, Err(Error::Stopping)));
}

#[tokio::test(flavor = "current_thread", start_paused = true)]
async fn of_two_at_once_one_wins() {
    let mut bench = Bench::new(Manners {
        boot_ms: 5,
        create_ms: 5,
        ..Default::default()
    });
    let (one, two) = tokio::join!(
        bench.tasks.create(bench.creation("c")),
        bench.tasks.create(bench.creation("c"))
    );
    assert!(one.is_ok() != two.is_ok());
    bench.tasks.create(bench.creation("d")).await.unwrap();
    assert_eq!(bench.pods.boots.load(Ordering::Relaxed), 1);
    let (one, two) = tokio::join!(bench.tasks.start("c", ""), bench.tasks.start("c", ""));
    assert!(one.is_ok() != two.is_ok());
    bench.tasks.kill("c", "", 9, false).await.unwrap();
    assert_eq!(bench.tasks.wait("c", "").await.unwrap().status, 137);
    let again = bench.tasks.kill("c", "", 9, false).await;
    assert!(matches!(again, Err(Error::NotFound(_))));
    let (one, two) = tokio::join!(bench.tasks.delete("c", ""), bench.tasks.delete("c", ""));
    assert!(one.is_ok() != two.is_ok());
    let deletes = bench.topics();
    assert_eq!(
        deletes
            .iter()
            .filter(|topic| **topic == topic::DELETE)
            .count(),
        1
    );
}

#[tokio::test(flavor = "current_thread", start_paused = true)]
async fn a_stopping_shim_tells_the_ends() {
    let mut bench = Bench::new(Manners::default());
    bench.tasks.create(bench.creation("c")).await.unwrap();
    bench.tasks.start("c", "").await.unwrap();
    bench.tasks.stop().await;
    assert_eq!(bench.topics(), [topic::CREATE, topic::START, topic::EXIT]);
}

#[tokio::test]
async fn the_command_line_says_names_by_annotations() {
    let bench = Bench::new(Manners::default());
    let spec = serde_json::json!({
        "ociVersion": "1.2.0",
        "annotations": {
            "caisson.dns.servers": "10.0.0.1 fd00::1",
            "caisson.dns.searches": "example.test",
            "caisson.hosts": "10.0.0.9\tdb\n10.0.0.1\tgateway",
        },
        "linux": { "namespaces": [{ "type": "network", "path": "/run/netns/x" }] },
    });
    let spec = serde_json::from_value(spec).unwrap();
    let sandbox = bench.tasks.sandbox_of(&spec, false).unwrap();
    assert_eq!(sandbox.dns_servers, ["10.0.0.1", "fd00::1"]);
    assert_eq!(sandbox.dns_searches, ["example.test"]);
    assert!(sandbox.dns_options.is_empty());
    assert_eq!(sandbox.extra_hosts, ["10.0.0.9\tdb", "10.0.0.1\tgateway"]);
}
