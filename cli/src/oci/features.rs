//! `features` (OCI runtime-spec, "Features Structure").

use super::report::print_json;
use crate::error::Error;

/// Runs the verb.
///
/// # Errors
/// Nobody reads.
pub fn run() -> Result<u8, Error> {
    print_json(&caisson_sandbox::features())?;
    Ok(0)
}
