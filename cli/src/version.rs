//! `version`.

use caisson_sandbox::Config;
use clap::ArgMatches;
use serde_json::json;

use crate::{Format, error::Error};

/// Runs the verb.
///
/// # Errors
/// The configuration is wrong.
pub fn run(matches: &ArgMatches) -> Result<u8, Error> {
    let version = env!("CARGO_PKG_VERSION");
    let config = Config::load(None)?;
    if Format::of(matches)? == Format::Json {
        println!(
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
        println!("caisson {version}");
        println!("guest kernel: {}", config.kernel.display());
        println!("guest image:  {}", config.guest_image.display());
        println!("VMM:          {}", config.vmm.display());
    }
    Ok(0)
}
