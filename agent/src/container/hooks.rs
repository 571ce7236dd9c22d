//! OCI hooks. They run in the guest: a program of the host is not there, and a
//! hook that cannot run fails the container as the specification demands.
//!
//! Hooks of the time before the program runs belong to the container's init process.
//! Those of the time after (poststart, poststop) have a process of their own,
//! `caisson-agent run-hooks`, so that PID 1 never waits for one of them.

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    path::Path,
    process::{ChildStderr, Command, ExitCode, Stdio},
    time::{Duration, Instant},
};

use oci_spec::runtime::{Hook, Spec};
use rustix::pipe::{PipeFlags, pipe_with};
use serde::{Deserialize, Serialize};
use tokio::{io::AsyncReadExt, net::unix::pipe::Receiver};

use super::request::memory_file;
use crate::failure::{During, Failure, Result};

/// First argument of the program when it runs hooks beside the agent.
pub const VERB: &str = "run-hooks";

/// When a hook runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    /// In the guest's namespaces, before the container's root is entered.
    CreateRuntime,
    /// In the container's namespaces, before its root is entered.
    CreateContainer,
    /// In the container, before the program is executed.
    StartContainer,
    /// In the guest's namespaces, once the program runs.
    Poststart,
    /// In the guest's namespaces, once the container is gone.
    Poststop,
}

impl Stage {
    /// Status of the container that the hook is told (OCI runtime-spec, "State").
    fn status(self) -> &'static str {
        match self {
            Self::CreateRuntime | Self::CreateContainer => "creating",
            Self::StartContainer => "created",
            Self::Poststart => "running",
            Self::Poststop => "stopped",
        }
    }
}

/// What a hook is told of its container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// The container.
    pub id: String,
    /// PID in the guest, 0 when there is none (yet).
    pub pid: u32,
    /// Of the specification.
    pub annotations: HashMap<String, String>,
}

impl About {
    /// Container `id`, which has no process.
    pub fn new(id: &str, spec: &Spec) -> Self {
        Self {
            id: id.to_owned(),
            pid: 0,
            annotations: spec.annotations().clone().unwrap_or_default(),
        }
    }

    /// The state that a hook finds on its standard input.
    fn state(&self, stage: Stage) -> String {
        let mut state = serde_json::json!({
            "ociVersion": "1.2.0",
            "id": self.id,
            "status": stage.status(),
            "bundle": "/",
            "annotations": self.annotations,
        });
        if self.pid != 0 {
            state["pid"] = self.pid.into();
        }
        state.to_string()
    }
}

/// A hook without a time limit of its own gets this.
const DEFAULT_LIMIT: Duration = Duration::from_secs(60);

/// How long an answer to the host is held up by poststart and poststop hooks; those that take
/// longer go on unwatched, up to their own limits. Well below the host's patience.
const MAX_HOLD_UP: Duration = Duration::from_secs(10);

/// Most that is kept of what a hook says, bytes.
const MAX_WORDS: usize = 4096;

/// Hooks of `spec` for `stage`.
pub fn of(spec: &Spec, stage: Stage) -> Vec<Hook> {
    let Some(hooks) = spec.hooks() else {
        return Vec::new();
    };
    let list = match stage {
        Stage::CreateRuntime => {
            // Deprecated prestart hooks run at the same point.
            #[allow(deprecated)]
            let prestart = hooks.prestart().iter().flatten();
            return prestart
                .chain(hooks.create_runtime().iter().flatten())
                .cloned()
                .collect();
        }
        Stage::CreateContainer => hooks.create_container(),
        Stage::StartContainer => hooks.start_container(),
        Stage::Poststart => hooks.poststart(),
        Stage::Poststop => hooks.poststop(),
    };
    list.clone().unwrap_or_default()
}

/// Runs hooks one after the other.
///
/// # Errors
/// The first hook that cannot run, fails, or takes too long.
pub fn run(hooks: &[Hook], stage: Stage, about: &About) -> Result<()> {
    hooks
        .iter()
        .try_for_each(|hook| run_one(hook, stage, about))
}

/// Runs one hook with the container's state on its standard input.
fn run_one(hook: &Hook, stage: Stage, about: &About) -> Result<()> {
    let path = hook.path();
    let fail =
        |what: String| Failure::internal(format!("{stage:?} hook {}: {what}", path.display()));
    if !Path::new(path).exists() {
        return Err(fail(
            "no such program in the guest (hooks run inside the microVM)".to_owned(),
        ));
    }
    let mut command = Command::new(path);
    if let Some((_, arguments)) = hook.args().as_deref().and_then(<[String]>::split_first) {
        command.args(arguments);
    }
    command.env_clear();
    for variable in hook.env().iter().flatten() {
        if let Some((name, value)) = variable.split_once('=') {
            command.env(name, value);
        }
    }
    // A file and no pipe: a hook need not read it.
    let state = memory_file("state", about.state(stage).as_bytes())?;
    let mut child = command
        .stdin(state)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| fail(format!("cannot run: {error}")))?;
    let mut stderr = child.stderr.take();
    if let Some(stderr) = &stderr {
        rustix::io::ioctl_fionbio(stderr, true).during(|| "prepare a pipe".to_owned())?;
    }
    let mut words = Vec::new();
    let limit = hook
        .timeout()
        .and_then(|seconds| u64::try_from(seconds).ok())
        .map_or(DEFAULT_LIMIT, Duration::from_secs);
    let deadline = Instant::now() + limit;
    loop {
        let status = child
            .try_wait()
            .map_err(|error| fail(format!("cannot wait: {error}")))?;
        if let Some(stderr) = &mut stderr {
            listen(stderr, &mut words);
        }
        match status {
            Some(status) if status.success() => return Ok(()),
            Some(status) => {
                let words = String::from_utf8_lossy(&words);
                return Err(fail(format!("{status} {}", words.trim())));
            }
            None if Instant::now() > deadline => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(fail(format!("still running after {} s", limit.as_secs())));
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    }
}

/// Takes what a hook has said, so that it never waits to be heard, and keeps the beginning.
fn listen(stderr: &mut ChildStderr, words: &mut Vec<u8>) {
    let mut buffer = [0; MAX_WORDS];
    // A pipe's worth; one that says more is heard again in two milliseconds.
    for _ in 0..16 {
        let Ok(length @ 1..) = stderr.read(&mut buffer) else {
            return;
        };
        let room = MAX_WORDS - words.len();
        words.extend_from_slice(&buffer[..length.min(room)]);
    }
}

/// Hooks for a process beside the agent.
#[derive(Debug, Serialize, Deserialize)]
struct Beside {
    hooks: Vec<Hook>,
    stage: Stage,
    about: About,
}

/// Runs hooks beside the agent; what fails is only logged, as the specification wants it.
/// Comes back when all have run, or after [`MAX_HOLD_UP`].
pub async fn run_beside(hooks: Vec<Hook>, stage: Stage, about: About) {
    if hooks.is_empty() {
        return;
    }
    let id = about.id.clone();
    let heard = match start_beside(&Beside {
        hooks,
        stage,
        about,
    }) {
        Ok(failures) => tokio::time::timeout(MAX_HOLD_UP, hear(failures)).await,
        Err(failure) => {
            log::warn!("container {id}: cannot run {stage:?} hooks: {failure}");
            return;
        }
    };
    match heard {
        Ok(text) => text
            .lines()
            .for_each(|line| log::warn!("container {id}: {line}")),
        Err(_) => log::warn!(
            "container {id}: {stage:?} hooks still run after {} s and are not waited for any longer",
            MAX_HOLD_UP.as_secs()
        ),
    }
}

fn start_beside(beside: &Beside) -> Result<Receiver> {
    let text = serde_json::to_vec(beside)
        .map_err(|error| Failure::internal(format!("cannot encode them: {error}")))?;
    let request = memory_file("hooks", &text)?;
    let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC).during(|| "make a pipe".to_owned())?;
    rustix::io::ioctl_fionbio(&ours, true).during(|| "prepare a pipe".to_owned())?;
    Command::new("/proc/self/exe")
        .arg(VERB)
        .env_clear()
        .stdin(request)
        .stdout(theirs)
        .stderr(Stdio::null())
        .spawn()
        .during(|| "start a process".to_owned())
        // Reaped with everybody else.
        .map(drop)?;
    Receiver::from_owned_fd(ours).during(|| "watch a pipe".to_owned())
}

async fn hear(failures: Receiver) -> String {
    let mut text = Vec::new();
    let limit = u64::try_from(4 * MAX_WORDS).unwrap_or(u64::MAX);
    let _ = failures.take(limit).read_to_end(&mut text).await;
    String::from_utf8_lossy(&text).into_owned()
}

/// `caisson-agent run-hooks`: the request is on standard input, failures go to standard output,
/// a line each.
pub fn main() -> ExitCode {
    match beside(io::stdin().lock(), &mut io::stdout().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // The agent may have stopped listening.
            let _ = writeln!(io::stdout(), "{failure}");
            ExitCode::FAILURE
        }
    }
}

fn beside(request: impl Read, failures: &mut impl Write) -> Result<()> {
    let Beside {
        hooks,
        stage,
        about,
    } = serde_json::from_reader(request)
        .map_err(|error| Failure::invalid(format!("malformed request: {error}")))?;
    // The agent's protection is not for hooks.
    super::init::write_oom_score(0)?;
    // One that fails does not keep the next from running.
    for hook in hooks {
        if let Err(failure) = run_one(&hook, stage, &about) {
            let _ = writeln!(failures, "{}", failure.message.replace('\n', " "));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Hook {
        serde_json::from_value(serde_json::json!({
            "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"], "timeout": 5,
        }))
        .unwrap()
    }

    fn about() -> About {
        About {
            id: "c1".to_owned(),
            pid: 42,
            annotations: HashMap::from([("a".to_owned(), "b".to_owned())]),
        }
    }

    #[test]
    fn a_hook_reads_the_state() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("state");
        let hook = shell(&format!("cat > {}", file.display()));
        run(&[hook], Stage::Poststart, &about()).unwrap();
        let state: serde_json::Value =
            serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        let expected = serde_json::json!({
            "ociVersion": "1.2.0", "id": "c1", "pid": 42, "status": "running", "bundle": "/",
            "annotations": {"a": "b"},
        });
        assert_eq!(state, expected);
    }

    #[test]
    fn a_failing_hook_tells_its_words_however_many_there_are() {
        let hook = shell("echo no luck >&2; head -c 1000000 /dev/zero >&2; exit 3");
        let failure = run(&[hook], Stage::CreateRuntime, &about()).unwrap_err();
        assert!(
            failure.message.contains("/bin/sh") && failure.message.contains("no luck"),
            "{failure}"
        );
        let mut hook = shell("sleep 60");
        hook.set_timeout(Some(0));
        let failure = run(&[hook], Stage::CreateRuntime, &about()).unwrap_err();
        assert!(failure.message.contains("still running"), "{failure}");
    }

    #[test]
    fn beside_the_agent_all_run_and_failures_are_lines() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("last");
        let mut missing = shell("");
        missing.set_path("/does/not/exist".into());
        let request = Beside {
            hooks: vec![
                shell("echo two >&2; echo lines >&2; exit 1"),
                missing,
                shell(&format!("touch {}", file.display())),
            ],
            stage: Stage::Poststop,
            about: about(),
        };
        let mut failures = Vec::new();
        beside(&serde_json::to_vec(&request).unwrap()[..], &mut failures).unwrap();
        let failures = String::from_utf8(failures).unwrap();
        let lines: Vec<_> = failures.lines().collect();
        assert_eq!(lines.len(), 2, "{failures}");
        assert!(lines[0].contains("two lines") && lines[1].contains("/does/not/exist"));
        assert!(file.exists());
        assert!(beside(&b"nonsense"[..], &mut Vec::new()).is_err());
    }
}
