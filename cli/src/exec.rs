//! `exec`: one more program in a running container.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    time::Duration,
};

use caisson_sandbox::scaled;
use clap::ArgMatches;
use rustix::fs::{Mode, OFlags};
use tokio::sync::mpsc;

use crate::{
    arguments::{one, rest, values},
    container::{Container, Containers, Status},
    error::{Error, ShimCode},
    options,
    shim::{Shim, Streams, make_fifo},
    spec, terminal,
};

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
    let exec_id = Containers::new_id()?.split_off(48);
    let directory = containers
        .directory(&container.id)
        .join(format!("exec-{exec_id}"));
    let result = crate::event_loop()?.block_on(async {
        let shim = Shim::of_bundle(&containers.bundle(&container.id)).await?;
        let exec = Exec {
            shim,
            id: container.id.clone(),
            exec_id,
            tty,
        };
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
        exec.attached(&process, &directory, interactive).await
    });
    if !detach {
        // Gone already when the container was removed meanwhile.
        let _ = fs::remove_dir_all(&directory);
    }
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
    let capabilities: Vec<String> = config
        .process()
        .as_ref()
        .and_then(|process| process.capabilities().as_ref()?.bounding().clone())
        .unwrap_or_default()
        .iter()
        .map(|capability| format!("CAP_{}", capability_name(&capability.to_string())))
        .collect();
    let mut request = container.request.clone();
    request.tty = matches.get_flag("tty");
    for text in values(matches, "env") {
        request.env.extend(options::variable(text)?);
    }
    if let Some(directory) = one(matches, "workdir") {
        options::workdir(directory)?;
        directory.clone_into(&mut request.working_dir);
    }
    if let Some(user) = one(matches, "user") {
        user.clone_into(&mut request.user);
    }
    Ok(spec::process(&request, words, &capabilities, &[]))
}

/// "CAP_SYS_ADMIN", "SYS_ADMIN": without the prefix.
fn capability_name(text: &str) -> &str {
    text.strip_prefix("CAP_").unwrap_or(text)
}

struct Exec {
    shim: Shim,
    id: String,
    exec_id: String,
    tty: bool,
}

impl Exec {
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

    async fn attached(
        &self,
        process: &serde_json::Value,
        directory: &Path,
        interactive: bool,
    ) -> Result<u8, Error> {
        fs::create_dir(directory).map_err(Error::file("create", directory))?;
        let fifo = |name: &str| make_fifo(directory.join(name)).map(Some);
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
        let mut copies = 0;
        for (file, error_stream) in outputs.into_iter().zip([false, true]) {
            if let Some(file) = file {
                let done = done.clone();
                copies += 1;
                spawn("output", move || {
                    copy_output(file, error_stream);
                    let _ = done.blocking_send(());
                })?;
            }
        }
        if let Some(fifo) = streams.stdin {
            self.feed(fifo)?;
        }
        let status = self.wait().await;
        let drain = async {
            for _ in 0..copies {
                drained.recv().await;
            }
        };
        // Somebody in the container may hold the stream open, or nobody reads ours.
        let _ = tokio::time::timeout(scaled(Duration::from_secs(2)), drain).await;
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
    fn feed(&self, fifo: PathBuf) -> Result<(), Error> {
        let (ended, mut end) = mpsc::channel::<()>(1);
        spawn("stdin", move || {
            copy_stdin(&fifo);
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

fn copy_output(mut file: File, error_stream: bool) {
    // From here on the shim holds the writing end, so reading waits for data or the end.
    if rustix::io::ioctl_fionbio(&file, false).is_err() {
        return;
    }
    let mut buffer = vec![0; CHUNK];
    while let Ok(length @ 1..) = file.read(&mut buffer) {
        let bytes = &buffer[..length];
        let written = if error_stream {
            io::stderr().write_all(bytes)
        } else {
            let mut stdout = io::stdout().lock();
            stdout.write_all(bytes).and_then(|()| stdout.flush())
        };
        if written.is_err() {
            return;
        }
    }
}

fn copy_stdin(fifo: &Path) {
    let Ok(mut pipe) = File::options().write(true).open(fifo) else {
        return;
    };
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
