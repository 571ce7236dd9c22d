//! OCI hooks of the container's own namespaces, run by its init process. They are programs of the
//! guest; one that cannot run fails the container as the specification demands. Those of the
//! runtime's namespace run on the host and do not come here.

use std::{
    collections::HashMap,
    io::Read,
    path::Path,
    process::{ChildStderr, Command, Stdio},
    time::{Duration, Instant},
};

use oci_spec::runtime::{Hook, Spec};
use serde::{Deserialize, Serialize};

use super::request::memory_file;
use crate::failure::{During, Failure, Result};

/// When a hook runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Stage {
    /// In the container's namespaces, before its root is entered.
    CreateContainer,
    /// In the container, before the program is executed.
    StartContainer,
}

impl Stage {
    /// Status of the container that the hook is told (OCI runtime-spec, "State").
    fn status(self) -> &'static str {
        match self {
            Self::CreateContainer => "creating",
            Self::StartContainer => "created",
        }
    }
}

/// What a hook is told of its container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// The container.
    pub id: String,
    /// PID in the guest, 0 when it is not known.
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

/// Most that is kept of what a hook says, bytes.
const MAX_WORDS: usize = 4096;

/// Hooks of `spec` for `stage`.
pub fn of(spec: &Spec, stage: Stage) -> Vec<Hook> {
    let Some(hooks) = spec.hooks() else {
        return Vec::new();
    };
    let list = match stage {
        Stage::CreateContainer => hooks.create_container(),
        Stage::StartContainer => hooks.start_container(),
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
        run(&[hook], Stage::StartContainer, &about()).unwrap();
        let state: serde_json::Value =
            serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        let expected = serde_json::json!({
            "ociVersion": "1.2.0", "id": "c1", "pid": 42, "status": "created", "bundle": "/",
            "annotations": {"a": "b"},
        });
        assert_eq!(state, expected);
    }

    #[test]
    fn a_failing_hook_tells_its_words_however_many_there_are() {
        let hook = shell("echo no luck >&2; head -c 1000000 /dev/zero >&2; exit 3");
        let failure = run(&[hook], Stage::CreateContainer, &about()).unwrap_err();
        assert!(
            failure.message.contains("/bin/sh") && failure.message.contains("no luck"),
            "{failure}"
        );
        let mut hook = shell("sleep 60");
        hook.set_timeout(Some(0));
        let failure = run(&[hook], Stage::CreateContainer, &about()).unwrap_err();
        assert!(failure.message.contains("still running"), "{failure}");
    }
}
