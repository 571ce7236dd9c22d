//! Child processes that never outlive the benchmark.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use crate::error::BenchError;

/// A running program; killed and reaped when dropped.
#[derive(Debug)]
pub struct Running {
    name: String,
    child: Child,
}

impl Running {
    /// Starts `command`, called `name` in errors.
    ///
    /// # Errors
    /// When the program cannot be executed.
    pub fn spawn(name: &str, command: &mut Command) -> Result<Self, BenchError> {
        let child = command.spawn().map_err(BenchError::io(format!(
            "cannot start {}",
            command.get_program().to_string_lossy()
        )))?;
        Ok(Self {
            name: name.into(),
            child,
        })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The child itself, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// The exit status, if it has ended.
    ///
    /// # Errors
    /// Those of waitpid(2).
    pub fn ended(&mut self) -> Result<Option<ExitStatus>, BenchError> {
        self.child
            .try_wait()
            .map_err(BenchError::io(format!("waiting for {}", self.name)))
    }

    /// Waits for the end, at most `limit`.
    ///
    /// # Errors
    /// [`BenchError::Deadline`] when it is still running then.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus, BenchError> {
        let started = Instant::now();
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            if started.elapsed() > limit {
                return Err(BenchError::Deadline {
                    program: self.name.clone(),
                    limit,
                    output: String::new(),
                });
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself; then both are errors that mean nothing.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The last 600 bytes of a text file, on one line; empty when it cannot be read.
pub fn tail(path: &Path) -> String {
    let bytes = std::fs::read(path).unwrap_or_default();
    let start = bytes.len().saturating_sub(600);
    String::from_utf8_lossy(&bytes[start..])
        .replace('\r', "")
        .trim()
        .replace('\n', " | ")
}

/// Runs a command to its end; its output shows only when it fails.
///
/// # Errors
/// When it cannot be started or does not succeed.
pub fn quiet(command: &mut Command) -> Result<(), BenchError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(BenchError::io(format!("cannot start {program}")))?;
    if output.status.success() {
        return Ok(());
    }
    Err(BenchError::Program {
        program: format!("{program} {:?}", command.get_args().collect::<Vec<_>>()),
        problem: output.status.to_string(),
        output: String::from_utf8_lossy(&output.stderr).trim().to_string(),
    })
}

/// A program on the path.
///
/// # Errors
/// [`BenchError::Missing`] with the package to install.
pub fn find(name: &str, package: &'static str) -> Result<PathBuf, BenchError> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(name))
        .find(|file| file.exists())
        .ok_or_else(|| BenchError::Missing {
            what: "program",
            path: name.into(),
            remedy: match package {
                "qemu-system-x86" => "install qemu-system-x86",
                "busybox-static" => "install busybox-static",
                "runc" => "install runc",
                "crun" => "install crun",
                "bash" => "install bash",
                "e2fsprogs" => "install e2fsprogs",
                "erofs-utils" => "install erofs-utils",
                "fio" => "install fio",
                "git" => "install git",
                "iperf3" => "install iperf3",
                "iproute2" => "install iproute2",
                _ => "install jq",
            },
        })
}
