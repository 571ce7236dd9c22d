//! `config`: what the host's configuration is.

use std::io::Write;

use caisson_sandbox::Config;
use clap::ArgMatches;

use crate::error::Error;

/// Runs the verb.
///
/// # Errors
/// The configuration is wrong; it names the file, the line and the key.
pub fn run(matches: &ArgMatches) -> Result<u8, Error> {
    let effective = Config::effective(None)?;
    let mut text = String::new();
    if matches.get_flag("effective") {
        for setting in &effective.settings {
            let (key, value, origin) = (&setting.key, &setting.value, &setting.origin);
            text.push_str(&format!("{key} = {value} # {origin}\n"));
        }
    } else {
        for file in &effective.files {
            text.push_str(&format!("{}\n", file.display()));
        }
    }
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(Error::io("write to the standard output"))?;
    Ok(0)
}
