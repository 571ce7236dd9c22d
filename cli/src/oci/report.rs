//! `state`, `ps`, `list`, `spec`.

use std::{io::Write, path::Path};

use clap::ArgMatches;
use serde_json::{Value, json};

use super::state::{Root, Status};
use crate::{
    arguments::{one, values},
    container::Request,
    error::Error,
    ps::print_table,
    spec,
};

/// Prints to a stdout that may have been closed.
///
/// # Errors
/// Nobody reads it.
pub fn print(text: &str) -> Result<(), Error> {
    writeln!(std::io::stdout(), "{text}").map_err(Error::io("write to standard output"))
}

/// Prints JSON as runc does, for people too.
///
/// # Errors
/// Nobody reads it.
pub fn print_json(value: &Value) -> Result<(), Error> {
    print(&format!("{value:#}"))
}

enum Format {
    Table,
    Json,
}

fn format(matches: &ArgMatches) -> Result<Format, Error> {
    match one(matches, "format") {
        None | Some("table") => Ok(Format::Table),
        Some("json") => Ok(Format::Json),
        Some(other) => Err(Error::Usage(format!(
            "--format {other}: there are table and json"
        ))),
    }
}

/// Runs `state`.
///
/// # Errors
/// There is no such container.
pub fn state(root: &Root, matches: &ArgMatches) -> Result<u8, Error> {
    let container = root.find(one(matches, "id").unwrap_or_default())?;
    let (status, _) = crate::event_loop()?.block_on(container.status());
    print_json(&container.state(status))?;
    Ok(0)
}

/// Runs `ps`.
///
/// # Errors
/// The container does not run.
pub fn ps(root: &Root, matches: &ArgMatches) -> Result<u8, Error> {
    let format = format(matches)?;
    let container = root.find(one(matches, "id").unwrap_or_default())?;
    let id = &container.record.id;
    if let Some(option) = values(matches, "options").first() {
        return Err(Error::Usage(format!(
            "ps {option}: the processes are those of a guest, which the host's ps cannot see; use `caisson exec {id} ps …`"
        )));
    }
    let pids = crate::event_loop()?.block_on(async {
        match container.status().await {
            (Status::Created | Status::Running | Status::Paused, Some(shim)) => {
                shim.processes(id).await
            }
            (status, _) => Err(Error::State(format!(
                "container {id} has no processes: it is {}",
                status.word()
            ))),
        }
    })?;
    match format {
        Format::Json => print(&json!(pids).to_string())?,
        Format::Table => {
            print("PID")?;
            pids.iter().try_for_each(|pid| print(&pid.to_string()))?;
        }
    }
    Ok(0)
}

/// Runs `list`.
///
/// # Errors
/// The root cannot be read.
pub fn list(root: &Root, matches: &ArgMatches) -> Result<u8, Error> {
    let format = format(matches)?;
    let containers = root.all()?;
    if matches.get_flag("quiet") {
        containers
            .iter()
            .try_for_each(|container| print(&container.record.id))?;
        return Ok(0);
    }
    let states: Vec<Value> = crate::event_loop()?.block_on(async {
        let mut states = Vec::new();
        for container in &containers {
            let (status, _) = container.status().await;
            states.push(container.state(status));
        }
        states
    });
    match format {
        Format::Json => print(&json!(states).to_string())?,
        Format::Table => {
            let mut rows =
                vec![["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned)];
            let cell = |state: &Value, key: &str| match &state[key] {
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            rows.extend(states.iter().map(|state| {
                ["id", "pid", "status", "bundle", "created"]
                    .map(|key| cell(state, key))
                    .into_iter()
                    // They are root's.
                    .chain(["root".to_owned()])
                    .collect::<Vec<_>>()
                    .try_into()
                    .unwrap_or_default()
            }));
            print_table(&rows);
        }
    }
    Ok(0)
}

/// Runs `spec`.
///
/// # Errors
/// There is a config.json already.
pub fn spec(matches: &ArgMatches) -> Result<u8, Error> {
    if let Some(rootless @ "true") = one(matches, "rootless") {
        return Err(Error::Usage(format!(
            "--rootless {rootless}: microVMs need root"
        )));
    }
    let path = Path::new(one(matches, "bundle").unwrap_or(".")).join("config.json");
    let written = std::fs::File::options()
        .write(true)
        .create_new(true)
        .open(&path)
        .and_then(|mut file| writeln!(file, "{:#}", template()));
    written.map_err(Error::file("create", path))?;
    Ok(0)
}

/// A shell in a terminal, as runc's.
fn template() -> Value {
    let request = Request {
        hostname: "caisson".to_owned(),
        env: vec![
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
            "TERM=xterm".to_owned(),
        ],
        working_dir: "/".to_owned(),
        cmd: vec!["sh".to_owned()],
        tty: true,
        read_only: true,
        ..Request::default()
    };
    let capabilities = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"].map(str::to_owned);
    let mut document = spec::container(&request, &capabilities, &spec::Extra::default());
    let network = json!({ "type": "network" });
    if let Some(namespaces) = document["linux"]["namespaces"].as_array_mut()
        && !namespaces.contains(&network)
    {
        namespaces.push(network);
    }
    document
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_is_a_bundle() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("rootfs")).unwrap();
        std::fs::write(directory.path().join("config.json"), template().to_string()).unwrap();
        let bundle = super::super::bundle::Bundle::load(directory.path()).unwrap();
        assert!(bundle.terminal && bundle.own_network);
    }
}
