//! Programs that take a container's output (containerd: docs/logging, `binary://`).
//!
//! Such a program has the container's stdout at descriptor 3 and its stderr at 4; it closes 5 when
//! it is ready. Its environment is `CONTAINER_ID` and `CONTAINER_NAMESPACE`.

use std::{
    ffi::OsString,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use caisson_sandbox::scaled;
use command_fds::{CommandFdExt, FdMapping};
use rustix::process::{Pid, Signal, kill_process};
use tokio::{
    io::AsyncReadExt,
    net::unix::pipe,
    process::{Child, Command},
};

use crate::error::Error;

/// Longest until a program must be ready.
const READY_LIMIT: Duration = Duration::from_secs(10);

/// From the end of the output to SIGTERM, and from there to SIGKILL.
const END_LIMIT: Duration = Duration::from_secs(10);
const TERM_LIMIT: Duration = Duration::from_secs(2);

/// A running program; dropping it kills it.
#[derive(Debug)]
pub struct Logger {
    child: Child,
    program: PathBuf,
}

/// Writing ends of a program's stdout and stderr.
pub type Ends = (pipe::Sender, pipe::Sender);

impl Logger {
    /// Starts `program` for a container and waits until it is ready.
    ///
    /// # Errors
    /// It cannot be run, or is not ready in time.
    pub async fn start(
        program: &Path,
        arguments: &[OsString],
        must_answer: bool,
        (namespace, container): (&str, &str),
    ) -> Result<(Self, Ends), Error> {
        let failed = || Error::file::<io::Error>("start the logging program", program);
        let (stdout, stdout_end) = pipe().map_err(failed())?;
        let (stderr, stderr_end) = pipe().map_err(failed())?;
        let (ready, ready_end) = io::pipe().map_err(failed())?;
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .env("CONTAINER_ID", container)
            .env("CONTAINER_NAMESPACE", namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        let passed = [stdout, stderr, ready_end.into()];
        let mappings = passed
            .into_iter()
            .zip(3..)
            .map(|(parent_fd, child_fd)| FdMapping {
                parent_fd,
                child_fd,
            });
        command
            .as_std_mut()
            .fd_mappings(mappings.collect())
            .map_err(|error| failed()(io::Error::other(error)))?;
        let child = command.spawn().map_err(failed())?;
        // With it go our copies of the program's ends.
        drop(command);
        let logger = Self {
            child,
            program: program.to_owned(),
        };
        logger.ready(ready.into(), must_answer).await?;
        Ok((logger, (stdout_end, stderr_end)))
    }

    async fn ready(&self, ready: OwnedFd, must_answer: bool) -> Result<(), Error> {
        let failed = || Error::file::<io::Error>("start the logging program", &self.program);
        let mut ready = pipe::Receiver::from_owned_fd(ready).map_err(failed())?;
        let mut byte = [0];
        let limit = scaled(READY_LIMIT);
        match tokio::time::timeout(limit, ready.read(&mut byte)).await {
            Ok(Ok(0)) if must_answer => Err(failed()(io::Error::other(
                "it ended or closed its descriptor without having said that it is ready",
            ))),
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(failed()(error)),
            Err(_) => Err(failed()(io::Error::other(format!(
                "it was not ready within {} s",
                limit.as_secs()
            )))),
        }
    }

    /// Waits for its end, which it should find when its input ends; makes it end otherwise.
    pub async fn finish(mut self) {
        let end = tokio::time::timeout(scaled(END_LIMIT), self.child.wait()).await;
        if let Ok(Ok(status)) = end {
            if !status.success() {
                log::warn!(
                    "the logging program {} ended: {status}",
                    self.program.display()
                );
            }
            return;
        }
        log::warn!(
            "the logging program {} does not end with its input; ending it",
            self.program.display()
        );
        if let Some(pid) = self
            .child
            .id()
            .and_then(|pid| i32::try_from(pid).ok())
            .and_then(Pid::from_raw)
        {
            // The child has not been waited for, so the id is still its own.
            let _ = kill_process(pid, Signal::TERM);
        }
        if tokio::time::timeout(scaled(TERM_LIMIT), self.child.wait())
            .await
            .is_err()
            && let Err(error) = self.child.kill().await
        {
            log::error!(
                "cannot end the logging program {}: {error}",
                self.program.display()
            );
        }
    }
}

fn pipe() -> io::Result<(OwnedFd, pipe::Sender)> {
    let (reader, writer) = io::pipe()?;
    Ok((reader.into(), pipe::Sender::from_owned_fd(writer.into())?))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use tokio::io::AsyncWriteExt;

    use super::*;

    fn script(directory: &Path, text: &str) -> PathBuf {
        let path = directory.join("logger");
        fs::write(&path, format!("#!/bin/sh\n{text}")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[tokio::test(flavor = "current_thread")]
    async fn gets_both_streams_and_ends_with_them() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("out");
        let program = script(
            directory.path(),
            "exec 5>&-; { echo $CONTAINER_NAMESPACE $CONTAINER_ID; cat <&3; cat <&4; } > \"$2\"\n",
        );
        let arguments = ["file".into(), out.clone().into_os_string()];
        let (logger, (mut stdout, mut stderr)) =
            Logger::start(&program, &arguments, false, ("ns", "c1"))
                .await
                .unwrap();
        stdout.write_all(b"to stdout\n").await.unwrap();
        stderr.write_all(b"to stderr\n").await.unwrap();
        drop((stdout, stderr));
        logger.finish().await;
        assert_eq!(
            fs::read_to_string(out).unwrap(),
            "ns c1\nto stdout\nto stderr\n"
        );
    }

    #[tokio::test(flavor = "current_thread")]
    async fn that_is_not_there_or_not_ready() {
        let missing = Logger::start(Path::new("/nowhere/logger"), &[], false, ("n", "c")).await;
        assert!(missing.unwrap_err().to_string().contains("/nowhere/logger"));
        let directory = tempfile::tempdir().unwrap();
        let program = script(directory.path(), "exit 0\n");
        let silent = Logger::start(&program, &[], true, ("n", "c")).await;
        assert!(silent.unwrap_err().to_string().contains("ready"));
        assert!(
            Logger::start(&program, &[], false, ("n", "c"))
                .await
                .is_ok()
        );
        let program = script(directory.path(), "printf x >&5; exec sleep 100\n");
        let (logger, _) = Logger::start(&program, &[], true, ("n", "c"))
            .await
            .unwrap();
        let pid = logger.child.id().unwrap();
        drop(logger);
        for _ in 0..500 {
            // Gone, or a zombie that the runtime has yet to reap.
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            if stat.is_empty() || stat.contains(") Z ") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the dropped program lives");
    }
}
