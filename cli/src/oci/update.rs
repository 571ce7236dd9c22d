//! `update`.

use std::{
    io::{Read, stdin},
    path::Path,
};

use clap::ArgMatches;
use serde_json::{Value, json};

use super::{
    bundle::read,
    state::{Root, Status},
};
use crate::{arguments::one, error::Error};

/// Largest resources object.
const MAX_RESOURCES: u64 = 1 << 20;

/// Flags and where their numbers go.
const NUMBERS: [(&str, [&str; 2]); 10] = [
    ("blkio-weight", ["blockIO", "weight"]),
    ("cpu-period", ["cpu", "period"]),
    ("cpu-quota", ["cpu", "quota"]),
    ("cpu-burst", ["cpu", "burst"]),
    ("cpu-share", ["cpu", "shares"]),
    ("cpu-idle", ["cpu", "idle"]),
    ("memory", ["memory", "limit"]),
    ("memory-reservation", ["memory", "reservation"]),
    ("memory-swap", ["memory", "swap"]),
    ("pids-limit", ["pids", "limit"]),
];

/// Runs the verb.
///
/// # Errors
/// The container has ended; a limit that is none.
pub fn run(root: &Root, matches: &ArgMatches) -> Result<u8, Error> {
    let container = root.find(one(matches, "id").unwrap_or_default())?;
    let resources = resources(matches, &mut stdin())?;
    crate::event_loop()?.block_on(async {
        match container.status().await {
            (Status::Created | Status::Running | Status::Paused, Some(shim)) => {
                shim.update(&container.record.id, &resources).await
            }
            (status, _) => Err(Error::State(format!(
                "cannot update container {}: it is {}",
                container.record.id,
                status.word()
            ))),
        }
    })?;
    Ok(0)
}

/// As runc: a file alone, or flags.
fn resources(matches: &ArgMatches, stdin: &mut impl Read) -> Result<Value, Error> {
    let resources = match one(matches, "resources") {
        Some(path) => {
            let text = if path == "-" {
                let mut text = Vec::new();
                stdin
                    .take(MAX_RESOURCES)
                    .read_to_end(&mut text)
                    .map_err(Error::io("read standard input"))?;
                text
            } else {
                read(Path::new(path), MAX_RESOURCES)?
            };
            serde_json::from_slice(&text).map_err(|error| {
                Error::State(format!("{path} is no OCI resources object: {error}"))
            })?
        }
        None => of_flags(matches)?,
    };
    serde_json::from_value::<oci_spec::runtime::LinuxResources>(resources.clone()).map_err(
        |error| {
            Error::State(format!(
                "the resources are no OCI resources object: {error}"
            ))
        },
    )?;
    Ok(resources)
}

fn of_flags(matches: &ArgMatches) -> Result<Value, Error> {
    let mut all = json!({});
    for (flag, [kind, key]) in NUMBERS {
        if let Some(text) = one(matches, flag) {
            let number: i64 = text
                .parse()
                .map_err(|_| Error::Usage(format!("--{flag} {text}: not a number")))?;
            all[kind][key] = json!(number);
        }
    }
    for (flag, key) in [("cpuset-cpus", "cpus"), ("cpuset-mems", "mems")] {
        if let Some(text) = one(matches, flag) {
            all["cpu"][key] = json!(text);
        }
    }
    if all == json!({}) {
        return Err(Error::Usage(
            "update needs a limit, such as --memory, or a file by --resources".to_owned(),
        ));
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str, stdin: &str) -> Result<Value, Error> {
        let matches = super::super::arguments::command()
            .try_get_matches_from(line.split(' '))
            .unwrap();
        resources(matches.subcommand().unwrap().1, &mut stdin.as_bytes())
    }

    #[test]
    fn flags_and_files() {
        assert_eq!(
            of(
                "caisson update --memory 1024 --memory-swap -1 --cpu-quota 5 --cpuset-cpus 0-1 x",
                ""
            )
            .unwrap(),
            json!({ "memory": { "limit": 1024, "swap": -1 }, "cpu": { "quota": 5, "cpus": "0-1" } })
        );
        let given = r#"{"pids":{"limit":7}}"#;
        assert_eq!(
            of("caisson update -r - x", given).unwrap().to_string(),
            given
        );
        for (line, stdin) in [
            ("caisson update x", ""),
            ("caisson update --memory 1g x", ""),
            ("caisson update -r - x", "{"),
            ("caisson update -r - x", r#"{"pids":{"limit":"many"}}"#),
            ("caisson update -r /no/such/file x", ""),
        ] {
            assert!(of(line, stdin).is_err(), "{line}");
        }
    }
}
