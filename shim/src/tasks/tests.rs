//! A fake pod, and whatever may happen in it at any time: containerd must hear a story that makes
//! sense.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use async_trait::async_trait;
use caisson_sandbox::{
    AgentErrorKind, Config, ContainerSpec, Created, Error as SandboxError, Event,
    Exit as GuestExit, ExitReason, Gone, ProcessInfo, SandboxSpec, StatsResponse, Stdio, Streams,
};
use containerd_shim_protos::{
    events::task::{TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskStart},
    protobuf::Message,
};
use proptest::prelude::*;
use tokio::{net::UnixStream, sync::mpsc, time::sleep};

use super::*;
use crate::events::{Sent, Waiting};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FakeStage {
    Created,
    Running,
    Stopped,
}

/// How a fake guest behaves.
#[derive(Debug, Clone, Copy, Default)]
struct Manners {
    boot_ms: u64,
    create_ms: u64,
    start_ms: u64,
    /// The process ends before the answer to its start is out.
    ends_at_once: bool,
    /// The program is not there.
    start_fails: bool,
    /// Output goes on for so long after the end.
    drain_ms: u64,
    /// Nobody hears of the ends of execs that go with their container.
    hides_execs: bool,
}

#[derive(Default)]
struct FakeState {
    processes: HashMap<Name, FakeStage>,
    /// The agent's ends of streams.
    streams: HashMap<Name, UnixStream>,
    gone: Option<Gone>,
}

struct FakePod {
    manners: Manners,
    state: Mutex<FakeState>,
    events: mpsc::Sender<Event>,
}

fn refusal(kind: AgentErrorKind) -> SandboxError {
    SandboxError::Agent {
        kind,
        message: format!("{kind:?}"),
    }
}

fn name_of(container: &str, exec: &str) -> Name {
    (container.to_owned(), exec.to_owned())
}

impl FakePod {
    fn add(&self, name: Name) -> Result<Created, SandboxError> {
        let mut state = self.state.lock().unwrap();
        if state.processes.contains_key(&name) {
            return Err(refusal(AgentErrorKind::AlreadyExists));
        }
        let (host, guest) = UnixStream::pair().unwrap();
        state.processes.insert(name.clone(), FakeStage::Created);
        state.streams.insert(name, guest);
        Ok(Created {
            pid: 7,
            streams: Streams {
                stdout: Some(host),
                ..Default::default()
            },
        })
    }

    /// Ends a process, and with a container's first its execs. Their ends may be told in any order.
    async fn end(self: &Arc<Self>, name: &Name, status: u32) {
        let ended: Vec<(Name, Option<UnixStream>)> = {
            let mut state = self.state.lock().unwrap();
            let all: Vec<Name> = state
                .processes
                .iter()
                .filter(|(other, stage)| {
                    let own = *other == name && **stage != FakeStage::Stopped;
                    let below = name.1.is_empty() && other.0 == name.0;
                    own || (below && **stage == FakeStage::Running)
                })
                .map(|(name, _)| name.clone())
                .collect();
            all.into_iter()
                .map(|name| {
                    state.processes.insert(name.clone(), FakeStage::Stopped);
                    let stream = state.streams.remove(&name);
                    (name, stream)
                })
                .collect()
        };
        for ((container, exec), stream) in ended {
            // Execs' output lasts longer than that of their container.
            let is_exec = !exec.is_empty();
            let drain = self.manners.drain_ms * if is_exec { 3 } else { 1 };
            let exit = GuestExit {
                pid: 7,
                status,
                at: SystemTime::UNIX_EPOCH,
            };
            let event = Event::Exited {
                container,
                exec,
                exit,
            };
            if !(self.manners.hides_execs && name.1.is_empty() && is_exec) {
                let _ = self.events.send(event).await;
            }
            tokio::spawn(async move {
                sleep(Duration::from_millis(drain)).await;
                drop(stream);
            });
        }
    }

    async fn die(&self) {
        let gone = Gone {
            reason: ExitReason::GuestPanic,
            console_tail: "Kernel panic".to_owned(),
        };
        {
            let mut state = self.state.lock().unwrap();
            if state.gone.is_some() {
                return;
            }
            state.gone = Some(gone.clone());
            state.streams.clear();
        }
        let _ = self.events.send(Event::Gone(gone)).await;
    }

    fn alive(&self) -> Result<(), SandboxError> {
        match &self.state.lock().unwrap().gone {
            Some(gone) => Err(SandboxError::Gone(gone.clone())),
            None => Ok(()),
        }
    }
}

#[async_trait]
impl Pod for Arc<FakePod> {
    fn vmm_pid(&self) -> u32 {
        4711
    }

    fn gone(&self) -> Option<Gone> {
        self.state.lock().unwrap().gone.clone()
    }

    async fn create_container(&self, request: ContainerSpec) -> Result<Created, SandboxError> {
        sleep(Duration::from_millis(self.manners.create_ms)).await;
        self.alive()?;
        self.add(name_of(&request.id, ""))
    }

    async fn create_exec(
        &self,
        container: &str,
        exec: &str,
        _: Vec<u8>,
        _: &Stdio,
    ) -> Result<Created, SandboxError> {
        sleep(Duration::from_millis(self.manners.create_ms)).await;
        self.alive()?;
        let first = name_of(container, "");
        if self.state.lock().unwrap().processes.get(&first) != Some(&FakeStage::Running) {
            return Err(refusal(AgentErrorKind::FailedPrecondition));
        }
        self.add(name_of(container, exec))
    }

    async fn start_process(&self, container: &str, exec: &str) -> Result<u32, SandboxError> {
        let name = name_of(container, exec);
        self.alive()?;
        {
            let mut state = self.state.lock().unwrap();
            let running = |name: &Name| state.processes.get(name) == Some(&FakeStage::Running);
            if !exec.is_empty() && !running(&name_of(container, "")) {
                return Err(refusal(AgentErrorKind::FailedPrecondition));
            }
            let stage = state.processes.get_mut(&name);
            let stage = stage.ok_or_else(|| refusal(AgentErrorKind::NotFound))?;
            if *stage != FakeStage::Created {
                return Err(refusal(AgentErrorKind::FailedPrecondition));
            }
            if self.manners.start_fails {
                *stage = FakeStage::Stopped;
                return Err(refusal(AgentErrorKind::NotFound));
            }
            *stage = FakeStage::Running;
        }
        if self.manners.ends_at_once {
            self.end(&name, 3).await;
        }
        sleep(Duration::from_millis(self.manners.start_ms)).await;
        self.alive()?;
        Ok(7)
    }

    async fn delete_process(&self, container: &str, exec: &str) -> Result<(), SandboxError> {
        sleep(Duration::from_millis(self.manners.create_ms)).await;
        self.alive()?;
        let name = name_of(container, exec);
        let mut state = self.state.lock().unwrap();
        match state.processes.get(&name) {
            None => return Err(refusal(AgentErrorKind::NotFound)),
            Some(FakeStage::Running) => return Err(refusal(AgentErrorKind::FailedPrecondition)),
            Some(_) => {}
        }
        let below = |other: &Name| *other == name || (exec.is_empty() && other.0 == container);
        state.processes.retain(|other, _| !below(other));
        state.streams.retain(|other, _| !below(other));
        Ok(())
    }

    async fn signal(
        &self,
        container: &str,
        exec: &str,
        signal: u32,
        _: bool,
    ) -> Result<(), SandboxError> {
        self.alive()?;
        self.end(&name_of(container, exec), 128 + signal).await;
        Ok(())
    }

    async fn resize(&self, _: &str, _: &str, _: u32, _: u32) -> Result<(), SandboxError> {
        self.alive()
    }

    async fn pause(&self, _: &str, _: bool) -> Result<(), SandboxError> {
        self.alive()
    }

    async fn processes(&self, _: &str) -> Result<Vec<ProcessInfo>, SandboxError> {
        Ok(Vec::new())
    }

    async fn update(&self, _: &str, _: Vec<u8>) -> Result<(), SandboxError> {
        self.alive()
    }

    async fn stats(&self, _: &str) -> Result<StatsResponse, SandboxError> {
        Ok(StatsResponse::default())
    }

    async fn figures(
        &self,
        _: &str,
        _: &str,
    ) -> Result<caisson_sandbox::figures::Figures, SandboxError> {
        Err(SandboxError::Invalid("a fake counts nothing".to_owned()))
    }

    async fn stop(&self) -> Result<(), SandboxError> {
        self.die().await;
        Ok(())
    }
}

#[derive(Clone, Default)]
struct FakePods {
    manners: Manners,
    booted: Arc<Mutex<Option<Arc<FakePod>>>>,
    boots: Arc<AtomicUsize>,
    cleaned: Arc<AtomicBool>,
}

#[async_trait]
impl Pods for FakePods {
    async fn boot(
        &self,
        _: SandboxSpec,
    ) -> Result<(Arc<dyn Pod>, mpsc::Receiver<Event>), SandboxError> {
        self.boots.fetch_add(1, Ordering::Relaxed);
        sleep(Duration::from_millis(self.manners.boot_ms)).await;
        let (sender, receiver) = mpsc::channel(256);
        let pod = Arc::new(FakePod {
            manners: self.manners,
            state: Mutex::default(),
            events: sender,
        });
        *self.booted.lock().unwrap() = Some(pod.clone());
        Ok((Arc::new(pod), receiver))
    }

    async fn cleanup(&self, _: &str) -> Result<(), SandboxError> {
        self.cleaned.store(true, Ordering::Relaxed);
        Ok(())
    }
}

struct Bench {
    tasks: Arc<Tasks>,
    pods: FakePods,
    sent: Sent,
    bundle: tempfile::TempDir,
}

impl Bench {
    fn new(manners: Manners) -> Self {
        let bundle = tempfile::tempdir().unwrap();
        let spec = r#"{"ociVersion":"1.2.0","root":{"path":"rootfs"},"linux":{"namespaces":[{"type":"network"}]}}"#;
        std::fs::write(bundle.path().join("config.json"), spec).unwrap();
        let (events, sent) = Events::for_test();
        let pods = FakePods {
            manners,
            ..Default::default()
        };
        let identity = Identity {
            containerd: true,
            namespace: "n".to_owned(),
            sandbox: "n.p".to_owned(),
        };
        let tasks = Tasks::new(Config::default(), identity, Box::new(pods.clone()), events);
        Self {
            tasks,
            pods,
            sent,
            bundle,
        }
    }

    fn creation(&self, id: &str) -> Creation {
        Creation {
            id: id.to_owned(),
            bundle: self.bundle.path().to_owned(),
            rootfs: Vec::new(),
            paths: Paths::default(),
        }
    }

    async fn exec(&self, id: &str, exec: &str) -> Result<(), Error> {
        let process = br#"{"cwd":"/","args":["x"],"user":{"uid":0,"gid":0}}"#.to_vec();
        self.tasks.exec(id, exec, process, Paths::default()).await
    }

    fn topics(&mut self) -> Vec<&'static str> {
        self.sent.take().iter().map(|event| event.topic).collect()
    }

    fn pod(&self) -> Arc<FakePod> {
        self.pods.booted.lock().unwrap().clone().unwrap()
    }
}

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
                hides_execs: false,
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
