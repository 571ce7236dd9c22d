//! The command line.

use std::{path::PathBuf, time::Duration};

use crate::{cold::Guest, error::BenchError};

/// What `--help` says.
pub const USAGE: &str = "\
usage: caisson-bench --prefix DIR --out DIR [--runs N] [--only MEASURE,...]
                     [--memory MIB] [--cmdline TEXT] [--seconds N]
  --prefix   the installed tree (bin, libexec/caisson, share/caisson)
  --out      where report.md, plot.svg and results.json go
  --runs     measurements per contender, after one that does not count (default 20)
  --only     some of cold, container, memory, exec, block, share, network
  --memory   guest memory of a cold start, MiB (default 128)
  --cmdline  kernel command line of a cold start, for every monitor
  --seconds  length of each of fio's and iperf3's measurements (default 5)";

/// All there are.
const MEASURES: [&str; 7] = [
    "cold",
    "container",
    "memory",
    "exec",
    "block",
    "share",
    "network",
];

/// What a VM needs to find the agent, and nothing that only one monitor would profit from.
const CMDLINE: &str = "console=hvc0 quiet reboot=k panic=-1 noreplace-smp swiotlb=noforce \
                       root=/dev/vda rootfstype=erofs ro init=/sbin/caisson-agent";

/// What is to be measured, of which installation.
pub struct Options {
    /// The installed tree.
    pub prefix: PathBuf,
    /// Where the report goes.
    pub out: PathBuf,
    /// Measurements per contender.
    pub runs: usize,
    /// Length of a measurement of throughput.
    pub seconds: u32,
    /// Names of the measures to take.
    pub only: Vec<String>,
    /// What a cold start boots.
    pub guest: Guest,
    /// Longest wait for anything to start.
    pub limit: Duration,
}

impl Options {
    /// Reads the command line; None when it asks for help.
    ///
    /// # Errors
    /// [`BenchError::Usage`].
    pub fn parse() -> Result<Option<Self>, BenchError> {
        use lexopt::prelude::*;
        let usage = |error: lexopt::Error| BenchError::Usage(format!("{error}\n{USAGE}"));
        let (mut prefix, mut out) = (None, None);
        let (mut runs, mut memory_mib, mut seconds) = (20, 128, 5);
        let mut only = MEASURES.join(",");
        let mut cmdline = CMDLINE.to_string();
        let mut arguments = lexopt::Parser::from_env();
        while let Some(argument) = arguments.next().map_err(usage)? {
            let name = match argument {
                Short('h') | Long("help") => return Ok(None),
                Long(name) => name.to_string(),
                other => return Err(usage(other.unexpected())),
            };
            let value = arguments.value().map_err(usage)?;
            match name.as_str() {
                "prefix" => prefix = Some(PathBuf::from(value)),
                "out" => out = Some(PathBuf::from(value)),
                "runs" => runs = value.parse().map_err(usage)?,
                "memory" => memory_mib = value.parse().map_err(usage)?,
                "only" => only = value.parse().map_err(usage)?,
                "seconds" => seconds = value.parse().map_err(usage)?,
                "cmdline" => cmdline = value.parse().map_err(usage)?,
                unknown => {
                    return Err(BenchError::Usage(format!("no option --{unknown}\n{USAGE}")));
                }
            }
        }
        let (Some(prefix), Some(out)) = (prefix, out) else {
            return Err(BenchError::Usage(format!(
                "--prefix and --out are needed\n{USAGE}"
            )));
        };
        if runs == 0 || seconds == 0 {
            return Err(BenchError::Usage(
                "--runs and --seconds must be at least 1".into(),
            ));
        }
        let only: Vec<String> = only.split(',').map(str::to_string).collect();
        if let Some(unknown) = only.iter().find(|o| !MEASURES.contains(&o.as_str())) {
            return Err(BenchError::Usage(format!(
                "no measure '{unknown}'\n{USAGE}"
            )));
        }
        Ok(Some(Self {
            guest: Guest {
                kernel: prefix.join("share/caisson/vmlinux"),
                image: prefix.join("share/caisson/guest.erofs"),
                cmdline,
                memory_mib,
            },
            limit: Duration::from_secs_f64(15.0 * timeout_scale()),
            prefix,
            out,
            runs,
            seconds,
            only,
        }))
    }

    /// Whether this measure is to be taken.
    pub fn wants(&self, measure: &str) -> bool {
        self.only.iter().any(|o| o == measure)
    }

    /// A file of the installed tree.
    pub fn file(&self, name: &str) -> PathBuf {
        self.prefix.join(name)
    }
}

/// `CAISSON_TIMEOUT_SCALE`, by which slow machines stretch every deadline.
pub fn timeout_scale() -> f64 {
    std::env::var("CAISSON_TIMEOUT_SCALE")
        .ok()
        .and_then(|scale| scale.parse().ok())
        .filter(|scale: &f64| scale.is_finite() && *scale > 0.0)
        .unwrap_or(1.0)
}
