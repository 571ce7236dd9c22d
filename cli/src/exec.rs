//! `exec`: one more program in a running container.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use caisson_sandbox::scaled;
use clap::ArgMatches;
use rustix::fs::{Mode, OFlags};
use tokio::sync::mpsc;

use crate::{
    arguments::{one, rest, values},
    container::{Container, Containers, Status},
    drain::{Output, Progress},
    error::{Error, ShimCode},
    options,
    shim::{Shim, Streams, make_fifo},
    spec, terminal,
};

/// SIGKILL.
const KILL: u32 = 9;

/// Bytes copied at a time.
const CHUNK: usize = 32 * 1024;

/// Runs the verb.
///
/// # Errors
/// No such container, it is not running, or the program cannot be run.
pub fn run(matches: &ArgMatches) -> Result<u8, Error> {
    let (name, words) = rest(matches);
    if words.is_empty() {
        return Err(Error::Usage(
            "exec needs a command: caisson exec CONTAINER COMMAND [ARG...]".to_owned(),
        ));
    }
    let (detach, tty, interactive) = (
        matches.get_flag("detach"),
        matches.get_flag("tty"),
        matches.get_flag("interactive"),
    );
    if !detach {
        terminal::require(tty, interactive)?;
    }
    let containers = Containers::open()?;
    let container = containers.find(&name)?;
    if container.state.status != Status::Running {
        return Err(Error::State(format!(
            "container {} is not running",
            container.id
        )));
    }
    let process = process(&containers, &container, matches, &words)?;
    let result = crate::event_loop()?.block_on(async {
        let exec = Exec::new(&containers, &container, tty).await?;
        if detach {
            exec.start(
                &process,
                &Streams {
                    terminal: tty,
                    ..Streams::default()
                },
            )
            .await?;
            return Ok(0);
        }
        let (left, mut readers) = mpsc::channel(1);
        let left_too = left.clone();
        let ends = Ends {
            stdin: interactive.then(|| Box::new(copy_stdin) as Work<File>),
            stdout: Box::new(move |file| {
                if copy_output(file, &mut io::stdout().lock()).is_err() {
                    let _ = left.try_send(());
                }
            }),
            stderr: Box::new(move |file| {
                if copy_output(file, &mut io::stderr()).is_err() {
                    let _ = left_too.try_send(());
                }
            }),
        };
        let run = exec.attached(&process, ends);
        tokio::pin!(run);
        tokio::select! {
            status = &mut run => status,
            Some(()) = readers.recv() => {
                // As in a pipeline: who writes to a reader that has left ends.
                exec.kill().await;
                run.await
            }
        }
    });
    result.map_err(|error| match error {
        Error::Shim {
            code: ShimCode::NotFound | ShimCode::PermissionDenied,
            ..
        } => {
            let code = error.run_code();
            Error::Exit {
                code,
                message: error.to_string(),
            }
        }
        other => other,
    })
}

/// The container's own process, with what the flags change.
fn process(
    containers: &Containers,
    container: &Container,
    matches: &ArgMatches,
    words: &[String],
) -> Result<serde_json::Value, Error> {
    let path = containers.bundle(&container.id).join("config.json");
    let text = fs::read(&path).map_err(Error::file("read", &path))?;
    let config: oci_spec::runtime::Spec = serde_json::from_slice(&text)
        .map_err(|error| Error::file("read", &path)(io::Error::other(error)))?;
    let first = config.process().as_ref();
    let capabilities: Vec<String> = first
        .and_then(|process| process.capabilities().as_ref()?.bounding().clone())
        .unwrap_or_default()
        .iter()
        .map(|capability| format!("CAP_{}", capability_name(&capability.to_string())))
        .collect();
    let mut request = container.request.clone();
    request.tty = matches.get_flag("tty");
    if request.tty && !request.env.iter().any(|one| one.starts_with("TERM=")) {
        request.env.push("TERM=xterm".to_owned());
    }
    for text in values(matches, "env") {
        request.env.extend(options::variable(text)?);
    }
    if let Some(directory) = one(matches, "workdir") {
        options::workdir(directory)?;
        directory.clone_into(&mut request.working_dir);
    }
    if let Some(user) = one(matches, "user").filter(|user| !user.is_empty()) {
        user.clone_into(&mut request.user);
    }
    let mut process = spec::process(&request, words, &capabilities, &[]);
    if let Some(limits) = first.and_then(|process| process.rlimits().as_ref()) {
        process["rlimits"] = serde_json::json!(limits);
    }
    Ok(process)
}

/// "CAP_SYS_ADMIN", "SYS_ADMIN": without the prefix.
fn capability_name(text: &str) -> &str {
    text.strip_prefix("CAP_").unwrap_or(text)
}

/// What is done, in a thread of its own, with this side of a stream.
pub type Work<T> = Box<dyn FnOnce(T) + Send>;

/// This side of a program's streams. With a terminal there is no stderr.
pub struct Ends {
    /// Writes to the program.
    pub stdin: Option<Work<File>>,
    /// Reads what it writes.
    pub stdout: Work<Output<File>>,
    /// Reads what it writes.
    pub stderr: Work<Output<File>>,
}

/// One more program in a container.
pub struct Exec {
    shim: Shim,
    id: String,
    exec_id: String,
    tty: bool,
    /// Of its FIFOs.
    directory: PathBuf,
}

impl Drop for Exec {
    fn drop(&mut self) {
        // There was none, or it has gone with the container.
        let _ = fs::remove_dir_all(&self.directory);
    }
}

impl Exec {
    /// One that is not started yet, of a running container.
    ///
    /// # Errors
    /// The shim does not answer.
    pub async fn new(
        containers: &Containers,
        container: &Container,
        tty: bool,
    ) -> Result<Self, Error> {
        let exec_id = Containers::new_id()?.split_off(48);
        let directory = containers.directory(&container.id);
        Ok(Self {
            shim: Shim::of_bundle(&containers.bundle(&container.id)).await?,
            id: container.id.clone(),
            directory: directory.join(format!("exec-{exec_id}")),
            exec_id,
            tty,
        })
    }

    /// Kills it, if it runs.
    pub async fn kill(&self) {
        // It may have ended.
        let _ = self.shim.kill(&self.id, &self.exec_id, KILL, false).await;
    }

    async fn start(&self, process: &serde_json::Value, streams: &Streams) -> Result<(), Error> {
        self.shim
            .exec(&self.id, &self.exec_id, process, streams)
            .await?;
        if let Err(error) = self.shim.start(&self.id, &self.exec_id).await {
            let _ = self.shim.delete(&self.id, &self.exec_id).await;
            return Err(error);
        }
        Ok(())
    }

    /// Runs it to its end; its exit code.
    ///
    /// # Errors
    /// It cannot be run, or the shim has gone.
    pub async fn attached(&self, process: &serde_json::Value, ends: Ends) -> Result<u8, Error> {
        let directory = &self.directory;
        fs::create_dir(directory).map_err(Error::file("create", directory))?;
        let fifo = |name: &str| make_fifo(directory.join(name)).map(Some);
        let interactive = ends.stdin.is_some();
        let streams = Streams {
            terminal: self.tty,
            stdin: if interactive { fifo("stdin")? } else { None },
            stdout: fifo("stdout")?,
            stderr: if self.tty { None } else { fifo("stderr")? },
        };
        let outputs = [open_output(&streams.stdout)?, open_output(&streams.stderr)?];
        self.start(process, &streams).await?;
        let raw = (self.tty && interactive)
            .then(terminal::Raw::enter)
            .transpose()?;
        let (done, mut drained) = mpsc::channel(2);
        let (progress, mut copies) = (Arc::new(Progress::default()), 0);
        for (file, work) in outputs.into_iter().zip([ends.stdout, ends.stderr]) {
            if let Some(file) = file {
                let (done, progress) = (done.clone(), progress.clone());
                copies += 1;
                spawn("output", move || {
                    // From here on the shim holds the writing end, so reading waits for data or
                    // the end.
                    if rustix::io::ioctl_fionbio(&file, false).is_ok() {
                        work(Output::new(file, &progress));
                    }
                    let _ = done.blocking_send(());
                })?;
            }
        }
        if let Some((fifo, work)) = streams.stdin.zip(ends.stdin) {
            self.feed(fifo, work)?;
        }
        let status = self.wait().await;
        let drain = async {
            for _ in 0..copies {
                drained.recv().await;
            }
        };
        let limit = scaled(Duration::from_secs(2));
        progress.outlast_future(limit, drain).await;
        drop(raw);
        let status = status?;
        let _ = self.shim.delete(&self.id, &self.exec_id).await;
        Ok(u8::try_from(status).unwrap_or(u8::MAX))
    }

    /// Waits for the end; the terminal's size is passed on meanwhile.
    async fn wait(&self) -> Result<u32, Error> {
        let ended = self.shim.wait(&self.id, &self.exec_id);
        tokio::pin!(ended);
        if !self.tty {
            return self.or_with_container(ended.await);
        }
        let mut changed =
            tokio::signal::unix::signal(tokio::signal::unix::SignalKind::window_change())
                .map_err(Error::io("watch for the terminal's size"))?;
        loop {
            if let Some((rows, columns)) = terminal::size() {
                // It may have ended at this moment.
                let _ = self
                    .shim
                    .resize(&self.id, &self.exec_id, rows, columns)
                    .await;
            }
            tokio::select! {
                ended = &mut ended => return self.or_with_container(ended),
                _ = changed.recv() => {}
            }
        }
    }

    /// A program whose container goes is killed with it, although nobody is left to say so.
    fn or_with_container(&self, ended: Result<u32, Error>) -> Result<u32, Error> {
        match ended {
            Err(Error::Shim {
                code: ShimCode::Gone | ShimCode::NotFound,
                ..
            }) => Ok(137),
            other => other,
        }
    }

    /// Passes standard input on, by a thread that ends with the process.
    fn feed(&self, fifo: PathBuf, work: Work<File>) -> Result<(), Error> {
        let (ended, mut end) = mpsc::channel::<()>(1);
        spawn("stdin", move || {
            if let Ok(pipe) = File::options().write(true).open(fifo) {
                work(pipe);
            }
            let _ = ended.blocking_send(());
        })?;
        let (shim, id, exec_id, tty) = (
            self.shim.clone(),
            self.id.clone(),
            self.exec_id.clone(),
            self.tty,
        );
        tokio::spawn(async move {
            end.recv().await;
            if !tty {
                let _ = shim.close_stdin(&id, &exec_id).await;
            }
        });
        Ok(())
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    let thread = std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(128 << 10);
    thread
        .spawn(work)
        .map(drop)
        .map_err(Error::io("start a thread"))
}

/// Opens the reading end without waiting for the shim, which opens its own later.
fn open_output(path: &Option<PathBuf>) -> Result<Option<File>, Error> {
    let Some(path) = path else { return Ok(None) };
    rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map(|fd| Some(File::from(fd)))
    .map_err(|error| Error::file("open the FIFO", path)(io::Error::from(error)))
}

/// Passes a program's output on until it ends.
///
/// # Errors
/// Nobody wants it.
pub fn copy_output(mut file: impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    while let Ok(length @ 1..) = file.read(&mut buffer) {
        to.write_all(&buffer[..length]).and_then(|()| to.flush())?;
    }
    Ok(())
}

/// Passes standard input on until it ends or the program does not want it.
pub fn copy_stdin(mut pipe: File) {
    let mut buffer = vec![0; CHUNK];
    let mut stdin = io::stdin().lock();
    loop {
        match stdin.read(&mut buffer) {
            Ok(length @ 1..) if pipe.write_all(&buffer[..length]).is_ok() => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            _ => return,
        }
    }
}
