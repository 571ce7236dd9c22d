//! `ps`.

use std::time::{Duration, SystemTime};

use clap::ArgMatches;
use serde_json::json;

use crate::{
    Format,
    container::{Container, Containers, Status},
    error::Error,
    inspect::network_mode,
    network::{Attachment, Mode},
    output::say,
    sandboxes,
};

/// Runs the verb.
///
/// # Errors
/// The containers cannot be read.
pub fn run(matches: &ArgMatches) -> Result<u8, Error> {
    let format = Format::of(matches)?;
    if matches.get_flag("sandboxes") {
        return sandboxes::list(format);
    }
    let (all, quiet, whole) = (
        matches.get_flag("all"),
        matches.get_flag("quiet"),
        matches.get_flag("no-trunc"),
    );
    let store = Containers::open()?;
    let mut containers = store.all()?;
    containers.retain(|container| all || container.state.status == Status::Running);
    if quiet {
        for container in &containers {
            say!("{}", id(container, whole));
        }
        return Ok(0);
    }
    if format == Format::Json {
        for container in &containers {
            say!(
                "{}",
                json!({
                    "ID": id(container, whole),
                    "Image": container.image,
                    "Command": format!("\"{}\"", command(container)),
                    "CreatedAt": humantime::format_rfc3339_seconds(container.created).to_string(),
                    "State": container.state.status.word(),
                    "Status": status(container),
                    "Names": container.name,
                    "Mounts": mounts(container),
                    "Networks": networks(container),
                    "Ports": ports(&store, container),
                })
            );
        }
        return Ok(0);
    }
    let mut rows = vec![
        [
            "CONTAINER ID",
            "IMAGE",
            "COMMAND",
            "CREATED",
            "STATUS",
            "PORTS",
            "NAMES",
        ]
        .map(str::to_owned),
    ];
    for container in &containers {
        let command = command(container);
        let command = if whole || command.chars().count() <= 20 {
            command
        } else {
            command.chars().take(19).chain(['…']).collect()
        };
        rows.push([
            id(container, whole),
            container.image.clone(),
            format!("\"{command}\""),
            format!("{} ago", duration(since(container.created))),
            status(container),
            ports(&store, container),
            container.name.clone(),
        ]);
    }
    print_table(&rows);
    Ok(0)
}

fn id(container: &Container, whole: bool) -> String {
    if whole {
        container.id.clone()
    } else {
        container.short_id().to_owned()
    }
}

fn command(container: &Container) -> String {
    let words: Vec<&str> = container
        .request
        .entrypoint
        .iter()
        .chain(&container.request.cmd)
        .map(String::as_str)
        .collect();
    words.join(" ")
}

/// "Up 5 minutes", "Exited (3) 2 hours ago".
fn status(container: &Container) -> String {
    let state = &container.state;
    match state.status {
        Status::Created => "Created".to_owned(),
        Status::Running => format!(
            "Up {}",
            duration(state.started_at.map_or(Duration::ZERO, since))
        ),
        Status::Exited => format!(
            "Exited ({}) {} ago",
            state.exit_code,
            duration(state.finished_at.map_or(Duration::ZERO, since))
        ),
    }
}

/// Time that has passed since `then`.
pub fn since(then: SystemTime) -> Duration {
    SystemTime::now().duration_since(then).unwrap_or_default()
}

/// A duration as docker says it.
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let say = |number: u64, one: &str, unit: &str| {
        if number == 1 {
            one.to_owned()
        } else {
            format!("{number} {unit}")
        }
    };
    match seconds {
        0 => "Less than a second".to_owned(),
        1..60 => say(seconds, "1 second", "seconds"),
        60..3600 => say(seconds / 60, "About a minute", "minutes"),
        3600..172_800 => say(seconds / 3600, "About an hour", "hours"),
        172_800..1_209_600 => format!("{} days", seconds / 86_400),
        1_209_600..5_184_000 => format!("{} weeks", seconds / 604_800),
        5_184_000..63_072_000 => format!("{} months", seconds / 2_592_000),
        _ => format!("{} years", seconds / 31_536_000),
    }
}

/// Prints rows with columns of one width, three spaces apart.
pub fn print_table<const N: usize>(rows: &[[String; N]]) {
    let mut widths = [0; N];
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for row in rows {
        let cells: Vec<String> = row
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        say!("{}", cells.join("   ").trim_end());
    }
}

/// Names of volumes and paths of other shares.
fn mounts(container: &Container) -> String {
    let request = &container.request;
    let names = request.volumes.iter().map(|(source, target, _)| {
        let volume = request.volume_names.get(target);
        volume.map_or(source.as_str(), |volume| volume.name.as_str())
    });
    names.collect::<Vec<_>>().join(",")
}

/// Names of networks, or where else the container's network is.
fn networks(container: &Container) -> String {
    match &container.request.network.mode {
        Mode::Networks(names) => names.join(","),
        _ => network_mode(container),
    }
}

/// "0.0.0.0:8080->80/tcp".
fn ports(containers: &Containers, container: &Container) -> String {
    let Some(record) = Attachment::read(&containers.config, &container.id) else {
        return String::new();
    };
    let (v4, v6) = record.families();
    let words = record.ports.iter().flat_map(|port| {
        let outer = port.outer(v4, v6).into_iter();
        outer.map(|address| format!("{address}->{}", port.inner()))
    });
    words.collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_dockers() {
        let say = |seconds| duration(Duration::from_secs(seconds));
        assert_eq!(say(0), "Less than a second");
        assert_eq!(
            (say(1), say(59)),
            ("1 second".to_owned(), "59 seconds".to_owned())
        );
        assert_eq!(
            (say(60), say(150)),
            ("About a minute".to_owned(), "2 minutes".to_owned())
        );
        assert_eq!(
            (say(3600), say(86_400), say(172_800)),
            (
                "About an hour".to_owned(),
                "24 hours".to_owned(),
                "2 days".to_owned()
            )
        );
    }
}
