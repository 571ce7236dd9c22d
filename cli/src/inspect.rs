//! `inspect`.

use std::time::SystemTime;

use caisson_rootfs_builder::Image;
use clap::ArgMatches;
use serde_json::{Map, Value, json};

use crate::{
    Format,
    arguments::values,
    container::{Container, Containers, Status},
    error::Error,
    network::{self, Attachment, Endpoint, Mode, Port},
    output::{for_each, say},
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
    print_json(&found);
    Ok(code)
}

/// Runs `image inspect`.
///
/// # Errors
/// The store cannot be read.
pub fn images(matches: &ArgMatches) -> Result<u8, Error> {
    Format::of(matches)?;
    let images = Containers::open()?.images()?;
    Ok(print(values(matches, "name"), |name| {
        Ok(describe_image(&images.get(name)?))
    }))
}

/// Prints the JSON array of what there is of these names, and on stderr what there is not, for which
/// the exit status is 1.
pub fn print<'a>(
    names: impl IntoIterator<Item = &'a str>,
    describe: impl Fn(&str) -> Result<Value, Error>,
) -> u8 {
    let mut found = Vec::new();
    let code = for_each(names, |name| {
        found.push(describe(name)?);
        Ok(())
    });
    print_json(&found);
    code
}

fn print_json(found: &[Value]) {
    say!(
        "{}",
        serde_json::to_string_pretty(found).unwrap_or_default()
    );
}

fn time(at: Option<SystemTime>) -> String {
    at.map_or_else(
        || "0001-01-01T00:00:00Z".to_owned(),
        |at| humantime::format_rfc3339_nanos(at).to_string(),
    )
}

/// Docker's word for `--network`.
pub fn network_mode(container: &Container) -> String {
    match &container.request.network.mode {
        Mode::None => "none".to_owned(),
        Mode::User => "passt".to_owned(),
        Mode::Networks(names) => names.first().cloned().unwrap_or_default(),
        Mode::Container(id) => format!("container:{id}"),
    }
}

/// As asked for; a port that may be any is "".
fn port_bindings(ports: &[Port]) -> Value {
    let mut bindings = Map::new();
    for port in ports {
        let binding = json!({
            "HostIp": port.host_ip.map(|address| address.to_string()).unwrap_or_default(),
            "HostPort": if port.host_port == 0 { String::new() } else { port.host_port.to_string() },
        });
        add(&mut bindings, port.inner(), binding);
    }
    Value::Object(bindings)
}

fn add(map: &mut Map<String, Value>, key: String, value: Value) {
    let list = map.entry(key).or_insert_with(|| json!([]));
    if let Some(list) = list.as_array_mut() {
        list.push(value);
    }
}

/// What a container has now. One that does not run has nothing.
fn network_settings(containers: &Containers, container: &Container) -> Value {
    let record = Attachment::read(&containers.config, &container.id);
    let (mut ports, mut networks) = (Map::new(), Map::new());
    if let Some(record) = &record {
        let (v4, v6) = record.families();
        for port in &record.ports {
            for address in port.outer(v4, v6) {
                let binding = json!({ "HostIp": address.ip().to_string(), "HostPort": address.port().to_string() });
                add(&mut ports, port.inner(), binding);
            }
        }
        for endpoint in &record.endpoints {
            networks.insert(endpoint.network.clone(), describe_endpoint(endpoint));
        }
    }
    let names = match &container.request.network.mode {
        Mode::Networks(names) => names.as_slice(),
        _ => &[],
    };
    for name in names {
        // Those of one that has ended are told without addresses.
        networks.entry(name.clone()).or_insert_with(|| json!({}));
    }
    let mut settings = json!({ "Ports": ports });
    if let Some(first) = record.iter().flat_map(|record| &record.endpoints).next() {
        // Docker's older form: the first network's.
        let of = describe_endpoint(first);
        for key in ["IPAddress", "IPPrefixLen", "Gateway", "MacAddress"] {
            settings[key] = of[key].clone();
        }
        settings["SandboxKey"] = json!(network::namespace_of(&containers.config, &container.id));
    }
    settings["Networks"] = Value::Object(networks);
    settings
}

fn describe_endpoint(endpoint: &Endpoint) -> Value {
    let of = |six: bool| {
        let found = endpoint
            .addresses
            .iter()
            .zip(&endpoint.gateways)
            .find(|(net, _)| net.addr().is_ipv6() == six);
        found.map_or_else(
            || (String::new(), 0, String::new()),
            |(net, gateway)| {
                (
                    net.addr().to_string(),
                    net.prefix_len(),
                    gateway.to_string(),
                )
            },
        )
    };
    let ((address, prefix, gateway), (address6, prefix6, gateway6)) = (of(false), of(true));
    json!({
        "NetworkID": endpoint.network_id,
        "Aliases": endpoint.aliases,
        "MacAddress": endpoint.mac,
        "IPAddress": address,
        "IPPrefixLen": prefix,
        "Gateway": gateway,
        "GlobalIPv6Address": address6,
        "GlobalIPv6PrefixLen": prefix6,
        "IPv6Gateway": gateway6,
    })
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
        .filter_map(|(source, target, read_only)| {
            let source = match request.volume_names.get(target) {
                Some(volume) if volume.anonymous => return None,
                Some(volume) => &volume.name,
                None => source,
            };
            let mode = if *read_only { ":ro" } else { "" };
            Some(format!("{source}:{target}{mode}"))
        })
        .collect();
    let mounts: Vec<Value> = request
        .volumes
        .iter()
        .map(|(source, target, read_only)| match request.volume_names.get(target) {
            Some(volume) => {
                json!({ "Type": "volume", "Name": volume.name, "Driver": "local", "Source": source, "Destination": target, "Mode": "", "RW": !read_only, "Propagation": "" })
            }
            None => {
                let propagation = if request.following.contains(target) { "rslave" } else { "rprivate" };
                json!({ "Type": "bind", "Source": source, "Destination": target, "Mode": "", "RW": !read_only, "Propagation": propagation })
            }
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
            "NetworkMode": network_mode(container),
            "PortBindings": port_bindings(&request.network.ports),
            "Dns": list(&request.network.dns.iter().map(ToString::to_string).collect::<Vec<_>>()),
            "DnsSearch": list(&request.network.dns_searches),
            "DnsOptions": list(&request.network.dns_options),
            "ExtraHosts": list(&request.network.hosts.iter().map(|(name, place)| format!("{name}:{place}")).collect::<Vec<_>>()),
            "Binds": list(&binds),
            "CapAdd": list(&request.cap_add),
            "CapDrop": list(&request.cap_drop),
            "ReadonlyRootfs": request.read_only,
            "Memory": request.memory,
            "ShmSize": if request.shm_size == 0 { crate::spec::SHM_BYTES } else { request.shm_size },
            "NanoCpus": request.cpu_quota * 10_000,
            "PidsLimit": if request.pids_limit == 0 { Value::Null } else { json!(request.pids_limit) },
        },
        "NetworkSettings": network_settings(containers, container),
        "Mounts": mounts,
        "Config": {
            "Hostname": request.hostname,
            "User": request.user,
            "Tty": request.tty,
            "OpenStdin": request.open_stdin,
            "StdinOnce": request.stdin_once,
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
        "RepoDigests": image.digests.iter().map(|reference| reference.familiar()).collect::<Vec<_>>(),
        "Architecture": image.config.architecture().to_string(),
        "Os": image.config.os().to_string(),
        "Created": image.config.created(),
        "Size": image.size,
        "Config": serde_json::to_value(image.config.config()).unwrap_or_default(),
        "RootFS": { "Type": "layers", "Layers": layers },
    })
}
