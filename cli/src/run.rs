//! `run`: from flags to a container with a monitor.

use std::{
    fs,
    os::{
        fd::OwnedFd,
        unix::{net::UnixStream, process::CommandExt},
    },
    path::Path,
    process::{Command, Stdio},
};

use caisson_rootfs_builder::Image;
use clap::ArgMatches;

use crate::{
    arguments::{one, rest, values},
    attach::{Client, Signals},
    container::{Container, Containers, Request},
    error::Error,
    options, spec, terminal,
};

/// SIGTERM.
const TERM: u32 = 15;

/// Runs the verb.
///
/// # Errors
/// Whatever keeps the container from starting; `Error::run_code` is the exit code.
pub fn run(matches: &ArgMatches) -> Result<u8, Error> {
    let (image_name, words) = rest(matches);
    let (detach, tty, interactive) = (
        matches.get_flag("detach"),
        matches.get_flag("tty"),
        matches.get_flag("interactive"),
    );
    if !detach {
        terminal::require(tty, interactive)?;
    }
    let extra = extra(matches)?;
    let network = one(matches, "network").unwrap_or("none");
    if network != "none" {
        return Err(Error::Usage(format!(
            "--network {network}: not supported yet; there is \"none\", the loopback interface only"
        )));
    }
    let add = values(matches, "cap-add");
    let drop = values(matches, "cap-drop");
    let capabilities = spec::capabilities(&add, &drop)?;
    let mut request = request_of(matches)?;
    request.cap_add = add.iter().map(|name| (*name).to_owned()).collect();
    request.cap_drop = drop.iter().map(|name| (*name).to_owned()).collect();
    for volume in &extra.volumes {
        request.add_volume(volume);
    }

    let containers = Containers::open()?;
    check_limits(&containers, &request)?;
    let image = containers.images()?.get(&image_name)?;
    apply_image(&mut request, &image, matches, words)?;
    for volume in &extra.volumes {
        // As docker: a directory that is not there is made.
        if !Path::new(&volume.source).exists() {
            fs::create_dir_all(&volume.source)
                .map_err(Error::file("create the shared directory", &volume.source))?;
        }
    }
    let id = Containers::new_id()?;
    if request.hostname.is_empty() {
        request.hostname = id.get(..12).unwrap_or(&id).to_owned();
    }
    request.env = spec::environment(&image.config, &request.env, &request.hostname, tty);
    let config = spec::container(&request, &capabilities, &extra);
    let mut container = Container::new(
        id,
        String::new(),
        image_name,
        image.id.to_string(),
        Vec::new(),
    );
    container.request = request;
    container.auto_remove = matches.get_flag("rm");
    let signals = Signals::hold(tty)?;
    create(&containers, &mut container, one(matches, "name"), &config)?;

    let client = start_monitor(&containers, &container.id).inspect_err(|_| {
        let _ = containers.remove(&container.id);
    })?;
    client.pass(signals)?;
    client
        .wait_for_start()
        .inspect_err(|_| clean_up(&containers, &container))?;
    if detach {
        println!("{}", container.id);
        return Ok(0);
    }
    client.attach(interactive, tty && interactive)
}

/// A monitor that failed has cleaned up itself; one that was killed has not.
fn clean_up(containers: &Containers, container: &Container) {
    let left = containers.find(&container.id);
    if left.is_ok_and(|left| container.auto_remove && !left.is_monitored()) {
        let _ = containers.remove(&container.id);
    }
}

fn extra(matches: &ArgMatches) -> Result<spec::Extra, Error> {
    Ok(spec::Extra {
        tmpfs: values(matches, "tmpfs")
            .into_iter()
            .map(options::tmpfs)
            .collect::<Result<_, _>>()?,
        volumes: values(matches, "volume")
            .into_iter()
            .map(options::volume)
            .collect::<Result<_, _>>()?,
        ulimits: values(matches, "ulimit")
            .into_iter()
            .map(options::ulimit)
            .collect::<Result<_, _>>()?,
    })
}

/// What the flags alone say.
fn request_of(matches: &ArgMatches) -> Result<Request, Error> {
    let mut request = Request {
        tty: matches.get_flag("tty"),
        open_stdin: matches.get_flag("interactive"),
        read_only: matches.get_flag("read-only"),
        stop_signal: TERM,
        ..Request::default()
    };
    if let Some(name) = one(matches, "name") {
        options::container_name(name)?;
    }
    for text in values(matches, "env") {
        request.env.extend(options::variable(text)?);
    }
    if let Some(directory) = one(matches, "workdir") {
        options::workdir(directory)?;
        directory.clone_into(&mut request.working_dir);
    }
    if let Some(hostname) = one(matches, "hostname") {
        options::hostname(hostname)?;
        hostname.clone_into(&mut request.hostname);
    }
    if let Some(text) = one(matches, "cpus") {
        request.cpu_quota = options::cpus(text)?;
    }
    if let Some(text) = one(matches, "memory") {
        request.memory = options::size("-m", text)?;
    }
    if let Some(text) = one(matches, "pids-limit") {
        request.pids_limit = options::pids(text)?;
    }
    Ok(request)
}

/// Docker's least memory limit.
const MIN_MEMORY: u64 = 6 << 20;

/// What this host cannot give is refused before anything is made.
fn check_limits(containers: &Containers, request: &Request) -> Result<(), Error> {
    let config = &containers.config;
    if request.memory > 0 && request.memory < MIN_MEMORY {
        return Err(Error::Usage(format!(
            "-m {} bytes: a container needs at least 6m of memory",
            request.memory
        )));
    }
    let most = host_memory().min(u64::from(config.max_memory_mib) << 20);
    if request.memory > most {
        return Err(Error::Usage(format!(
            "-m {} bytes: more memory than this host can give ({} MiB)",
            request.memory,
            most >> 20
        )));
    }
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let cpus = u64::try_from(request.cpu_quota)
        .unwrap_or(0)
        .div_ceil(100_000);
    // A microVM may have more processors than the host; without sense is only what it cannot have.
    if cpus > u64::from(config.max_vcpus) {
        return Err(Error::Usage(format!(
            "--cpus {}: a container can have at most {} CPUs (this host has {processors})",
            request.cpu_quota as f64 / 100_000.0,
            config.max_vcpus
        )));
    }
    Ok(())
}

fn host_memory() -> u64 {
    let information = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    information
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemTotal:")?
                .trim()
                .strip_suffix(" kB")?
                .parse::<u64>()
                .ok()
        })
        .map_or(u64::MAX, |kib| kib << 10)
}

/// What the flags left open comes from the image.
fn apply_image(
    request: &mut Request,
    image: &Image,
    matches: &ArgMatches,
    words: Vec<String>,
) -> Result<(), Error> {
    let config = image.config.config().clone().unwrap_or_default();
    let given = one(matches, "entrypoint");
    request.entrypoint = match given {
        Some("") => Vec::new(),
        Some(program) => vec![program.to_owned()],
        None => config.entrypoint().clone().unwrap_or_default(),
    };
    request.cmd = if !words.is_empty() || given.is_some() {
        words
    } else {
        config.cmd().clone().unwrap_or_default()
    };
    let program = request.entrypoint.first().or(request.cmd.first());
    if program.is_none_or(|program| program.is_empty()) {
        return Err(Error::Usage(
            "no command specified, and the image has none".to_owned(),
        ));
    }
    request.user = one(matches, "user")
        .map(str::to_owned)
        .or(config.user().clone())
        .unwrap_or_default();
    if request.working_dir.is_empty() {
        request.working_dir = config
            .working_dir()
            .clone()
            .filter(|directory| directory.starts_with('/'))
            .unwrap_or_else(|| "/".to_owned());
    }
    if let Some(text) = config
        .stop_signal()
        .as_ref()
        .filter(|text| !text.is_empty())
    {
        request.stop_signal = options::signal(text)?;
    }
    request.labels = config
        .labels()
        .clone()
        .unwrap_or_default()
        .into_iter()
        .collect();
    Ok(())
}

/// Puts a container on disk under a free name, with a lease on its image.
fn create(
    containers: &Containers,
    container: &mut Container,
    name: Option<&str>,
    config: &serde_json::Value,
) -> Result<(), Error> {
    let _lock = containers.lock()?;
    containers.sweep()?;
    let others = containers.all()?;
    container.name = match name {
        Some(name) => {
            if let Some(other) = others.iter().find(|other| other.name == name) {
                return Err(Error::Exit {
                    code: 125,
                    message: format!(
                        "Conflict. The container name \"/{name}\" is already in use by container \"{}\". \
                         You have to remove (or use another name for) that container",
                        other.id
                    ),
                });
            }
            name.to_owned()
        }
        None => free_name(&container.id, &others),
    };
    let made = write(containers, container, config);
    if made.is_err() {
        let _ = containers.remove(&container.id);
    }
    made
}

fn write(
    containers: &Containers,
    container: &mut Container,
    config: &serde_json::Value,
) -> Result<(), Error> {
    let bundle = containers.bundle(&container.id);
    fs::create_dir_all(&bundle).map_err(Error::file("create", &bundle))?;
    // Under the lease the image cannot go; and it may have changed since its name was looked up.
    let image = containers
        .images()?
        .lease(&container.id, &container.image)?;
    container.image_id = image.id.to_string();
    container.layers = image
        .layers
        .iter()
        .map(|layer| layer.path.clone())
        .collect();
    let path = bundle.join("config.json");
    fs::write(&path, config.to_string()).map_err(Error::file("write", path))?;
    containers.write(container)
}

/// Two words, by the id; a number when they are taken.
fn free_name(id: &str, others: &[Container]) -> String {
    const HOW: [&str; 16] = [
        "brave", "calm", "clear", "deep", "eager", "fair", "gentle", "keen", "lively", "merry",
        "noble", "quick", "quiet", "steady", "sunny", "wise",
    ];
    const WHO: [&str; 16] = [
        "brunel",
        "eads",
        "eiffel",
        "gaudi",
        "hopper",
        "isambard",
        "lovelace",
        "noether",
        "roebling",
        "smeaton",
        "telford",
        "thales",
        "triger",
        "turing",
        "vitruvius",
        "warren",
    ];
    let digit = |index: usize| {
        id.get(index..=index)
            .and_then(|text| usize::from_str_radix(text, 16).ok())
            .unwrap_or(0)
    };
    let base = format!("{}_{}", HOW[digit(0) % 16], WHO[digit(1) % 16]);
    let taken = |name: &str| others.iter().any(|other| other.name == name);
    if !taken(&base) {
        return base;
    }
    (2..)
        .map(|number| format!("{base}{number}"))
        .find(|name| !taken(name))
        .unwrap_or(base)
}

fn start_monitor(containers: &Containers, id: &str) -> Result<Client, Error> {
    let pair = || UnixStream::pair().map_err(Error::io("make a socket pair"));
    let (control, monitors_control) = pair()?;
    let (stream, monitors_stream) = pair()?;
    let log = containers.directory(id).join("monitor.log");
    let log = fs::File::create(&log).map_err(Error::file("create", &log))?;
    let program = std::env::current_exe().map_err(Error::io("find this program"))?;
    Command::new(&program)
        .args(["monitor", id])
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(monitors_control)))
        .stdout(Stdio::from(OwnedFd::from(monitors_stream)))
        .stderr(log)
        // Signals of the caller's terminal are for the caller, who passes them on.
        .process_group(0)
        .spawn()
        .map_err(Error::file("run", program))?;
    Ok(Client { control, stream })
}
