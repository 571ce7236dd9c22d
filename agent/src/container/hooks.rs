//! OCI hooks. They run in the guest: a program of the host is not there, and a
//! hook that cannot run fails the container as the specification demands.

use std::{
    io::{Read, Write},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use oci_spec::runtime::{Hook, Spec};

use crate::failure::{Failure, Kind, Result};

/// When a hook runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// In the guest's namespaces, before the container's root is entered.
    CreateRuntime,
    /// In the container's namespaces, before its root is entered.
    CreateContainer,
    /// In the container, before the program is executed.
    StartContainer,
}

/// A hook without a time limit of its own gets this.
const DEFAULT_LIMIT: Duration = Duration::from_secs(60);

/// Hooks of `spec` for `stage`.
pub fn of(spec: &Spec, stage: Stage) -> Vec<Hook> {
    let Some(hooks) = spec.hooks() else {
        return Vec::new();
    };
    match stage {
        Stage::CreateRuntime => {
            // Deprecated prestart hooks run at the same point.
            #[allow(deprecated)]
            let prestart = hooks.prestart().iter().flatten();
            prestart
                .chain(hooks.create_runtime().iter().flatten())
                .cloned()
                .collect()
        }
        Stage::CreateContainer => hooks.create_container().clone().unwrap_or_default(),
        Stage::StartContainer => hooks.start_container().clone().unwrap_or_default(),
    }
}

/// Refuses the hooks that Caisson does not run.
///
/// # Errors
/// There are poststart or poststop hooks.
pub fn check(spec: &Spec) -> Result<()> {
    let some = |list: &Option<Vec<Hook>>| list.as_ref().is_some_and(|list| !list.is_empty());
    match spec.hooks() {
        Some(hooks) if some(hooks.poststart()) || some(hooks.poststop()) => Err(Failure::new(
            Kind::Unimplemented,
            "poststart and poststop hooks are not supported: they would run where the container is not",
        )),
        _ => Ok(()),
    }
}

/// Runs the hooks of `stage` one after the other.
///
/// # Errors
/// The first hook that cannot run, fails, or takes too long.
pub fn run(spec: &Spec, stage: Stage, id: &str) -> Result<()> {
    for hook in of(spec, stage) {
        run_one(&hook, stage, id)?;
    }
    Ok(())
}

/// Runs one hook with the container's state on its standard input.
///
/// # Errors
/// As [`run`].
pub fn run_one(hook: &Hook, stage: Stage, id: &str) -> Result<()> {
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
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| fail(format!("cannot run: {error}")))?;
    let state =
        serde_json::json!({ "ociVersion": "1.2.0", "id": id, "status": "creating", "bundle": "/" });
    if let Some(mut stdin) = child.stdin.take() {
        // A hook need not read it.
        let _ = stdin.write_all(state.to_string().as_bytes());
    }
    let limit = hook
        .timeout()
        .and_then(|seconds| u64::try_from(seconds).ok())
        .map_or(DEFAULT_LIMIT, Duration::from_secs);
    let deadline = Instant::now() + limit;
    loop {
        match child
            .try_wait()
            .map_err(|error| fail(format!("cannot wait: {error}")))?
        {
            Some(status) if status.success() => return Ok(()),
            Some(status) => {
                let mut text = String::new();
                if let Some(stderr) = child.stderr.take() {
                    let _ = stderr.take(4096).read_to_string(&mut text);
                }
                return Err(fail(format!("{status} {}", text.trim())));
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
