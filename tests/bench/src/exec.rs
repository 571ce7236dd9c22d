//! `exec` in a running container: how long it takes, and how fast its streams are. Caisson's go over
//! vsock.

use std::{
    io::Write,
    path::Path,
    process::{Command, Stdio},
    time::Instant,
};

use crate::{
    child::{find, quiet},
    container,
    error::BenchError,
    image,
    options::Options,
    report::{Measure, Series},
};

/// What goes through a stream, MiB.
const STREAM_MIB: usize = 16;

/// A container that runs until this is dropped.
struct Container {
    name: &'static str,
    /// The runtime, and the words before the container's id of `exec` and of its removal.
    runtime: std::path::PathBuf,
    exec: &'static [&'static str],
    remove: &'static [&'static str],
    id: String,
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = quiet(Command::new(&self.runtime).args(self.remove).arg(&self.id));
    }
}

impl Container {
    fn exec(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.runtime);
        command.args(self.exec).arg(&self.id).args(words);
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Milliseconds that a program takes, which reads `input` bytes.
    fn time(&self, words: &[&str], input: usize) -> Result<f64, BenchError> {
        let failed = |problem: String| BenchError::Program {
            program: format!("{} exec {words:?}", self.name),
            problem,
            output: String::new(),
        };
        let started = Instant::now();
        let mut child = self
            .exec(words)
            .stdin(Stdio::piped())
            .spawn()
            .map_err(BenchError::io(format!("cannot start {}", self.name)))?;
        if let Some(mut stdin) = child.stdin.take() {
            let block = vec![0; 64 << 10];
            for _ in 0..input / block.len() {
                if stdin.write_all(&block).is_err() {
                    break;
                }
            }
        }
        let status = child
            .wait()
            .map_err(BenchError::io("cannot wait for exec"))?;
        if !status.success() {
            return Err(failed(status.to_string()));
        }
        Ok(started.elapsed().as_secs_f64() * 1e3)
    }
}

/// Runs programs in a container of Caisson and of runc in turn.
///
/// # Errors
/// When one fails.
pub fn measure(
    options: &Options,
    scratch: &Path,
    rootfs: &Path,
) -> Result<Vec<Measure>, BenchError> {
    let id = format!("caisson-bench-exec-{}", std::process::id());
    let caisson = Container {
        name: "caisson",
        runtime: options.file("bin/caisson"),
        exec: &["exec", "-i"],
        remove: &["rm", "-f"],
        id: id.clone(),
    };
    quiet(Command::new(&caisson.runtime).args([
        "run",
        "-d",
        "--network",
        "none",
        "--name",
        &id,
        image::REFERENCE,
        "sleep",
        "100000",
    ]))?;
    let runc = Container {
        name: "runc",
        runtime: find("runc", "runc")?,
        exec: &["exec"],
        remove: &["delete", "--force"],
        id,
    };
    let bundle = container::make_bundle(
        &runc.runtime,
        &scratch.join("exec"),
        rootfs,
        &["/bin/sleep", "100000"],
    )?;
    quiet(
        Command::new(&runc.runtime)
            .args(["run", "--detach", "--bundle"])
            .arg(&bundle)
            .arg(&runc.id)
            .stdout(Stdio::null())
            .stderr(Stdio::null()),
    )?;
    let bytes = STREAM_MIB << 20;
    let head = format!("head -c {bytes} /dev/zero");
    let kinds: [(&str, &str, &[&str], usize); 3] = [
        ("exec: `true`, from start to end", "ms", &["true"], 0),
        (
            "exec: into a program",
            "MiB/s",
            &["sh", "-c", "cat >/dev/null"],
            bytes,
        ),
        ("exec: out of a program", "MiB/s", &["sh", "-c", &head], 0),
    ];
    let contenders = [caisson, runc];
    let mut values = vec![vec![Vec::new(); contenders.len()]; kinds.len()];
    for run in 0..=options.runs {
        for (index, contender) in contenders.iter().enumerate() {
            for ((_, unit, words, input), values) in kinds.iter().zip(&mut values) {
                let took = contender.time(words, *input)?;
                let value = if *unit == "ms" {
                    took
                } else {
                    STREAM_MIB as f64 / (took / 1e3)
                };
                // The first warmed the caches.
                if run > 0 {
                    values[index].push(value);
                }
            }
        }
        eprintln!("caisson-bench: exec: {run} of {}", options.runs);
    }
    Ok(kinds
        .iter()
        .zip(values)
        .map(|((title, unit, _, _), values)| Measure {
            title: (*title).into(),
            definition: format!(
                "`caisson exec -i` and `runc exec` in a running container, by the command's own start and end. \
                 Streams carry {STREAM_MIB} MiB, the start of the program counts. {} is better.",
                if *unit == "ms" { "Less" } else { "More" }
            ),
            unit,
            series: contenders
                .iter()
                .zip(values)
                .map(|(contender, values)| Series { name: contender.name.into(), values })
                .collect(),
        })
        .collect())
}
