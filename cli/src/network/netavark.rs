//! netavark, which makes the interfaces, rules and names of a container's networks.
//!
//! It reads what is wanted from its standard input and tells an error as JSON on its output. Its
//! own notes (what firewalld and aardvark-dns are to be told) are in `<run_dir>/networks`.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use caisson_kvm_probe::Check;
use caisson_sandbox::Config;
use serde_json::Value;

use crate::error::Error;

/// Where packages put programs that only other programs call: Debian, Fedora, by hand.
const PLACES: [&str; 4] = [
    "/usr/lib/podman",
    "/usr/libexec/podman",
    "/usr/local/libexec/podman",
    "/usr/local/lib/podman",
];

/// What to do about a missing program.
const ADVICE: &str =
    "Install the packages netavark, aardvark-dns and nftables (names of Debian and Fedora).";

fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    PLACES
        .iter()
        .map(PathBuf::from)
        .chain(std::env::split_paths(&path))
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
}

/// The programs that networks of the command line need.
pub fn check() -> Check {
    let missing: Vec<&str> = ["netavark", "aardvark-dns", "nft"]
        .into_iter()
        .filter(|name| find(name).is_none())
        .collect();
    if missing.is_empty() {
        return Check::ok("networks", "networks of `caisson run`: netavark is there");
    }
    Check::warning(
        "networks",
        format!(
            "{} is missing: `caisson run` needs --network none",
            missing.join(", ")
        ),
        ADVICE,
    )
}

/// netavark, ready to be run.
pub struct Netavark {
    program: PathBuf,
    aardvark: PathBuf,
    notes: PathBuf,
}

impl Netavark {
    /// Finds what is needed, aardvark-dns only for networks with names.
    ///
    /// # Errors
    /// A program is not installed.
    pub fn find(config: &Config, with_names: bool) -> Result<Self, Error> {
        let need = |name: &'static str, why: &str| {
            find(name).ok_or_else(|| {
                Error::State(format!(
                    "{why} needs the program {name}, which is not installed. {ADVICE} \
                     Without a network: --network none"
                ))
            })
        };
        let program = need("netavark", "a network")?;
        need("nft", "a network")?;
        let aardvark = if with_names {
            need("aardvark-dns", "a network with names")?
        } else {
            find("aardvark-dns").unwrap_or_default()
        };
        Ok(Self {
            program,
            aardvark,
            notes: config.run_dir.join("networks"),
        })
    }

    /// Makes what `wanted` tells in a namespace.
    ///
    /// # Errors
    /// netavark's words; something may be left then.
    pub fn set_up(&self, wanted: &Value, namespace: &Path) -> Result<(), Error> {
        self.run("setup", wanted, namespace)
    }

    /// Takes it away.
    ///
    /// # Errors
    /// netavark's words: of things that were not there, too.
    pub fn tear_down(&self, wanted: &Value, namespace: &Path) -> Result<(), Error> {
        self.run("teardown", wanted, namespace)
    }

    /// Removes its notes once nobody has a network any more.
    pub fn forget(config: &Config) {
        let _ = std::fs::remove_dir_all(config.run_dir.join("networks"));
    }

    fn run(&self, verb: &'static str, wanted: &Value, namespace: &Path) -> Result<(), Error> {
        std::fs::create_dir_all(&self.notes).map_err(Error::file("create", &self.notes))?;
        let mut child = Command::new(&self.program)
            .arg("--config")
            .arg(&self.notes)
            .arg("--aardvark-binary")
            .arg(&self.aardvark)
            .args(["--rootless", "false"])
            .arg(verb)
            .arg(namespace)
            .env("NETAVARK_FW", "nftables")
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(Error::file("run", &self.program))?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that does not read tells why.
            let _ = stdin.write_all(wanted.to_string().as_bytes());
        }
        let output = child
            .wait_with_output()
            .map_err(Error::file("wait for", &self.program))?;
        if output.status.success() {
            return Ok(());
        }
        let told = serde_json::from_slice::<Value>(&output.stdout)
            .ok()
            .and_then(|answer| answer["error"].as_str().map(str::to_owned));
        let stderr = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        let message = told.filter(|told| !told.is_empty()).unwrap_or(stderr);
        Err(Error::Netavark {
            verb,
            message: if message.is_empty() {
                output.status.to_string()
            } else {
                message
            },
        })
    }
}
