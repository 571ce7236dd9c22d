//! `inspect`.

use std::time::SystemTime;

use caisson_rootfs_builder::Image;
use clap::ArgMatches;
use serde_json::{Value, json};

use crate::{
    Format,
    arguments::values,
    container::{Container, Containers, Status},
    error::Error,
};

/// Runs the verb: a JSON array of what was found; names that were not are told on stderr.
///
/// # Errors
/// The store cannot be read.
pub fn run(matches: &ArgMatches) -> Result<u8, Error> {
    // JSON whatever the format, as docker.
    Format::of(matches)?;
    let containers = Containers::open()?;
    let images = containers.images()?;
    let mut found = Vec::new();
    let mut code = 0;
    for name in values(matches, "name") {
        match containers.find(name) {
            Ok(container) => found.push(describe(&containers, &container)),
            Err(Error::NoSuchContainer(_)) => match images.get(name) {
                Ok(image) => found.push(describe_image(&image)),
                Err(_) => {
                    eprintln!("caisson: No such object: {name}");
                    code = 1;
                }
            },
            Err(error) => return Err(error),
        }
    }
    println!(
        "{}",
        serde_json::to_string_pretty(&found).unwrap_or_default()
    );
    Ok(code)
}

fn time(at: Option<SystemTime>) -> String {
    at.map_or_else(
        || "0001-01-01T00:00:00Z".to_owned(),
        |at| humantime::format_rfc3339_nanos(at).to_string(),
    )
}

fn describe(containers: &Containers, container: &Container) -> Value {
    let (request, state) = (&container.request, &container.state);
    let words: Vec<&String> = request.entrypoint.iter().chain(&request.cmd).collect();
    let list = |list: &[String]| {
        if list.is_empty() {
            Value::Null
        } else {
            json!(list)
        }
    };
    let binds: Vec<String> = request
        .volumes
        .iter()
        .map(|(source, target, read_only)| {
            format!("{source}:{target}{}", if *read_only { ":ro" } else { "" })
        })
        .collect();
    let mounts: Vec<Value> = request
        .volumes
        .iter()
        .map(|(source, target, read_only)| {
            json!({ "Type": "bind", "Source": source, "Destination": target, "Mode": "", "RW": !read_only, "Propagation": "rprivate" })
        })
        .collect();
    json!({
        "Id": container.id,
        "Created": time(Some(container.created)),
        "Path": words.first(),
        "Args": words.iter().skip(1).collect::<Vec<_>>(),
        "State": {
            "Status": state.status.word(),
            "Running": state.status == Status::Running,
            "Paused": false,
            "Restarting": false,
            "OOMKilled": state.oom_killed,
            "Dead": false,
            "Pid": state.pid,
            "ExitCode": state.exit_code,
            "Error": state.error,
            "StartedAt": time(state.started_at),
            "FinishedAt": time(state.finished_at),
        },
        "Image": container.image_id,
        "LogPath": containers.directory(&container.id).join("log.json"),
        "Name": format!("/{}", container.name),
        "Driver": "erofs",
        "Platform": "linux",
        "HostConfig": {
            "Runtime": "caisson",
            "AutoRemove": container.auto_remove,
            "NetworkMode": "none",
            "Binds": list(&binds),
            "CapAdd": list(&request.cap_add),
            "CapDrop": list(&request.cap_drop),
            "ReadonlyRootfs": request.read_only,
            "Memory": request.memory,
            "NanoCpus": request.cpu_quota * 10_000,
            "PidsLimit": if request.pids_limit == 0 { Value::Null } else { json!(request.pids_limit) },
        },
        "Mounts": mounts,
        "Config": {
            "Hostname": request.hostname,
            "User": request.user,
            "Tty": request.tty,
            "OpenStdin": request.open_stdin,
            "Env": request.env,
            "Cmd": list(&request.cmd),
            "Image": container.image,
            "WorkingDir": request.working_dir,
            "Entrypoint": list(&request.entrypoint),
            "Labels": request.labels,
            "StopSignal": request.stop_signal.to_string(),
        },
    })
}

fn describe_image(image: &Image) -> Value {
    let layers: Vec<String> = image
        .layers
        .iter()
        .map(|layer| layer.diff_id.to_string())
        .collect();
    json!({
        "Id": image.id.to_string(),
        "RepoTags": image.references.iter().map(|reference| reference.familiar()).collect::<Vec<_>>(),
        "Architecture": image.config.architecture().to_string(),
        "Os": image.config.os().to_string(),
        "Created": image.config.created(),
        "Size": image.size,
        "Config": serde_json::to_value(image.config.config()).unwrap_or_default(),
        "RootFS": { "Type": "layers", "Layers": layers },
    })
}
