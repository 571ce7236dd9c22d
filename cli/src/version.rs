//! `version`.

use caisson_sandbox::Config;
use clap::ArgMatches;
use serde_json::json;

use crate::{Format, error::Error, output::say};

/// Runs the verb.
///
/// # Errors
/// The configuration is wrong.
pub fn run(matches: &ArgMatches) -> Result<u8, Error> {
    let version = env!("CARGO_PKG_VERSION");
    let config = Config::load(None)?;
    if Format::of(matches)? == Format::Json {
        say!(
            "{}",
            json!({
                "Version": version,
                "Os": std::env::consts::OS,
                "Arch": std::env::consts::ARCH,
                "Kernel": config.kernel,
                "GuestImage": config.guest_image,
                "Vmm": config.vmm,
            })
        );
    } else {
        say!("caisson {version}");
        say!("guest kernel: {}", config.kernel.display());
        say!("guest image:  {}", config.guest_image.display());
        say!("VMM:          {}", config.vmm.display());
    }
    Ok(0)
}
