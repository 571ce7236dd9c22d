//! A fake pod that behaves as it is told.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use caisson_sandbox::{
    AgentErrorKind, Config, ContainerSpec, Created, Error as SandboxError, Event,
    Exit as GuestExit, ExitReason, Gone, ProcessInfo, SandboxSpec, StatsResponse, Stdio, Streams,
};
use tokio::{net::UnixStream, sync::mpsc, time::sleep};

use super::super::*;
use crate::events::Sent;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FakeStage {
    Created,
    Running,
    Stopped,
}

/// How a fake guest behaves.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Manners {
    pub(crate) boot_ms: u64,
    pub(crate) create_ms: u64,
    pub(crate) start_ms: u64,
    /// The process ends before the answer to its start is out.
    pub(crate) ends_at_once: bool,
    /// The program is not there.
    pub(crate) start_fails: bool,
    /// Output goes on for so long after the end.
    pub(crate) drain_ms: u64,
    /// Nobody hears of the ends of execs that go with their container.
    pub(crate) hides_execs: bool,
    /// Signals are taken and do nothing.
    pub(crate) ignores_signals: bool,
    /// No container is deleted.
    pub(crate) keeps_containers: bool,
}

#[derive(Default)]
pub(crate) struct FakeState {
    pub(crate) processes: HashMap<Name, FakeStage>,
    /// The agent's ends of streams.
    pub(crate) streams: HashMap<Name, UnixStream>,
    pub(crate) gone: Option<Gone>,
}

pub(crate) struct FakePod {
    pub(crate) manners: Manners,
    pub(crate) state: Mutex<FakeState>,
    pub(crate) events: mpsc::Sender<Event>,
}

pub(crate) fn refusal(kind: AgentErrorKind) -> SandboxError {
    SandboxError::Agent {
        kind,
        message: format!("{kind:?}"),
    }
}

pub(crate) fn name_of(container: &str, exec: &str) -> Name {
    (container.to_owned(), exec.to_owned())
}

impl FakePod {
    pub(crate) fn add(&self, name: Name) -> Result<Created, SandboxError> {
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
    pub(crate) async fn end(self: &Arc<Self>, name: &Name, status: u32) {
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

    pub(crate) async fn die(&self) {
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

    pub(crate) fn alive(&self) -> Result<(), SandboxError> {
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
        if self.manners.keeps_containers {
            return Err(refusal(AgentErrorKind::Other));
        }
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
        if !self.manners.ignores_signals {
            self.end(&name_of(container, exec), 128 + signal).await;
        }
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

    async fn stop(&self, _: Duration) -> Result<(), SandboxError> {
        self.die().await;
        Ok(())
    }
}

#[derive(Clone, Default)]
pub(crate) struct FakePods {
    pub(crate) manners: Manners,
    pub(crate) booted: Arc<Mutex<Option<Arc<FakePod>>>>,
    pub(crate) boots: Arc<AtomicUsize>,
    pub(crate) cleaned: Arc<AtomicBool>,
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

pub(crate) struct Bench {
    pub(crate) tasks: Arc<Tasks>,
    pub(crate) pods: FakePods,
    pub(crate) sent: Sent,
    pub(crate) bundle: tempfile::TempDir,
}

impl Bench {
    pub(crate) fn new(manners: Manners) -> Self {
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

    pub(crate) fn creation(&self, id: &str) -> Creation {
        Creation {
            id: id.to_owned(),
            bundle: self.bundle.path().to_owned(),
            rootfs: Vec::new(),
            paths: Paths::default(),
        }
    }

    pub(crate) async fn exec(&self, id: &str, exec: &str) -> Result<(), Error> {
        let process = br#"{"cwd":"/","args":["x"],"user":{"uid":0,"gid":0}}"#.to_vec();
        self.tasks.exec(id, exec, process, Paths::default()).await
    }

    pub(crate) fn topics(&mut self) -> Vec<&'static str> {
        self.sent.take().iter().map(|event| event.topic).collect()
    }

    pub(crate) fn pod(&self) -> Arc<FakePod> {
        self.pods.booted.lock().unwrap().clone().unwrap()
    }
}
