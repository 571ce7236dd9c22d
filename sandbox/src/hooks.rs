//! Hooks that run on the host (OCI runtime-spec, "POSIX-platform Hooks"): those of the runtime's
//! namespace. `createContainer` and `startContainer` run in the guest, by its agent.

use std::{
    io::{self, Read, Write},
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use oci_spec::runtime::{Hook as SpecHook, Spec};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Why a hook did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum HookError {
    /// It is no hook.
    #[error("hook {stage} #{number} of config.json: {reason}")]
    Malformed {
        /// The list that it is in.
        stage: &'static str,
        /// Its place in the list.
        number: usize,
        /// What is wrong.
        reason: &'static str,
    },
    /// It was run.
    #[error("error running {stage} hook #{number} ({}): {reason}", path.display())]
    Failed {
        /// When.
        stage: &'static str,
        /// Its place in the list.
        number: usize,
        /// The program.
        path: PathBuf,
        /// Its end, and what it has said.
        reason: String,
    },
}

/// Most of a hook's output that an error tells.
const MAX_OUTPUT: u64 = 4096;

/// A program to run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    path: PathBuf,
    args: Vec<String>,
    env: Vec<String>,
    /// Seconds.
    timeout: Option<u64>,
}

/// By the time they run at.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hooks {
    /// `prestart`, then `createRuntime`.
    pub create: Vec<Hook>,
    /// `poststart`.
    pub poststart: Vec<Hook>,
    /// `poststop`.
    pub poststop: Vec<Hook>,
}

impl Hooks {
    /// Of a specification.
    ///
    /// # Errors
    /// A path that is not absolute, a negative time.
    pub fn of(spec: &Spec) -> Result<Self, HookError> {
        let Some(hooks) = spec.hooks() else {
            return Ok(Self::default());
        };
        #[allow(deprecated, reason = "docker uses prestart for its networks")]
        let prestart = list("prestart", hooks.prestart())?;
        let mut create = prestart;
        create.extend(list("createRuntime", hooks.create_runtime())?);
        Ok(Self {
            create,
            poststart: list("poststart", hooks.poststart())?,
            poststop: list("poststop", hooks.poststop())?,
        })
    }
}

fn list(stage: &'static str, hooks: &Option<Vec<SpecHook>>) -> Result<Vec<Hook>, HookError> {
    let malformed = |number, reason| HookError::Malformed {
        stage,
        number,
        reason,
    };
    hooks
        .iter()
        .flatten()
        .enumerate()
        .map(|(number, hook)| {
            if !hook.path().is_absolute() {
                return Err(malformed(number, "its path is not absolute"));
            }
            Ok(Hook {
                path: hook.path().clone(),
                args: hook.args().clone().unwrap_or_default(),
                env: hook.env().clone().unwrap_or_default(),
                timeout: match hook.timeout() {
                    None => None,
                    Some(seconds @ 1..) => Some(seconds.unsigned_abs()),
                    Some(_) => return Err(malformed(number, "its timeout is not positive")),
                },
            })
        })
        .collect()
}

/// Runs hooks one after the other, each with the container's state on its standard input.
///
/// # Errors
/// The first that fails, with what it has said.
pub fn run(stage: &'static str, hooks: &[Hook], state: &Value) -> Result<(), HookError> {
    hooks
        .iter()
        .enumerate()
        .try_for_each(|(number, hook)| run_one(stage, number, hook, state))
}

/// As [`run`], but all of them are run; what fails is for telling, as the specification wants it
/// of hooks that come after the fact.
pub fn run_all(stage: &'static str, hooks: &[Hook], state: &Value) -> Vec<HookError> {
    hooks
        .iter()
        .enumerate()
        .filter_map(|(number, hook)| run_one(stage, number, hook, state).err())
        .collect()
}

fn run_one(
    stage: &'static str,
    number: usize,
    hook: &Hook,
    state: &Value,
) -> Result<(), HookError> {
    hook.run(state).map_err(|reason| HookError::Failed {
        stage,
        number,
        path: hook.path.clone(),
        reason,
    })
}

impl Hook {
    fn run(&self, state: &Value) -> Result<(), String> {
        let text = |error: io::Error| error.to_string();
        let mut command = Command::new(&self.path);
        if let [name, rest @ ..] = self.args.as_slice() {
            command.arg0(name).args(rest);
        }
        let mut child = command
            .env_clear()
            .envs(
                self.env
                    .iter()
                    .filter_map(|variable| variable.split_once('=')),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(text)?;
        let stdin = child.stdin.take();
        let state = state.to_string();
        // It need not read it.
        std::thread::spawn(move || stdin.map(|mut stdin| stdin.write_all(state.as_bytes())));
        let outputs = [
            child.stdout.take().map(collect),
            child.stderr.take().map(collect),
        ];
        let end = self
            .timeout
            .map(|seconds| Instant::now() + Duration::from_secs(seconds));
        let status = loop {
            if let Some(status) = child.try_wait().map_err(text)? {
                break status;
            }
            if end.is_some_and(|end| Instant::now() > end) {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!(
                    "it has not ended within {} s",
                    self.timeout.unwrap_or_default()
                ));
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        if status.success() {
            return Ok(());
        }
        // What it has left behind may hold its output open.
        let said: Vec<String> = outputs
            .into_iter()
            .flatten()
            .filter_map(|output| output.recv_timeout(Duration::from_secs(1)).ok())
            .collect();
        Err(format!("{status}: {}", said.join(" ").trim()))
    }
}

fn collect(mut output: impl Read + Send + 'static) -> std::sync::mpsc::Receiver<String> {
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = output.by_ref().take(MAX_OUTPUT).read_to_end(&mut bytes);
        let _ = sender.send(String::from_utf8_lossy(&bytes).trim().to_owned());
        // The rest must not block it.
        let _ = io::copy(&mut output, &mut io::sink());
    });
    receiver
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn shell(script: &str, timeout: Option<u64>) -> Hook {
        Hook {
            path: "/bin/sh".into(),
            args: ["sh", "-c", script].map(str::to_owned).to_vec(),
            env: vec!["A=b".to_owned()],
            timeout,
        }
    }

    #[test]
    fn they_get_the_state_and_their_environment_alone() {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().join("out");
        let script = format!("cat > {0}; echo $A$HOME >> {0}", out.display());
        run("prestart", &[shell(&script, None)], &json!({ "id": "x" })).unwrap();
        assert_eq!(std::fs::read_to_string(out).unwrap(), "{\"id\":\"x\"}b\n");
    }

    #[test]
    fn what_fails_is_told() {
        let error = |hook| {
            run("prestart", &[hook], &json!({}))
                .unwrap_err()
                .to_string()
        };
        let said = error(shell("echo out; echo why >&2; exit 3", None));
        assert!(
            said.contains("prestart hook #0") && said.contains("out why") && said.contains('3'),
            "{said}"
        );
        assert!(error(shell("exec sleep 60", Some(1))).contains("within 1 s"));
        let mut gone = shell("", None);
        gone.path = "/no/such/hook".into();
        assert!(error(gone).contains("/no/such/hook"));
    }

    #[test]
    fn of_a_specification() {
        let spec = |hooks: &str| {
            serde_json::from_str::<Spec>(&format!(r#"{{"ociVersion":"1.2.0","hooks":{hooks}}}"#))
                .unwrap()
        };
        let hooks = Hooks::of(&spec(
            r#"{"prestart":[{"path":"/a"}],"createRuntime":[{"path":"/b","timeout":3}],"poststop":[{"path":"/c"}],"startContainer":[{"path":"in/guest"}]}"#,
        ))
        .unwrap();
        assert_eq!(
            (
                hooks.create.len(),
                hooks.poststart.len(),
                hooks.poststop.len()
            ),
            (2, 0, 1)
        );
        assert!(Hooks::of(&spec(r#"{"poststop":[{"path":"c"}]}"#)).is_err());
        assert!(Hooks::of(&spec(r#"{"poststop":[{"path":"/c","timeout":0}]}"#)).is_err());
    }
}
