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
    container::{Container, Containers, Request, Status},
    error::Error,
    mounts::{self, Mount, Share, Tmpfs},
    network::{self, Mode, Wanted},
    options,
    output::say,
    pull::{self, Policy},
    spec, terminal,
    volumes::{self, Volumes},
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
    let (mut extra, shares) = extra(matches)?;
    let network = Wanted::of(matches)?;
    let add = values(matches, "cap-add");
    let drop = values(matches, "cap-drop");
    let capabilities = spec::capabilities(&add, &drop)?;
    let policy = Policy::of(one(matches, "pull"))?;
    let mut request = request_of(matches)?;
    request.cap_add = add.iter().map(|name| (*name).to_owned()).collect();
    request.cap_drop = drop.iter().map(|name| (*name).to_owned()).collect();
    request.shm_size = extra.shm_size.unwrap_or(spec::SHM_BYTES);

    let containers = Containers::open()?;
    request.network = network;
    join_pod(&containers, &mut request)?;
    for share in shares {
        let share = volumes::place(&Volumes::of(&containers.config), share)?;
        request.add_share(&share);
        extra.shares.push(share);
    }
    check_limits(&containers, &request)?;
    let image = pull::image(&containers, &image_name, policy, matches.get_flag("quiet"))?;
    apply_image(&mut request, &image, matches, words)?;
    publish_all(&mut request, &image, matches)?;
    let networks = network::networks_of(&containers.config, &request.network)?;
    let paths = extra.shares.iter().filter(|share| share.volume.is_none());
    for share in paths {
        // As docker: a directory that is not there is made.
        if !Path::new(&share.source).exists() {
            fs::create_dir_all(&share.source)
                .map_err(Error::file("create the shared directory", &share.source))?;
        }
    }
    let id = Containers::new_id()?;
    if request.hostname.is_empty() {
        request.hostname = id.get(..12).unwrap_or(&id).to_owned();
    }
    extra.network = spec::Network {
        namespace: (!networks.is_empty()).then(|| network::namespace_of(&containers.config, &id)),
        resolver: network::resolver_of(&request.network, &networks),
        hosts: network::host_lines(&request.network, &networks)?,
    };
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
        let _ = volumes::remove_container(&containers, &container);
    })?;
    client.pass(signals)?;
    client
        .wait_for_start()
        .inspect_err(|_| clean_up(&containers, &container))?;
    if detach {
        say!("{}", container.id);
        return Ok(0);
    }
    client.attach(interactive, tty && interactive)
}

/// A monitor that failed has cleaned up itself; one that was killed has not.
fn clean_up(containers: &Containers, container: &Container) {
    let left = containers.find(&container.id);
    if left.is_ok_and(|left| container.auto_remove && !left.is_monitored()) {
        let _ = volumes::remove_container(containers, container);
    }
}

/// The specification's other parts, and shares that have no place on the host yet.
fn extra(matches: &ArgMatches) -> Result<(spec::Extra, Vec<Share>), Error> {
    let mut tmpfs = values(matches, "tmpfs")
        .into_iter()
        .map(mounts::tmpfs)
        .collect::<Result<Vec<_>, _>>()?;
    let mut shares = values(matches, "volume")
        .into_iter()
        .map(mounts::volume)
        .collect::<Result<Vec<_>, _>>()?;
    for text in values(matches, "mount") {
        match mounts::mount(text)? {
            Mount::Share(share) => shares.push(share),
            Mount::Tmpfs(one) => tmpfs.push(one),
        }
    }
    check_mounts(&tmpfs, &shares)?;
    let extra = spec::Extra {
        tmpfs,
        shares: Vec::new(),
        ulimits: values(matches, "ulimit")
            .into_iter()
            .map(options::ulimit)
            .collect::<Result<_, _>>()?,
        shm_size: one(matches, "shm-size")
            .map(options::shm_size)
            .transpose()?,
        network: spec::Network::default(),
    };
    let on_shm = |share: &Share| Path::new(&share.target) == Path::new("/dev/shm");
    if extra.shm_size.is_some() && (extra.mounts_on("/dev/shm") || shares.iter().any(on_shm)) {
        return Err(Error::Usage(
            "--shm-size: a --tmpfs or -v has its own /dev/shm; give only one of them".to_owned(),
        ));
    }
    Ok((extra, shares))
}

/// One mount for a target, and from what is there.
fn check_mounts(tmpfs: &[Tmpfs], shares: &[Share]) -> Result<(), Error> {
    let targets = tmpfs
        .iter()
        .map(|(target, _)| target)
        .chain(shares.iter().map(|share| &share.target));
    let mut seen = std::collections::HashSet::new();
    for target in targets {
        if !seen.insert(Path::new(target)) {
            return Err(Error::Usage(format!("Duplicate mount point: {target}")));
        }
    }
    shares.iter().try_for_each(|share| share.source.check())
}

/// What the flags alone say.
fn request_of(matches: &ArgMatches) -> Result<Request, Error> {
    let mut request = Request {
        tty: matches.get_flag("tty"),
        open_stdin: matches.get_flag("interactive"),
        stdin_once: matches.get_flag("interactive") && !matches.get_flag("detach"),
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

/// Finds the container of `--network container:…`, whose microVM and names are then this one's too.
fn join_pod(containers: &Containers, request: &mut Request) -> Result<(), Error> {
    let Mode::Container(name) = &request.network.mode else {
        return Ok(());
    };
    let other = containers.find(name)?;
    let owner = match other.pod() {
        Some(owner) => containers.find(owner)?,
        None => other,
    };
    if owner.state.status != Status::Running {
        return Err(Error::State(format!(
            "--network container:{name}: container {} is not running",
            owner.name
        )));
    }
    request.hostname.clone_from(&owner.request.hostname);
    request.network.mode = Mode::Container(owner.id);
    Ok(())
}

/// -P: the ports that the image or `--expose` names.
fn publish_all(request: &mut Request, image: &Image, matches: &ArgMatches) -> Result<(), Error> {
    let given = values(matches, "expose");
    let flags = network::exposed(given.iter().copied())?;
    if !matches.get_flag("publish-all") {
        return Ok(());
    }
    let config = image.config.config().clone().unwrap_or_default();
    let of_image = config.exposed_ports().clone().unwrap_or_default();
    let mut all = network::exposed(of_image.iter().map(String::as_str))?;
    all.extend(flags);
    network::publish_exposed(&mut request.network.ports, &all);
    network::check_number(&request.network.ports)
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
        .filter(|user| !user.is_empty())
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
    let made = volumes::make(containers, &container.request)
        .and_then(|()| write(containers, container, config));
    if made.is_err() {
        let _ = volumes::remove_container_locked(containers, container);
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
