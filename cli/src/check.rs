//! `check`: whether this host can run microVMs, in plain words.

use std::time::Duration;

use caisson_kvm_probe::{Check, Status, host, probe};
use caisson_sandbox::Config;
use clap::ArgMatches;
use serde_json::json;

use crate::{Format, error::Error, network, output::say, rootless};

/// Time for measuring the speed of a guest.
const SPEED: Duration = Duration::from_secs(1);

/// Runs the verb. Exit code 0: microVMs run here.
///
/// # Errors
/// The configuration is wrong.
pub fn run(matches: &ArgMatches) -> Result<u8, Error> {
    let format = Format::of(matches)?;
    let config = Config::load(None)?;
    let report = probe(None, SPEED);
    let mut checks = report.checks.clone();
    checks.extend(host::checks());
    checks.extend(parts(&config));
    checks.push(network::check());
    checks.extend(rootless::checks());
    let able = checks.iter().all(|check| check.status != Status::Failed);
    if format == Format::Json {
        say!(
            "{}",
            json!({ "ok": able, "mips": report.mips, "checks": checks })
        );
    } else {
        for check in &checks {
            let mark = match check.status {
                Status::Ok => "ok      ",
                Status::Warning => "warning ",
                Status::Failed => "FAILED  ",
            };
            say!("{mark} {}", check.text);
            if let Some(advice) = &check.advice {
                say!("         {advice}");
            }
        }
        say!(
            "{}",
            if able {
                "This host can run microVMs."
            } else {
                "This host cannot run microVMs."
            }
        );
    }
    Ok(u8::from(!able))
}

/// Our own files.
fn parts(config: &Config) -> Vec<Check> {
    [
        ("vmm", &config.vmm),
        ("file_server", &config.file_server),
        ("kernel", &config.kernel),
        ("guest_image", &config.guest_image),
    ]
    .into_iter()
    .map(|(id, path)| {
        if path.is_file() {
            Check::ok(id, format!("{} is there", path.display()))
        } else {
            Check::failed(id, format!("{} is missing", path.display()), "Install Caisson whole (make install), or name the file in /etc/caisson/config.toml.")
        }
    })
    .collect()
}
