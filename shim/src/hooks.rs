//! A container's hooks that run on the host, as its config.json tells them.
//!
//! Their "container" is its microVM: the process id that they are told is the VMM's, whose network
//! namespace is the pod's.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use caisson_sandbox::hooks::{self, HookError, Hooks};
use oci_spec::runtime::Spec;
use serde_json::{Value, json};

use crate::error::Error;

/// Hooks of a container, and what they are told.
#[derive(Debug)]
pub struct HostHooks {
    hooks: Hooks,
    id: String,
    bundle: String,
    version: String,
    annotations: HashMap<String, String>,
}

impl HostHooks {
    /// Those of the specification in `bundle`.
    ///
    /// # Errors
    /// One is malformed.
    pub fn of(spec: &Spec, id: &str, bundle: &Path) -> Result<Arc<Self>, Error> {
        Ok(Arc::new(Self {
            hooks: Hooks::of(spec)?,
            id: id.to_owned(),
            bundle: bundle.display().to_string(),
            version: spec.version().clone(),
            annotations: spec.annotations().clone().unwrap_or_default(),
        }))
    }

    /// The state of the container (OCI runtime-spec, "State").
    fn state(&self, status: &str, pid: u32) -> Value {
        let mut state = json!({
            "ociVersion": self.version,
            "id": self.id,
            "status": status,
            "bundle": self.bundle,
            "annotations": self.annotations,
        });
        if pid != 0 {
            state["pid"] = pid.into();
        }
        state
    }

    /// Runs `prestart` and `createRuntime`, once the microVM `pid` is there.
    ///
    /// # Errors
    /// The first that fails: the container must not come to be.
    pub async fn create(self: &Arc<Self>, pid: u32) -> Result<(), Error> {
        if !self.hooks.poststop.is_empty() {
            let due = self.due();
            std::fs::write(&due, "").map_err(Error::file("write", due))?;
        }
        if self.hooks.create.is_empty() {
            return Ok(());
        }
        let state = self.state("creating", pid);
        let (this, stage) = (self.clone(), "createRuntime");
        blocking(move || hooks::run(stage, &this.hooks.create, &state)).await??;
        Ok(())
    }

    /// Runs `poststart`. What fails is logged.
    pub async fn started(self: &Arc<Self>, pid: u32) {
        if !self.hooks.poststart.is_empty() {
            let state = self.state("running", pid);
            let this = self.clone();
            log(blocking(move || hooks::run_all("poststart", &this.hooks.poststart, &state)).await);
        }
    }

    /// Runs `poststop`, once the container is gone. What fails is logged.
    pub async fn stopped(self: &Arc<Self>) {
        if !self.hooks.poststop.is_empty() {
            let this = self.clone();
            log(blocking(move || this.run_poststop()).await);
        }
    }

    /// As [`Self::stopped`]; blocks. What has been done is not done again, as the verb `delete` may
    /// come after the server.
    pub fn run_poststop(&self) -> Vec<HookError> {
        let due = self.due();
        if !due.exists() {
            return Vec::new();
        }
        let failures = hooks::run_all("poststop", &self.hooks.poststop, &self.state("stopped", 0));
        let _ = std::fs::remove_file(due);
        failures
    }

    /// A file that is there from the first hook to the last.
    fn due(&self) -> PathBuf {
        Path::new(&self.bundle).join("poststop.due")
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Error::io("run hooks")(std::io::Error::other(error)))
}

fn log(failures: Result<Vec<HookError>, Error>) {
    match failures {
        Ok(failures) => failures.iter().for_each(|error| log::warn!("{error}")),
        Err(error) => log::warn!("{error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn they_are_told_of_the_microvm() {
        let bundle = tempfile::tempdir().unwrap();
        let told = bundle.path().join("told");
        let hook = |name: &str, code: u32| {
            let script = format!("echo {name} $(cat) >> {}; exit {code}", told.display());
            json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"] }])
        };
        let spec = |hooks: Value| {
            let text =
                json!({ "ociVersion": "1.2.0", "annotations": { "a": "b" }, "hooks": hooks });
            let spec: Spec = serde_json::from_value(text).unwrap();
            HostHooks::of(&spec, "one", bundle.path())
        };
        let hooks = spec(json!({
            "prestart": hook("prestart", 0), "createRuntime": hook("createRuntime", 0),
            "poststart": hook("poststart", 1), "poststop": hook("poststop", 0),
            "startContainer": [{ "path": "/in/the/guest" }],
        }))
        .unwrap();
        hooks.create(42).await.unwrap();
        hooks.started(42).await;
        for _ in 0..2 {
            hooks.stopped().await;
        }
        let told = std::fs::read_to_string(&told).unwrap();
        let lines: Vec<_> = told
            .lines()
            .filter_map(|line| line.split_once(' '))
            .map(|(name, state)| {
                let state: Value = serde_json::from_str(state).unwrap();
                assert_eq!(
                    (&state["id"], &state["annotations"]["a"]),
                    (&json!("one"), &json!("b"))
                );
                (
                    name,
                    state["status"].as_str().unwrap().to_owned(),
                    state["pid"].as_u64(),
                )
            })
            .collect();
        let line = |name, status: &str, pid| (name, status.to_owned(), pid);
        assert_eq!(
            lines,
            [
                line("prestart", "creating", Some(42)),
                line("createRuntime", "creating", Some(42)),
                line("poststart", "running", Some(42)),
                line("poststop", "stopped", None),
            ]
        );
        let failing = spec(json!({ "prestart": hook("prestart", 3) })).unwrap();
        let error = failing.create(42).await.unwrap_err().to_string();
        assert!(error.contains("hook #0") && error.contains('3'), "{error}");
        assert!(spec(json!({ "poststop": [{ "path": "relative" }] })).is_err());
    }
}
