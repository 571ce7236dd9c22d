//! `--log`: where callers look for what went wrong.

use std::{fs::File, io::Write, time::SystemTime};

use clap::ArgMatches;
use serde_json::json;

use crate::{arguments::one, error::Error};

/// Whether `--log-format` is one there is.
///
/// # Errors
/// It is not.
pub fn check(matches: &ArgMatches) -> Result<(), Error> {
    match one(matches, "log-format") {
        None | Some("text" | "json") => Ok(()),
        Some(other) => Err(Error::Usage(format!(
            "--log-format {other}: there are text and json"
        ))),
    }
}

/// Adds an error to the log, if there is one.
///
/// # Errors
/// The file cannot be written.
pub fn append(matches: &ArgMatches, message: &str) -> Result<(), Error> {
    let Some(path) = one(matches, "log") else {
        return Ok(());
    };
    let json = one(matches, "log-format") == Some("json");
    let line = line(message, json, SystemTime::now());
    File::options()
        .create(true)
        .append(true)
        .open(path)
        .and_then(|mut file| file.write_all(line.as_bytes()))
        .map_err(Error::file("write the log", path))
}

/// In the form of runc's logs, which callers parse.
fn line(message: &str, json: bool, now: SystemTime) -> String {
    let time = humantime::format_rfc3339_seconds(now).to_string();
    if json {
        format!(
            "{}\n",
            json!({ "level": "error", "msg": message, "time": time })
        )
    } else {
        format!("time={} level=error msg={}\n", json!(time), json!(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_runcs() {
        let text = "a \"quoted\"\nline";
        let json = line(text, true, SystemTime::UNIX_EPOCH);
        let parsed: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(
            (parsed["level"].as_str(), parsed["msg"].as_str()),
            (Some("error"), Some(text))
        );
        assert_eq!(
            line(text, false, SystemTime::UNIX_EPOCH),
            "time=\"1970-01-01T00:00:00Z\" level=error msg=\"a \\\"quoted\\\"\\nline\"\n"
        );
    }
}
