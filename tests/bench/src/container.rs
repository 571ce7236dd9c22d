//! Container start: from the exec of the runtime's command to the first byte of
//! the workload on its standard output.

use std::{
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use crate::{
    child::{Running, tail},
    error::BenchError,
    image,
};

/// A command that starts one container which writes a line and ends.
pub struct Runtime {
    /// Name in the report.
    pub name: String,
    /// Makes the command of the `n`th run.
    pub command: Box<dyn Fn(usize) -> Command>,
}

/// `caisson run --rm` of the loaded image.
pub fn caisson(binary: &Path) -> Runtime {
    let binary = binary.to_path_buf();
    Runtime {
        name: "caisson".into(),
        command: Box::new(move |_| {
            let mut command = Command::new(&binary);
            command.args(["run", "--rm", "--network", "none", image::REFERENCE]);
            command.args(["echo", "x"]);
            command
        }),
    }
}

/// An OCI runtime (`runc`, `crun`) with a bundle over `rootfs` in `directory`.
///
/// # Errors
/// When its default specification cannot be made.
pub fn oci(binary: &Path, directory: &Path, rootfs: &Path) -> Result<Runtime, BenchError> {
    let name = binary
        .file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default();
    let bundle = directory.join(format!("bundle-{name}"));
    let bundle = make_bundle(binary, &bundle, rootfs, &["/bin/echo", "x"])?;
    let binary = binary.to_path_buf();
    let prefix = format!("caisson-bench-{}", std::process::id());
    Ok(Runtime {
        name,
        command: Box::new(move |run| {
            let mut command = Command::new(&binary);
            command
                .args(["run", "--bundle"])
                .arg(&bundle)
                .arg(format!("{prefix}-{run}"));
            command
        }),
    })
}

/// Makes the bundle `directory` over `rootfs` by the runtime's own `spec`, which runs `words`.
///
/// # Errors
/// When its default specification cannot be made.
pub fn make_bundle(
    binary: &Path,
    directory: &Path,
    rootfs: &Path,
    words: &[&str],
) -> Result<PathBuf, BenchError> {
    fs::create_dir_all(directory).map_err(BenchError::io("cannot make a bundle"))?;
    let output = Command::new(binary)
        .arg("spec")
        .current_dir(directory)
        .output()
        .map_err(BenchError::io(format!("cannot start {}", binary.display())))?;
    if !output.status.success() {
        return Err(BenchError::Program {
            program: binary.display().to_string(),
            problem: format!("spec: {}", output.status),
            output: String::from_utf8_lossy(&output.stderr).into_owned(),
        });
    }
    let path = directory.join("config.json");
    let text = fs::read(&path).map_err(BenchError::io("cannot read the specification"))?;
    let text = adapt_spec(&text, rootfs, words)?;
    fs::write(&path, text).map_err(BenchError::io("cannot write the specification"))?;
    Ok(directory.to_path_buf())
}

/// The runtime's own default, with our root and workload and without a terminal.
fn adapt_spec(text: &[u8], rootfs: &Path, words: &[&str]) -> Result<Vec<u8>, BenchError> {
    let invalid = |source: serde_json::Error| BenchError::Io {
        what: "the runtime's default specification is no JSON".into(),
        source: source.into(),
    };
    let mut spec: serde_json::Value = serde_json::from_slice(text).map_err(invalid)?;
    spec["process"]["terminal"] = false.into();
    spec["process"]["args"] = serde_json::json!(words);
    spec["root"]["path"] = rootfs.display().to_string().into();
    serde_json::to_vec(&spec).map_err(invalid)
}

/// One start, in milliseconds: until the first byte, and until the command has ended.
///
/// # Errors
/// When the command fails, says something else, or takes longer than `limit`.
pub fn start_once(
    runtime: &Runtime,
    run: usize,
    scratch: &Path,
    limit: Duration,
) -> Result<(f64, f64), BenchError> {
    let log: PathBuf = scratch.join("stderr");
    let stderr = File::create(&log).map_err(BenchError::io("cannot create a log file"))?;
    let mut command = (runtime.command)(run);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(stderr);
    let started = Instant::now();
    let mut process = Running::spawn(&runtime.name, &mut command)?;
    let failed = |problem: String| BenchError::Program {
        program: runtime.name.clone(),
        problem,
        output: tail(&log),
    };
    let Some(mut stdout) = process.child().stdout.take() else {
        return Err(failed("has no standard output".into()));
    };
    // A reader thread, so that a silent command meets the deadline.
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut first = [0];
        let outcome = stdout.read(&mut first);
        // The receiver is gone only after the deadline.
        let _ = sender.send((started.elapsed(), outcome.map(|n| (n, first[0]))));
        let _ = std::io::copy(&mut stdout, &mut std::io::sink());
    });
    let (elapsed, outcome) = receiver
        .recv_timeout(limit)
        .map_err(|_| BenchError::Deadline {
            program: runtime.name.clone(),
            limit,
            output: tail(&log),
        })?;
    match outcome {
        Ok((1, b'x')) => {}
        Ok((0, _)) => return Err(failed("ended without output".into())),
        other => return Err(failed(format!("wrote something else: {other:?}"))),
    }
    let status = process.wait(limit)?;
    if !status.success() {
        return Err(failed(format!("ended with {status}")));
    }
    let milliseconds = |d: Duration| d.as_secs_f64() * 1e3;
    Ok((milliseconds(elapsed), milliseconds(started.elapsed())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &'static str) -> Runtime {
        Runtime {
            name: "sh".into(),
            command: Box::new(move |_| {
                let mut command = Command::new("sh");
                command.args(["-c", script]);
                command
            }),
        }
    }

    fn start(script: &'static str) -> Result<(f64, f64), BenchError> {
        let scratch = tempfile::TempDir::new().unwrap();
        start_once(&shell(script), 0, scratch.path(), Duration::from_secs(2))
    }

    #[test]
    fn the_first_byte_and_the_end_are_told_apart() {
        let (first, end) = start("echo x; sleep 0.3").unwrap();
        assert!(first < end && end >= 300.0, "{first} {end}");
    }

    #[test]
    fn failures_are_not_measured() {
        assert!(start("exit 0").is_err());
        assert!(start("echo y").is_err());
        assert!(start("echo x; exit 3").is_err());
        let error = start("echo broken >&2; exit 1").unwrap_err();
        assert!(error.to_string().contains("broken"));
        assert!(matches!(start("sleep 5"), Err(BenchError::Deadline { .. })));
    }

    #[test]
    fn the_specification_keeps_what_it_does_not_change() {
        let spec =
            br#"{"process":{"terminal":true,"cwd":"/"},"root":{"path":"rootfs","readonly":true}}"#;
        let spec = adapt_spec(spec, Path::new("/r"), &["/bin/x"]).unwrap();
        let spec: serde_json::Value = serde_json::from_slice(&spec).unwrap();
        assert_eq!(spec["root"]["path"], "/r");
        assert_eq!(spec["root"]["readonly"], true);
        assert_eq!(spec["process"]["terminal"], false);
        assert_eq!(spec["process"]["cwd"], "/");
    }
}
