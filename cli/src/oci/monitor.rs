//! The process on the host that looks after a container or an exec: it carries the streams, passes
//! signals on, and knows the end. For an exec it is also what callers wait for: whoever has started
//! the verb gets it as a child (a subreaper such as conmon or containerd's runc shim), and it ends
//! with the same exit code. For a container that is the [`super::stand_in`].

use std::{
    fs::{self, File},
    io::Read,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use caisson_sandbox::{Config, scaled};
use serde_json::json;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

use super::{
    console,
    handshake::{News, Order, Verb},
    relay::{Copies, Ends, Relay},
    stand_in::StandIn,
    state::{self, Exit, Record, shim_bundle},
};
use crate::{
    container::own_identity,
    error::Error,
    shim::{self, Shim},
};

/// 128 + SIGKILL: the machine or the shim went, and the container with it.
const KILLED: u32 = 137;

/// Until the process that stands for the container has taken its root.
const ENTER_LIMIT: Duration = Duration::from_secs(5);

/// Signals that are meant for the process in the guest.
const PASSED: [i32; 7] = [1, 2, 3, 10, 12, 15, 18];

/// Runs the hidden verb. Its words only tell people whose process it is.
pub fn run(_words: &[String]) -> ExitCode {
    let (verb, order, streams) = match Verb::take() {
        Ok(taken) => taken,
        Err(error) => {
            eprintln!("caisson: {error}");
            return ExitCode::FAILURE;
        }
    };
    match stay(&verb, &order, streams) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            // For the log; the verb may have gone.
            eprintln!("caisson: {error}");
            let _ = verb.tell(&News::Failed {
                code: error.run_code(),
                message: error.to_string(),
            });
            ExitCode::FAILURE
        }
    }
}

/// Who is looked after.
struct Target {
    config: Config,
    namespace: String,
    id: String,
    exec: String,
    debug: bool,
    /// The container's.
    directory: PathBuf,
    /// The exec's, or the container's.
    own: PathBuf,
}

impl Target {
    fn is_container(&self) -> bool {
        self.exec.is_empty()
    }

    fn shim_bundle(&self) -> PathBuf {
        shim_bundle(&self.directory)
    }
}

fn stay(verb: &Verb, order: &Order, mut streams: Vec<OwnedFd>) -> Result<u8, Error> {
    // Out of the caller's session, as a container's first process is.
    let _ = rustix::process::setsid();
    let root = order.directory.parent().and_then(Path::to_str);
    let root = state::Root::open(root)?;
    let id = order
        .directory
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let own = match &order.exec {
        Some(exec) => exec_directory(&order.directory, exec),
        None => order.directory.clone(),
    };
    // An exec's is what callers know the program by.
    let name = if order.exec.is_some() {
        "process.json"
    } else {
        "monitor.json"
    };
    state::write(&own.join(name), json!(own_identity()).to_string())?;
    let target = Target {
        config: root.config,
        namespace: root.namespace,
        id,
        exec: order.exec.clone().unwrap_or_default(),
        debug: order.debug,
        directory: order.directory.clone(),
        own,
    };
    if let Some(cgroup) = &order.cgroup {
        cgroup.enter()?;
    }
    let wrong = || Error::Usage("wrong number of streams".to_owned());
    let stand_in = if order.exec.is_none() && !streams.is_empty() {
        Some(StandIn::new(streams.remove(0)))
    } else {
        None
    };
    let streams: Vec<File> = streams.into_iter().map(File::from).collect();
    let (ends, terminal) = if order.terminal {
        let [slave] = <[File; 1]>::try_from(streams).map_err(|_| wrong())?;
        console::adopt(&slave)?;
        (Ends::of_terminal(&slave)?, Some(slave))
    } else {
        let ends = <[File; 3]>::try_from(streams).map_err(|_| wrong())?;
        (Ends::of(ends), None)
    };
    let relay = Relay::prepare(&target.own.join("streams"), ends)?;
    verb.tell(&News::Ready)?;
    verb.wait_for_go()?;
    crate::event_loop()?.block_on(supervise(verb, &target, relay, terminal, stand_in))
}

/// Of an exec, in its container's.
pub fn exec_directory(container: &Path, exec: &str) -> PathBuf {
    container.join(format!("exec-{exec}"))
}

async fn supervise(
    verb: &Verb,
    target: &Target,
    relay: Relay,
    terminal: Option<File>,
    stand_in: Option<StandIn>,
) -> Result<u8, Error> {
    // From here on none of them ends this process.
    let mut signals = Signals::hold()?;
    let made = tokio::select! {
        made = make(target, &relay) => made,
        () = verb_gone(verb)? => Err(Error::State("the command was ended".to_owned())),
    };
    let shim = match made {
        Ok(shim) => shim,
        Err(error) => {
            if target.is_container() {
                clean_up(target, None).await?;
            }
            return Err(error);
        }
    };
    if let Some(stand_in) = &stand_in {
        // Its root has all that the guest has made by now.
        if let Err(error) = stand_in.enter(scaled(ENTER_LIMIT)) {
            clean_up(target, Some(&shim)).await?;
            return Err(error);
        }
        signals.stand_in = Some(stand_in.signals()?);
    }
    let copies = relay.start(shim.clone(), &target.id, &target.exec)?;
    if target.is_container() {
        state::write(&target.own.join("created"), "")?;
    }
    // The verb that has gone now could not tell its caller that there is a container.
    verb.tell(&News::Done)?;
    let code = wait(target, &shim, terminal.as_ref(), &mut signals).await;
    copies_finished(copies).await;
    if target.is_container() {
        finish_container(target, &shim, code).await;
    } else {
        let _ = shim.delete(&target.id, &target.exec).await;
        let _ = fs::remove_dir_all(&target.own);
    }
    let code = u8::try_from(code).unwrap_or(u8::MAX);
    if let Some(stand_in) = stand_in {
        stand_in.end(code);
    }
    Ok(code)
}

/// The task or the exec, as far as the verb goes.
async fn make(target: &Target, relay: &Relay) -> Result<Shim, Error> {
    let bundle = target.shim_bundle();
    if target.is_container() {
        let name = (target.namespace.as_str(), target.id.as_str());
        let shim = shim::start(&target.config, name, &bundle, target.debug).await?;
        shim.create(&target.id, &bundle, &[], &relay.streams)
            .await?;
        return Ok(shim);
    }
    let file = target.own.join("process-spec.json");
    let text = fs::read(&file).map_err(Error::file("read", &file))?;
    let process = serde_json::from_slice(&text)
        .map_err(|error| Error::file("read", &file)(std::io::Error::other(error)))?;
    let shim = Shim::of_bundle(&bundle).await?;
    start_exec(&shim, target, &process, relay).await?;
    Ok(shim)
}

async fn start_exec(
    shim: &Shim,
    target: &Target,
    process: &serde_json::Value,
    relay: &Relay,
) -> Result<(), Error> {
    shim.exec(&target.id, &target.exec, process, &relay.streams)
        .await?;
    if let Err(error) = shim.start(&target.id, &target.exec).await {
        let _ = shim.delete(&target.id, &target.exec).await;
        return Err(error);
    }
    Ok(())
}

/// Ends when the verb has left before its answer.
fn verb_gone(verb: &Verb) -> Result<impl Future<Output = ()> + use<>, Error> {
    let mut socket = verb
        .socket()
        .try_clone()
        .map_err(Error::io("copy a socket"))?;
    let (sender, mut receiver) = mpsc::channel::<()>(1);
    std::thread::Builder::new()
        .name("verb".to_owned())
        .stack_size(64 << 10)
        .spawn(move || {
            // It says nothing more.
            let _ = socket.read(&mut [0]);
            drop(sender);
        })
        .map_err(Error::io("start a thread"))?;
    Ok(async move {
        receiver.recv().await;
    })
}

/// Signals for the process in the guest, and changes of the terminal's size.
struct Signals {
    passed: mpsc::Receiver<u32>,
    resized: Signal,
    /// What the process that stands for the container gets.
    stand_in: Option<mpsc::Receiver<u32>>,
}

impl Signals {
    fn hold() -> Result<Self, Error> {
        let failed = || Error::io::<std::io::Error>("watch for signals");
        let (sender, passed) = mpsc::channel(16);
        for number in PASSED {
            let mut one = signal(SignalKind::from_raw(number)).map_err(failed())?;
            let sender = sender.clone();
            tokio::spawn(async move {
                while one.recv().await.is_some() {
                    let _ = sender.send(number.unsigned_abs()).await;
                }
            });
        }
        Ok(Self {
            passed,
            resized: signal(SignalKind::window_change()).map_err(failed())?,
            stand_in: None,
        })
    }
}

/// Waits for the process's end.
async fn wait(target: &Target, shim: &Shim, terminal: Option<&File>, signals: &mut Signals) -> u32 {
    let (id, exec) = (target.id.as_str(), target.exec.as_str());
    let end = shim.wait(id, exec);
    tokio::pin!(end);
    loop {
        if let Some((rows, columns)) = terminal.and_then(console::size) {
            // It may have ended at this moment.
            let _ = shim.resize(id, exec, rows, columns).await;
        }
        tokio::select! {
            ended = &mut end => return ended.unwrap_or(KILLED),
            Some(number) = signals.passed.recv() => {
                let _ = shim.kill(id, exec, number, false).await;
            }
            Some(number) = next_of(&mut signals.stand_in) => {
                // Whoever kills it kills the container.
                let _ = shim.kill(id, exec, number, number == 9).await;
            }
            _ = signals.resized.recv() => {}
        }
    }
}

async fn next_of(receiver: &mut Option<mpsc::Receiver<u32>>) -> Option<u32> {
    match receiver {
        Some(receiver) => receiver.recv().await,
        None => std::future::pending().await,
    }
}

async fn copies_finished(copies: Copies) {
    let _ = tokio::task::spawn_blocking(|| copies.finish()).await;
}

/// Removes the machine; what remains is told by files.
async fn finish_container(target: &Target, shim: &Shim, code: u32) {
    let oom = target.shim_bundle().join("oom").exists() && tell_oom(target);
    let _ = shim.delete(&target.id, "").await;
    let clean = match clean_up(target, Some(shim)).await {
        Ok(()) => true,
        Err(error) => {
            eprintln!("caisson: {error}");
            false
        }
    };
    let exit = Exit {
        status: u8::try_from(code).unwrap_or(u8::MAX),
        clean,
        oom,
    };
    if let Err(error) = state::write(&target.own.join("exit.json"), json!(exit).to_string()) {
        eprintln!("caisson: {error}");
    }
}

/// conmon looks for out-of-memory kills in the container's cgroup, where there are none: they are
/// in the guest. What it would write then, podman reads.
fn tell_oom(target: &Target) -> bool {
    let record: Option<Record> = fs::read(target.directory.join("record.json"))
        .ok()
        .and_then(|text| serde_json::from_slice(&text).ok());
    record.is_some_and(|record| fs::write(record.bundle.join("oom"), "").is_ok())
}

/// Ends the shim by asking; if that does not work, by what is there for shims that died.
async fn clean_up(target: &Target, shim: Option<&Shim>) -> Result<(), Error> {
    let bundle = target.shim_bundle();
    if let Some(shim) = shim
        && shim.shutdown(&target.id).await.is_ok()
        && crate::monitor::gone(&bundle).await
    {
        return Ok(());
    }
    let name = (target.namespace.as_str(), target.id.as_str());
    shim::delete(&target.config, name, &bundle)
}
