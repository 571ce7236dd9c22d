//! The monitor of one container: started by `run`, stays until the container has ended.
//!
//! It owns the shim, writes the container's log and its state, and hands output
//! to the `run` that started it for as long as that lives. Standard input and
//! output are the two sockets of [`crate::attach`].

use std::{
    io,
    os::{fd::AsFd, unix::net::UnixStream as StdStream},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use caisson_sandbox::scaled;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf, pipe},
    },
    signal::unix::{SignalKind, signal},
    sync::{Mutex as AsyncMutex, Notify, mpsc},
    task::JoinSet,
};

use crate::{
    attach::{self, MAX_FRAME, News, STDERR, STDIN, STDOUT, Wish},
    container::{Container, Containers, Status, own_identity},
    drain::{Copying, Progress},
    error::Error,
    log_file::{Stream, Writer},
    network::{self, Link, Reserved},
    shim::{self, Shim, Streams},
    volumes,
};

/// How long a guest may keep a stream open whose program has ended.
const REST_LIMIT: Duration = Duration::from_secs(2);

/// 128 + SIGKILL: the machine or the shim went, and the container with it.
const KILLED: u32 = 137;

/// Runs the hidden verb.
///
/// # Errors
/// The container is not there.
pub fn run(matches: &clap::ArgMatches) -> Result<u8, Error> {
    let id = crate::arguments::one(matches, "id")
        .unwrap_or_default()
        .to_owned();
    // Out of the caller's session: the container outlives its terminal.
    let _ = rustix::process::setsid();
    let socket = |fd: rustix::fd::BorrowedFd<'_>| {
        let owned = fd
            .try_clone_to_owned()
            .map_err(Error::io("take a socket"))?;
        let stream = StdStream::from(owned);
        stream
            .peer_addr()
            .map_err(|_| Error::Usage("the monitor is started by `caisson run`".to_owned()))?;
        Ok::<_, Error>(stream)
    };
    let (control, stream) = (socket(io::stdin().as_fd())?, socket(io::stdout().as_fd())?);
    let containers = Containers::open()?;
    let container = containers.change(&id, |container| container.monitor = Some(own_identity()))?;
    crate::event_loop()?.block_on(supervise(containers, container, control, stream))?;
    Ok(0)
}

/// News for `run`; nobody may be listening any more.
fn tell(mut control: &StdStream, news: &News) {
    use io::Write;
    if let Ok(mut line) = serde_json::to_vec(news) {
        line.push(b'\n');
        let _ = control.write_all(&line);
    }
}

/// `run`'s end of the stream, until it leaves.
type Attached = Arc<AsyncMutex<Option<OwnedWriteHalf>>>;

async fn supervise(
    containers: Containers,
    container: Container,
    control: StdStream,
    stream: StdStream,
) -> Result<(), Error> {
    let id = container.id.clone();
    let wishes = listen(control.try_clone().map_err(Error::io("copy a socket"))?)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::io("watch for SIGTERM"))?;
    let started = start(&containers, &container).await;
    let running = match started {
        Ok(running) => running,
        Err(error) => {
            leave_networks(&containers, &id).await;
            let news = failed(&containers, &container, &error)?;
            tell(&control, &news);
            return Ok(());
        }
    };
    let changed = containers.change(&id, |container| {
        container.state.status = Status::Running;
        container.state.pid = running.pid;
        container.state.started_at = Some(SystemTime::now());
    });
    if let Err(error) = changed {
        log::error!("{error}");
    }
    tell(&control, &News::Started);
    let (code, message) = follow(
        &containers,
        &container,
        running,
        stream,
        wishes,
        &mut terminate,
    )
    .await?;
    tell(
        &control,
        &News::Ended {
            code: u8::try_from(code).unwrap_or(u8::MAX),
            message,
        },
    );
    Ok(())
}

/// Wishes of `run`, read by a thread of their own; None once it has left.
fn listen(control: StdStream) -> Result<mpsc::Receiver<Wish>, Error> {
    let (sender, receiver) = mpsc::channel(64);
    std::thread::Builder::new()
        .name("wishes".into())
        .stack_size(128 << 10)
        .spawn(move || {
            for wish in attach::wishes(control) {
                if sender.blocking_send(wish).is_err() {
                    return;
                }
            }
        })
        .map_err(Error::io("start a thread"))?;
    Ok(receiver)
}

struct Running {
    shim: Shim,
    streams: Streams,
    stdout: Option<pipe::Receiver>,
    stderr: Option<pipe::Receiver>,
    pid: u32,
    /// Its ports of the host.
    ports: Option<Reserved>,
    /// Its way out, where that is in this process.
    link: Option<Link>,
}

/// Starts a container. Its interfaces come while its microVM boots: the shim takes over whatever
/// there is when the program starts. After an error they are for the caller to take away.
async fn start(containers: &Containers, container: &Container) -> Result<Running, Error> {
    let bundle = containers.bundle(&container.id);
    let fifo = |name: &str| shim::make_fifo(bundle.join(name)).map(Some);
    let tty = container.request.tty;
    let streams = Streams {
        terminal: tty,
        stdin: if container.request.open_stdin {
            fifo("stdin")?
        } else {
            None
        },
        stdout: fifo("stdout")?,
        stderr: if tty { None } else { fifo("stderr")? },
    };
    let open = |path: &Option<PathBuf>| {
        let opened = path.as_ref().map(|path| {
            pipe::OpenOptions::new()
                .open_receiver(path)
                .map_err(Error::file("open the FIFO", path))
        });
        opened.transpose()
    };
    let (stdout, stderr) = (open(&streams.stdout)?, open(&streams.stderr)?);
    let prepared = network::prepare(containers, container)?;
    let (attachment, ports) = prepared.unzip();
    let connecting = attachment.map(|attachment| {
        let (config, wanted) = (containers.config.clone(), container.request.network.clone());
        tokio::spawn(network::connect(config, attachment, wanted))
    });
    let created = create(containers, container, &streams).await;
    // Whatever became of the microVM: nobody may still be at work on what is then taken away.
    let connected = match connecting {
        Some(connecting) => connecting
            .await
            .unwrap_or_else(|error| Err(Error::io("connect the container")(error))),
        None => Ok(None),
    };
    let shim = created?;
    let started = async {
        let link = connected?;
        Ok::<_, Error>((shim.start(&container.id, "").await?, link))
    };
    match started.await {
        Ok((pid, link)) => Ok(Running {
            shim,
            streams,
            stdout,
            stderr,
            pid,
            ports,
            link,
        }),
        Err(error) => {
            end(containers, &shim, container).await;
            Err(error)
        }
    }
}

/// Creates the task: in a microVM of its own, or in that of another container.
async fn create(
    containers: &Containers,
    container: &Container,
    streams: &Streams,
) -> Result<Shim, Error> {
    let (id, bundle) = (&container.id, containers.bundle(&container.id));
    let shim = match container.pod() {
        Some(owner) => Shim::join(&bundle, &containers.bundle(owner)).await?,
        None => shim::start(&containers.config, (shim::NAMESPACE, id), &bundle, false).await?,
    };
    match shim.create(id, &bundle, &container.layers, streams).await {
        Ok(_) => Ok(shim),
        Err(error) => {
            end(containers, &shim, container).await;
            Err(error)
        }
    }
}

/// Ends a container, and its microVM if it is its own.
async fn end(containers: &Containers, shim: &Shim, container: &Container) {
    if container.pod().is_some() {
        shim.end_task(&container.id).await;
    } else {
        end_shim(
            containers,
            shim,
            &container.id,
            &containers.bundle(&container.id),
        )
        .await;
    }
}

/// Takes away what the container has of its networks.
async fn leave_networks(containers: &Containers, id: &str) {
    let (config, id) = (containers.config.clone(), id.to_owned());
    let detached = tokio::task::spawn_blocking(move || network::detach(&config, &id));
    match detached.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => log::error!("{error}"),
        Err(error) => log::error!("the container's network: {error}"),
    }
}

/// Ends the shim by asking; if that does not work, by what is there for shims that died.
async fn end_shim(containers: &Containers, shim: &Shim, id: &str, bundle: &Path) {
    if shim.shutdown(id).await.is_ok() && gone(bundle).await {
        return;
    }
    shim::end_orphan(bundle);
    if let Err(error) = shim::delete(&containers.config, (shim::NAMESPACE, id), bundle) {
        log::error!("{error}");
    }
}

/// Waits until the shim's process has ended.
pub async fn gone(bundle: &Path) -> bool {
    let pid = std::fs::read_to_string(bundle.join("shim.pid"))
        .ok()
        .and_then(|text| text.trim().parse().ok());
    let Some(pid) = pid else { return true };
    let limit = tokio::time::Instant::now() + scaled(Duration::from_secs(5));
    while crate::container::start_time(pid).is_some() {
        if tokio::time::Instant::now() > limit {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    true
}

fn failed(containers: &Containers, container: &Container, error: &Error) -> Result<News, Error> {
    let (code, message) = (error.run_code(), error.to_string());
    if container.auto_remove {
        volumes::remove_container(containers, container)?;
    } else {
        containers.change(&container.id, |container| {
            container.state.exit_code = code.into();
            container.state.error.clone_from(&message);
            // As docker: it was never started.
            container.monitor = None;
        })?;
    }
    Ok(News::Failed { code, message })
}

/// Supervises a running container to its end and beyond: log, state, removal.
async fn follow(
    containers: &Containers,
    container: &Container,
    running: Running,
    stream: StdStream,
    mut wishes: mpsc::Receiver<Wish>,
    terminate: &mut tokio::signal::unix::Signal,
) -> Result<(u32, String), Error> {
    let id = &container.id;
    let bundle = containers.bundle(id);
    stream
        .set_nonblocking(true)
        .map_err(Error::io("prepare a socket"))?;
    let (from_run, to_run) = UnixStream::from_std(stream)
        .map_err(Error::io("watch a socket"))?
        .into_split();
    let attached: Attached = Arc::new(AsyncMutex::new(Some(to_run)));
    let detach = Arc::new(Notify::new());
    let log = Writer::create(&containers.directory(id).join("log.json"))
        .map_err(Error::io("create the container's log"))?;
    let log = Arc::new(Mutex::new(log));
    let progress = Arc::new(Progress::default());
    let mut outputs = JoinSet::new();
    for (pipe, kind) in [
        (running.stdout, Stream::Stdout),
        (running.stderr, Stream::Stderr),
    ] {
        if let Some(pipe) = pipe {
            outputs.spawn(copy_output(
                pipe,
                Copying::new(&progress),
                kind,
                log.clone(),
                attached.clone(),
                detach.clone(),
            ));
        }
    }
    let input = tokio::spawn(copy_input(
        from_run,
        running.streams.stdin.clone(),
        container
            .request
            .stdin_once
            .then(|| (running.shim.clone(), id.clone())),
    ));

    let end = running.shim.wait(id, "");
    tokio::pin!(end);
    let mut wishing = true;
    let ended = loop {
        tokio::select! {
            ended = &mut end => break ended,
            wish = wishes.recv(), if wishing => match wish {
                Some(Wish::Signal(number)) => {
                    // It may have ended at this moment.
                    let _ = running.shim.kill(id, "", number, false).await;
                }
                Some(Wish::Size(rows, columns)) => {
                    let _ = running.shim.resize(id, "", rows, columns).await;
                }
                None => wishing = false,
            },
            _ = terminate.recv() => {
                // `rm -f`: nobody shall wait for the output either.
                let_go(&detach, &attached).await;
                let _ = running.shim.kill(id, "", 9, true).await;
            }
        }
    };
    input.abort();
    let code = ended.as_ref().copied().unwrap_or(KILLED);
    let message = explanation(&bundle, ended.as_ref().err());
    let oom_killed = bundle.join("oom").exists();
    if ended.is_ok() {
        // `run` may be slower than the program was. What the guest still has goes with the task.
        let rest = async { while outputs.join_next().await.is_some() {} };
        tokio::select! {
            _ = progress.outlast_future(scaled(REST_LIMIT), rest) => {}
            _ = terminate.recv() => let_go(&detach, &attached).await,
        }
        // Refused only when it is gone, which is what is wanted.
        let _ = running.shim.delete(id, "").await;
    }
    if container.pod().is_none() {
        end_shim(containers, &running.shim, id, &bundle).await;
    }
    drop(running.link);
    leave_networks(containers, id).await;
    drop(running.ports);
    // The shim has gone or let go of them, so the FIFOs end.
    let drain = async { while outputs.join_next().await.is_some() {} };
    tokio::select! {
        () = drain => {}
        _ = terminate.recv() => let_go(&detach, &attached).await,
    }
    if let Err(error) = log.lock().unwrap_or_else(PoisonError::into_inner).finish() {
        log::error!("the end of the container's log is lost: {error}");
    }
    attached.lock().await.take();
    containers.change(id, |container| {
        container.state.status = Status::Exited;
        container.state.pid = 0;
        container.state.exit_code = i32::try_from(code).unwrap_or(i32::MAX);
        container.state.error.clone_from(&message);
        container.state.oom_killed = oom_killed;
        container.state.finished_at = Some(SystemTime::now());
    })?;
    if container.auto_remove {
        volumes::remove_container(containers, container)?;
    }
    Ok((code, message))
}

/// Why a container ended before its time; empty when it just ended.
fn explanation(bundle: &Path, lost: Option<&Error>) -> String {
    let told = std::fs::read(bundle.join("vm-exit.json"))
        .ok()
        .and_then(|text| serde_json::from_slice::<serde_json::Value>(&text).ok())
        .and_then(|document| document["message"].as_str().map(str::to_owned));
    told.or_else(|| lost.map(|error| format!("the container's VM was lost: {error}")))
        .unwrap_or_default()
}

/// Leaves `run` without the rest of the output.
async fn let_go(detach: &Notify, attached: &Attached) {
    detach.notify_waiters();
    attached.lock().await.take();
}

async fn copy_output(
    mut pipe: pipe::Receiver,
    copying: Copying,
    kind: Stream,
    log: Arc<Mutex<Writer>>,
    attached: Attached,
    detach: Arc<Notify>,
) {
    let mut buffer = vec![0; MAX_FRAME];
    let frame = if kind == Stream::Stdout {
        STDOUT
    } else {
        STDERR
    };
    let mut lost = false;
    loop {
        let waiting = copying.wait();
        let Ok(length @ 1..) = pipe.read(&mut buffer).await else {
            return;
        };
        drop(waiting);
        let bytes = &buffer[..length];
        let written = log
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write(kind, bytes);
        if let Err(error) = written
            && !std::mem::replace(&mut lost, true)
        {
            log::error!("the container's log is incomplete: {error}");
        }
        tokio::select! {
            () = send(&attached, frame, bytes) => {}
            () = detach.notified() => {}
        }
    }
}

async fn send(attached: &Attached, frame: u8, bytes: &[u8]) {
    let mut place = attached.lock().await;
    if let Some(stream) = place.as_mut() {
        let sent = async {
            stream.write_all(&attach::head(frame, bytes.len())).await?;
            stream.write_all(bytes).await
        };
        if sent.await.is_err() {
            *place = None;
        }
    }
}

/// Until `run` says its input is at its end, or leaves; then the program's is closed, if it is one of
/// those whose input is `run`'s.
async fn copy_input(
    mut from_run: OwnedReadHalf,
    fifo: Option<PathBuf>,
    program: Option<(Shim, String)>,
) {
    let Some(fifo) = fifo else { return };
    let Ok(mut pipe) = pipe::OpenOptions::new().open_sender(&fifo) else {
        return;
    };
    let mut buffer = vec![0; MAX_FRAME];
    let mut head = [0; 5];
    while from_run.read_exact(&mut head).await.is_ok() {
        let Ok((STDIN, length)) = attach::parse_head(head) else {
            break;
        };
        let Some(bytes) = buffer.get_mut(..length) else {
            break;
        };
        if from_run.read_exact(bytes).await.is_err() || pipe.write_all(bytes).await.is_err() {
            break;
        }
    }
    drop(pipe);
    if let Some((shim, id)) = program {
        // It may have ended by itself.
        let _ = shim.close_stdin(&id, "").await;
    }
}
