//! Whatever may happen in a pod at any time: containerd must hear a story that makes sense.

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Duration,
};

use containerd_shim_protos::{
    events::task::{TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskStart},
    protobuf::Message,
};
use proptest::prelude::*;
use tokio::time::sleep;

use super::{
    super::*,
    fake::{Bench, Manners, name_of},
};
use crate::events::Waiting;

/// What is done to the pod, each at its time.
#[derive(Debug, Clone)]
enum Deed {
    Create(u8),
    Start(u8, Option<u8>),
    Exec(u8, u8),
    Kill(u8, Option<u8>),
    /// It ends by itself.
    End(u8, Option<u8>),
    Delete(u8, Option<u8>),
    Die,
}

fn deed() -> impl Strategy<Value = Deed> {
    let container = 0..2u8;
    let exec = || proptest::option::weighted(0.4, 0..2u8);
    prop_oneof![
        4 => container.clone().prop_map(Deed::Create),
        6 => (container.clone(), exec()).prop_map(|(c, e)| Deed::Start(c, e)),
        4 => (container.clone(), 0..2u8).prop_map(|(c, e)| Deed::Exec(c, e)),
        1 => (container.clone(), exec()).prop_map(|(c, e)| Deed::Kill(c, e)),
        3 => (container.clone(), exec()).prop_map(|(c, e)| Deed::End(c, e)),
        3 => (container, exec()).prop_map(|(c, e)| Deed::Delete(c, e)),
        1 => Just(Deed::Die),
    ]
}

/// What a story often begins with; chance alone would seldom get so far.
fn opening() -> Vec<Deed> {
    vec![
        Deed::Create(0),
        Deed::Start(0, None),
        Deed::Exec(0, 0),
        Deed::Start(0, Some(0)),
        Deed::Create(1),
        Deed::Start(1, None),
    ]
}

fn manners() -> impl Strategy<Value = Manners> {
    let few = 0..20u64;
    (
        few.clone(),
        few.clone(),
        few,
        any::<bool>(),
        prop::bool::weighted(0.1),
        0..400u64,
    )
        .prop_map(
            |(boot_ms, create_ms, start_ms, ends_at_once, start_fails, drain_ms)| Manners {
                boot_ms,
                create_ms,
                start_ms,
                ends_at_once,
                start_fails,
                drain_ms,
                ..Default::default()
            },
        )
}

fn container(number: u8) -> String {
    format!("c{number}")
}

fn process(container_number: u8, exec: Option<u8>) -> Name {
    let exec = exec.map_or(String::new(), |number| format!("e{number}"));
    (container(container_number), exec)
}

async fn done(bench: &Bench, deed: Deed) {
    let tasks = &bench.tasks;
    let pod = bench.pods.booted.lock().unwrap().clone();
    // Most fail, as they come at a wrong time; that is what is tried.
    match deed {
        Deed::Create(c) => drop(tasks.create(bench.creation(&container(c))).await),
        Deed::Start(c, e) => {
            let (id, exec) = process(c, e);
            drop(tasks.start(&id, &exec).await);
        }
        Deed::Exec(c, e) => {
            let (id, exec) = process(c, Some(e));
            drop(bench.exec(&id, &exec).await);
        }
        Deed::Kill(c, e) => {
            let (id, exec) = process(c, e);
            drop(tasks.kill(&id, &exec, 9, false).await);
        }
        Deed::End(c, e) => {
            if let Some(pod) = pod {
                pod.end(&process(c, e), 1).await;
            }
        }
        Deed::Delete(c, e) => {
            let (id, exec) = process(c, e);
            drop(tasks.delete(&id, &exec).await);
        }
        Deed::Die => {
            if let Some(pod) = pod {
                pod.die().await;
            }
        }
    }
}

/// Ends and deletes what is left.
async fn tidy(bench: &Bench) {
    let pod = bench.pods.booted.lock().unwrap().clone();
    let Some(pod) = pod else { return };
    for number in 0..2 {
        let id = container(number);
        let Ok(snapshot) = bench.tasks.snapshot(&id, "") else {
            continue;
        };
        if snapshot.stage == Stage::Running {
            if pod.gone().is_none() {
                pod.end(&name_of(&id, ""), 0).await;
            }
            let limit = Duration::from_secs(60);
            tokio::time::timeout(limit, bench.tasks.wait(&id, ""))
                .await
                .expect("an end")
                .unwrap();
        }
        bench.tasks.delete(&id, "").await.unwrap();
    }
    assert!(bench.tasks.is_empty());
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Created,
    Started,
    Exited,
}

/// Checks the story as containerd hears it.
fn check(story: &[Waiting]) -> Result<(), String> {
    let mut known: BTreeMap<Name, Told> = BTreeMap::new();
    for event in story {
        let bytes = &event.event.value;
        let (name, before, after): (Name, &[Option<Told>], Told) = match event.topic {
            topic::CREATE => {
                let event = TaskCreate::parse_from_bytes(bytes).unwrap();
                ((event.container_id, String::new()), &[None], Told::Created)
            }
            topic::START => {
                let event = TaskStart::parse_from_bytes(bytes).unwrap();
                (
                    (event.container_id, String::new()),
                    &[Some(Told::Created)],
                    Told::Started,
                )
            }
            topic::EXEC_ADDED => {
                let event = TaskExecAdded::parse_from_bytes(bytes).unwrap();
                let container = known.get(&name_of(&event.container_id, ""));
                if !matches!(container, Some(Told::Started | Told::Exited)) {
                    return Err(format!("{event:?} of a container that is {container:?}"));
                }
                // The same name may come again: deleting an exec has no event.
                let name = (event.container_id, event.exec_id);
                let again = &[None, Some(Told::Created), Some(Told::Exited)];
                (name, again, Told::Created)
            }
            topic::EXEC_STARTED => {
                let event = TaskExecStarted::parse_from_bytes(bytes).unwrap();
                let name = (event.container_id, event.exec_id);
                (name, &[Some(Told::Created)], Told::Started)
            }
            topic::EXIT => {
                let event = TaskExit::parse_from_bytes(bytes).unwrap();
                let first = event.id == event.container_id;
                let exec = if first {
                    String::new()
                } else {
                    event.id.clone()
                };
                let lives = known.iter().find(|(name, told)| {
                    name.0 == event.container_id && !name.1.is_empty() && **told == Told::Started
                });
                if let (true, Some(exec)) = (first, lives) {
                    return Err(format!("{event:?} before that of {exec:?}"));
                }
                let name = (event.container_id, exec);
                let unstarted: &[_] = &[Some(Told::Created), Some(Told::Started)];
                let before = if first { unstarted } else { &unstarted[1..] };
                (name, before, Told::Exited)
            }
            topic::DELETE => {
                let event = TaskDelete::parse_from_bytes(bytes).unwrap();
                let name = name_of(&event.container_id, "");
                match known.remove(&name) {
                    Some(Told::Exited | Told::Created) => {}
                    told => return Err(format!("{event:?} of one that is {told:?}")),
                }
                if let Some(exec) = known
                    .iter()
                    .find(|(other, told)| other.0 == name.0 && **told == Told::Started)
                {
                    return Err(format!("{event:?} before the end of {exec:?}"));
                }
                known.retain(|other, _| other.0 != name.0);
                continue;
            }
            other => return Err(format!("unexpected {other}")),
        };
        let told = known.get(&name).copied();
        if !before.contains(&told) {
            return Err(format!("{} of {name:?}, which is {told:?}", event.topic));
        }
        known.insert(name, after);
    }
    let left: HashSet<_> = known.keys().collect();
    if left.is_empty() {
        Ok(())
    } else {
        Err(format!("no end of {left:?}"))
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..Default::default() })]
    #[test]
    fn containerd_hears_a_story_that_makes_sense(
        manners in manners(),
        first in proptest::sample::subsequence(opening(), 0..=6),
        deeds in proptest::collection::vec((0..40u64, deed()), 1..40),
    ) {
        let first = first.into_iter().map(|deed| (50, deed));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true)
            .build()
            .unwrap();
        let story = runtime.block_on(async {
            let bench = Arc::new(Bench::new(manners));
            let mut at = tokio::task::JoinSet::new();
            let mut time = 0;
            for (pause, deed) in first.chain(deeds) {
                time += pause;
                let bench = bench.clone();
                at.spawn(async move {
                    sleep(Duration::from_millis(time)).await;
                    done(&bench, deed).await;
                });
            }
            while let Some(result) = at.join_next().await {
                result.unwrap();
            }
            tidy(&bench).await;
            Arc::into_inner(bench).unwrap().sent.take()
        });
        if let Err(problem) = check(&story) {
            let story: Vec<_> = story.iter().map(|event| event.topic).collect();
            return Err(TestCaseError::fail(format!("{problem}\n{story:?}")));
        }
    }
}
