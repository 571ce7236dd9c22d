//! `cp`: files between the host and a running container.
//!
//! One side packs a tar stream and the other unpacks it; the agent is the container's side, by an
//! exec without a program. What a destination means is decided where it is.

use std::{
    fs::File,
    future::Future,
    io::{self, BufWriter, Read},
    path::{Path, PathBuf},
    pin::Pin,
    time::Duration,
};

use caisson_archive::{self as archive, Attributes, Destination, Request};
use caisson_sandbox::scaled;
use clap::ArgMatches;
use tokio::sync::mpsc;

use crate::{
    container::{Container, Containers, Status},
    drain::Output,
    error::Error,
    exec::{Ends, Exec, Work, copy_output, copy_stdin},
};

/// What is kept of the agent's words.
const MAX_WORDS: u64 = 4096;

/// One of the two operands.
#[derive(Debug, PartialEq, Eq)]
enum Place<'a> {
    /// A tar stream on standard input or output.
    Stream,
    Host(&'a Path),
    Container {
        name: &'a str,
        path: PathBuf,
    },
}

impl<'a> Place<'a> {
    /// As docker: what begins with "/" or "." is of the host, whatever colons it has.
    fn of(text: &'a str) -> Result<Self, Error> {
        if text == "-" {
            return Ok(Self::Stream);
        }
        match text.split_once(':') {
            Some((name, path)) if !text.starts_with(['/', '.']) => {
                if name.is_empty() || path.is_empty() {
                    return Err(Error::Usage(format!(
                        "cp {text}: give CONTAINER:PATH, or ./{text} for a file of the host"
                    )));
                }
                // Relative paths are below the container's root.
                let path = Path::new("/").join(path);
                Ok(Self::Container { name, path })
            }
            _ if text.is_empty() => Err(Error::Usage("cp: a path is empty".to_owned())),
            _ => Ok(Self::Host(Path::new(text))),
        }
    }
}

/// Runs the verb.
///
/// # Errors
/// The container does not run, a path is not there, or the copy failed on either side.
pub fn run(matches: &ArgMatches) -> Result<u8, Error> {
    let operand = |name: &str| {
        let text = matches.get_one::<String>(name);
        text.map(String::as_str).unwrap_or_default()
    };
    let (source, target) = (operand("source"), operand("target"));
    let (follow, owners) = (matches.get_flag("follow-link"), matches.get_flag("archive"));
    match (Place::of(source)?, Place::of(target)?) {
        (Place::Container { name, path }, to @ (Place::Host(_) | Place::Stream)) => {
            let request = Request::Pack {
                source: path,
                follow,
            };
            let attributes = Attributes {
                owners,
                set_id: owners,
                // What a container calls a disk of its own would be one of the host's here.
                devices: false,
            };
            let work: Copy<Output<File>> = match to {
                Place::Host(path) => {
                    let destination = Destination::Path(path.to_owned());
                    Box::new(move |file| archive::unpack(file, &destination, attributes))
                }
                _ => Box::new(|file| {
                    copy_output(file, &mut io::stdout().lock()).map_err(|source| {
                        archive::Error::File {
                            what: "write to",
                            path: "standard output".into(),
                            source,
                        }
                    })
                }),
            };
            copy(name, &request, Side::Reads(work), source)
        }
        (from @ (Place::Host(_) | Place::Stream), Place::Container { name, path }) => {
            let (destination, work): (_, Copy<File>) = match from {
                Place::Host(path) => {
                    // Before a process is started in the container.
                    path.symlink_metadata().map_err(Error::file("find", path))?;
                    let path = path.to_owned();
                    let work = move |file| {
                        archive::pack(&path, follow, BufWriter::with_capacity(64 << 10, file))
                    };
                    (Destination::Path as fn(_) -> _, Box::new(work))
                }
                _ => (Destination::Directory as fn(_) -> _, {
                    Box::new(|file| {
                        copy_stdin(file);
                        Ok(())
                    })
                }),
            };
            let request = Request::Unpack {
                destination: destination(path),
                attributes: Attributes {
                    owners,
                    set_id: true,
                    devices: true,
                },
            };
            copy(name, &request, Side::Writes(work), target)
        }
        (Place::Container { .. }, Place::Container { .. }) => Err(Error::Usage(
            "cp: copying between containers is not supported: copy to the host first".to_owned(),
        )),
        _ => Err(Error::Usage(
            "cp: one of the two must be CONTAINER:PATH".to_owned(),
        )),
    }
}

type Copy<T> = Box<dyn FnOnce(T) -> Result<(), archive::Error> + Send>;

/// What this side does with the stream.
enum Side {
    Reads(Copy<Output<File>>),
    Writes(Copy<File>),
}

/// `shown` is the container's operand.
fn copy(name: &str, request: &Request, side: Side, shown: &str) -> Result<u8, Error> {
    let containers = Containers::open()?;
    let container = containers.find(name)?;
    if container.state.status != Status::Running {
        return Err(Error::State(format!(
            "container {} is not running: what it wrote went with its microVM",
            container.id
        )));
    }
    crate::event_loop()?.block_on(transfer(&containers, &container, request, side, shown))?;
    Ok(0)
}

async fn transfer(
    containers: &Containers,
    container: &Container,
    request: &Request,
    side: Side,
    shown: &str,
) -> Result<(), Error> {
    let exec = Exec::new(containers, container, false).await?;
    let (done, mut outcome) = mpsc::channel(1);
    let (words, mut said) = mpsc::channel(1);
    let reads = matches!(side, Side::Reads(_));
    let ends = ends(side, done, words);
    let process = serde_json::json!({
        "cwd": "/",
        "args": ["cp"],
        "user": { "uid": 0, "gid": 0 },
        archive::MEMBER: request,
    });
    let (status, ours) = {
        let run = exec.attached(&process, ends);
        tokio::pin!(run);
        tokio::select! {
            status = &mut run => (Some(status?), None),
            Some(Err(error)) = outcome.recv() => {
                (given_up(&exec, run, &error).await?, Some(error))
            }
        }
    };
    let ours = match ours {
        // The stream's end is there; what is left of it is on its way to the disk.
        None if reads && status == Some(0) => outcome.recv().await.and_then(Result::err),
        ours => ours,
    };
    match (status, ours) {
        (Some(0), None) => Ok(()),
        (Some(0) | None, Some(error)) => Err(Error::Exit {
            code: 1,
            message: format!("cp: {error}"),
        }),
        (status, _) => {
            let said: String = said.recv().await.unwrap_or_default();
            let said = match said.trim() {
                "" => format!("it ended with code {}", status.unwrap_or_default()),
                said => said.to_owned(),
            };
            Err(Error::Exit {
                code: 1,
                message: format!("cp {shown}: {said}"),
            })
        }
    }
}

/// After this side's `error`: the container's exit code, if that knows more of it.
async fn given_up(
    exec: &Exec,
    mut run: Pin<&mut impl Future<Output = Result<u8, Error>>>,
    error: &archive::Error,
) -> Result<Option<u8>, Error> {
    // A stream that breaks off, or that nobody reads, does so by the other side.
    let of_the_other = matches!(error, archive::Error::Output(_) | archive::Error::Stream(_));
    if of_the_other {
        let patience = scaled(Duration::from_secs(2));
        if let Ok(status) = tokio::time::timeout(patience, &mut run).await {
            return status.map(Some);
        }
    }
    exec.kill().await;
    run.await.map(|_| None)
}

/// `done` hears how this side's work ended, `words` what the agent had to say.
fn ends(
    side: Side,
    done: mpsc::Sender<Result<(), archive::Error>>,
    words: mpsc::Sender<String>,
) -> Ends {
    fn of<T: 'static>(copy: Copy<T>, done: mpsc::Sender<Result<(), archive::Error>>) -> Work<T> {
        Box::new(move |stream| {
            let _ = done.blocking_send(copy(stream));
        })
    }
    let (stdin, stdout): (Option<Work<File>>, Work<Output<File>>) = match side {
        Side::Reads(copy) => (None, of(copy, done)),
        Side::Writes(copy) => (Some(of(copy, done)), Box::new(drop)),
    };
    let stderr = move |file: Output<File>| {
        let mut said = Vec::new();
        let _ = file.take(MAX_WORDS).read_to_end(&mut said);
        let _ = words.blocking_send(String::from_utf8_lossy(&said).into_owned());
    };
    Ends {
        stdin,
        stdout,
        stderr: Box::new(stderr),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_are_dockers() {
        let of = |text| Place::of(text).unwrap();
        let container = |name, path: &str| Place::Container {
            name,
            path: path.into(),
        };
        assert_eq!(of("-"), Place::Stream);
        assert_eq!(of("one:/etc"), container("one", "/etc"));
        assert_eq!(of("one:etc/."), container("one", "/etc/."));
        assert_eq!(of("one:/a:b"), container("one", "/a:b"));
        for host in ["/a:b", "./a:b", "..", "plain", "-x"] {
            assert_eq!(of(host), Place::Host(Path::new(host)));
        }
        for wrong in ["", ":/etc", "one:"] {
            assert!(Place::of(wrong).is_err(), "{wrong}");
        }
    }
}
