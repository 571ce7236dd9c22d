//! What a running container has of its networks: addresses, ports, and what netavark was told.

use std::{
    collections::HashSet,
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use caisson_sandbox::Config;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    address, namespace, namespace_of,
    netavark::Netavark,
    networks_of,
    passt::{self, Link},
    ports::{self, Port, Reserved},
    resolver,
    store::{Network, Networks},
    wanted::{Mode, Wanted},
};
use crate::{
    container::{Container, Containers},
    error::Error,
};

/// A container's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// The host's boot: of an earlier one nothing is left but the record.
    boot: String,
    /// Its id.
    pub container: String,
    /// Its name.
    pub name: String,
    /// Its interfaces, one a network.
    pub endpoints: Vec<Endpoint>,
    /// Its ports, each with the host's.
    pub ports: Vec<Port>,
    /// What netavark is told to make, and to take away; nothing where passt does it.
    input: Value,
    /// netavark has failed to take it away; it is asked once more.
    #[serde(default)]
    is_left: bool,
}

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Name of the network.
    pub network: String,
    /// Id of the network.
    pub network_id: String,
    /// "eth0".
    pub interface: String,
    /// Hardware address.
    pub mac: String,
    /// Addresses with the lengths of their networks' prefixes.
    pub addresses: Vec<IpNet>,
    /// The host's address for each of them.
    pub gateways: Vec<IpAddr>,
    /// Names beside the container's.
    pub aliases: Vec<String>,
}

impl Attachment {
    /// Whether it has addresses of IPv4, and of IPv6.
    pub fn families(&self) -> (bool, bool) {
        families(&self.endpoints)
    }

    /// Reads a container's record; there is none of one that does not run or has no networks.
    pub fn read(config: &Config, id: &str) -> Option<Self> {
        let record = read(&path(&Networks::of(config), id)).ok();
        record.filter(|record| !record.is_left)
    }

    /// Every record.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn all(networks: &Networks) -> Result<Vec<Self>, Error> {
        let directory = networks.attached();
        let entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(Error::file("list", &directory))?,
        };
        let records = entries.flatten().map(|entry| entry.path()).filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "json")
        });
        Ok(records.filter_map(|path| read(&path).ok()).collect())
    }
}

fn families(endpoints: &[Endpoint]) -> (bool, bool) {
    let has = |six| {
        let mut all = endpoints.iter().flat_map(|endpoint| &endpoint.addresses);
        all.any(|address| matches!(address, IpNet::V6(_)) == six)
    };
    (has(false), has(true))
}

fn path(networks: &Networks, id: &str) -> PathBuf {
    networks.attached().join(format!("{id}.json"))
}

/// Where a container's passt notes its process id.
fn pid_file(networks: &Networks, id: &str) -> PathBuf {
    networks.attached().join(format!("{id}.pid"))
}

fn read(path: &Path) -> io::Result<Attachment> {
    serde_json::from_slice(&fs::read(path)?).map_err(io::Error::other)
}

/// Writes a record. The caller holds the lock.
fn write(networks: &Networks, attachment: &Attachment) -> Result<(), Error> {
    let text = serde_json::to_vec_pretty(attachment).map_err(|error| Error::Io {
        what: "encode a container's networks",
        source: io::Error::other(error),
    })?;
    let path = path(networks, &attachment.container);
    // One name for all, under the lock: what a killed one has left is written over.
    let new = networks.attached().join("new");
    fs::write(&new, text)
        .and_then(|()| fs::rename(&new, &path))
        .map_err(Error::file("write", path))
}

fn boot() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

/// Gives a container its addresses, its ports of the host for as long as the second value lives,
/// and an empty namespace. `None`: it asks for no networks. What is made is for [`detach`] to take
/// away, also after an error.
///
/// # Errors
/// An address or a port is taken, a network is gone or full.
pub fn prepare(
    containers: &Containers,
    container: &Container,
) -> Result<Option<(Attachment, Reserved)>, Error> {
    let config = &containers.config;
    let wanted = &container.request.network;
    let found = networks_of(config, wanted)?;
    if found.is_empty() {
        return Ok(None);
    }
    let networks = Networks::of(config);
    forget_strangers(containers, &networks)?;
    let _lock = networks.lock()?;
    for network in found.iter().filter(|network| !network.is_passt()) {
        // It may have gone since it was looked up.
        networks.get(&network.name)?;
    }
    let others = Attachment::all(&networks)?;
    let endpoints = endpoints(container, &found, &others)?;
    let (v4, v6) = families(&endpoints);
    let mut ports = ports::of_families(&wanted.ports, v4, v6);
    let mut reserved = ports::reserve(&mut ports, v4, v6)?;
    let input = if wanted.mode == Mode::User {
        // It listens at them itself.
        reserved = Reserved::default();
        Value::Null
    } else {
        input(container, &found, &endpoints, &ports)
    };
    let attachment = Attachment {
        boot: boot(),
        container: container.id.clone(),
        name: container.name.clone(),
        endpoints,
        ports,
        input,
        is_left: false,
    };
    write(&networks, &attachment)?;
    namespace::make(&namespace_of(config, &container.id))?;
    Ok(Some((attachment, reserved)))
}

/// Makes a container's interfaces and rules. What it returns has to be kept as long as they are to
/// work.
///
/// # Errors
/// netavark's or passt's words.
pub async fn connect(
    config: Config,
    attachment: Attachment,
    wanted: Wanted,
) -> Result<Option<Link>, Error> {
    if attachment.input.is_null() {
        let namespace = namespace_of(&config, &attachment.container);
        let pid_file = pid_file(&Networks::of(&config), &attachment.container);
        let link = passt::connect(&attachment, &wanted, &namespace, &pid_file);
        return link.await.map(Some);
    }
    tokio::task::spawn_blocking(move || connect_bridges(&config, &attachment))
        .await
        .unwrap_or_else(|error| Err(Error::io("connect the container")(error)))?;
    Ok(None)
}

fn connect_bridges(config: &Config, attachment: &Attachment) -> Result<(), Error> {
    let networks = Networks::of(config);
    let with_names = attachment.input["network_info"]
        .as_object()
        .is_some_and(|all| all.values().any(|network| network["dns_enabled"] == true));
    let netavark = Netavark::find(config, with_names)?;
    // Two at once would each read the rules before the other has changed them.
    let _lock = networks.lock()?;
    netavark.set_up(
        &attachment.input,
        &namespace_of(config, &attachment.container),
    )
}

/// Takes away all that a container has of its networks. Nothing is no error. When netavark fails,
/// the record stays for one more try; after that nothing is left to find it by.
///
/// # Errors
/// Its namespace or its record stays.
pub fn detach(config: &Config, id: &str) -> Result<(), Error> {
    let networks = Networks::of(config);
    let path = path(&networks, id);
    if !path.exists() {
        return Ok(());
    }
    let _lock = networks.lock()?;
    let namespace = namespace_of(config, id);
    let mut left = None;
    match read(&path) {
        // Since then the host has restarted, or somebody was faster.
        Ok(attachment) if attachment.boot != boot() => {}
        // There is nothing but the process and the namespace.
        Ok(attachment) if attachment.input.is_null() => {}
        Ok(attachment) => {
            if let Err(error) = tear_down(config, &attachment, &namespace) {
                // It goes on after an error, and fails for things that have gone, too: what it says
                // the second time tells nothing. A full disk keeps no container from going.
                let again = !attachment.is_left && {
                    let is_left = true;
                    write(
                        &networks,
                        &Attachment {
                            is_left,
                            ..attachment
                        },
                    )
                    .is_ok()
                };
                if again {
                    left = Some(error);
                } else {
                    log::warn!("container {id}: {error}");
                }
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => log::warn!("{} is damaged: {error}", path.display()),
    }
    passt::end(&pid_file(&networks, id))?;
    namespace::remove(&namespace)?;
    if let Some(error) = left {
        return Err(error);
    }
    fs::remove_file(&path).map_err(Error::file("remove", path))?;
    if Attachment::all(&networks)?.is_empty() {
        Netavark::forget(config);
    }
    // Others' namespaces keep it.
    let _ =
        fs::remove_dir(config.run_dir.join("netns")).and_then(|()| fs::remove_dir(&config.run_dir));
    Ok(())
}

fn tear_down(config: &Config, attachment: &Attachment, namespace: &Path) -> Result<(), Error> {
    // It goes on when there is nothing in it, but wants one.
    namespace::make(namespace)?;
    Netavark::find(config, false)?.tear_down(&attachment.input, namespace)
}

/// Takes away what containers have whose directory somebody has removed, and what was left. What
/// stays keeps its addresses from others. The caller does not hold the lock.
///
/// # Errors
/// The records cannot be listed.
pub fn forget_strangers(containers: &Containers, networks: &Networks) -> Result<(), Error> {
    for attachment in Attachment::all(networks)? {
        let id = &attachment.container;
        if (attachment.is_left || !containers.directory(id).exists())
            && let Err(error) = detach(&containers.config, id)
        {
            log::warn!("container {id}: {error}");
        }
    }
    Ok(())
}

/// An interface for each network, with addresses that nobody has.
fn endpoints(
    container: &Container,
    networks: &[Network],
    others: &[Attachment],
) -> Result<Vec<Endpoint>, Error> {
    let wanted = &container.request.network;
    let all = || others.iter().flat_map(|other| &other.endpoints);
    for address in &wanted.addresses {
        check_address(*address, networks, others)?;
    }
    let mut made = Vec::new();
    for (index, network) in networks.iter().enumerate() {
        let taken: HashSet<IpAddr> = all()
            .filter(|endpoint| endpoint.network_id == network.id)
            .flat_map(|endpoint| endpoint.addresses.iter().map(IpNet::addr))
            .collect();
        let mut addresses = Vec::new();
        for subnet in &network.subnets {
            let mut given = wanted.addresses.iter().copied();
            let address = given
                .find(|address| subnet.subnet.contains(address))
                .or_else(|| address::lease(subnet, &taken))
                .ok_or_else(|| {
                    Error::State(format!(
                        "network {} has no address left in {}",
                        network.name,
                        subnet.range.unwrap_or(subnet.subnet)
                    ))
                })?;
            let net = IpNet::new(address, subnet.subnet.prefix_len());
            addresses.extend(net.ok());
        }
        let mac = wanted.mac.clone().unwrap_or_else(|| {
            addresses
                .first()
                .map(|address| address::mac_of(address.addr()))
                .unwrap_or_default()
        });
        if let Some(other) = others.iter().find(|other| {
            let mut endpoints = other.endpoints.iter();
            endpoints.any(|one| one.network_id == network.id && one.mac == mac)
        }) {
            return Err(Error::State(format!(
                "--mac-address {mac}: container {} in network {} has it",
                other.name, network.name
            )));
        }
        made.push(Endpoint {
            network: network.name.clone(),
            network_id: network.id.clone(),
            interface: format!("eth{index}"),
            mac,
            gateways: network
                .subnets
                .iter()
                .map(|subnet| subnet.gateway)
                .collect(),
            aliases: wanted.aliases.clone(),
            addresses,
        });
    }
    Ok(made)
}

/// An address that was asked for can be had, and nobody has it.
fn check_address(wanted: IpAddr, networks: &[Network], others: &[Attachment]) -> Result<(), Error> {
    let flag = if wanted.is_ipv4() { "--ip" } else { "--ip6" };
    let subnet = |network: &Network| {
        let mut subnets = network.subnets.iter();
        subnets.any(|subnet| address::can_have(subnet, wanted))
    };
    let Some(network) = networks.iter().find(|network| subnet(network)) else {
        let names: Vec<&str> = networks
            .iter()
            .map(|network| network.name.as_str())
            .collect();
        return Err(Error::State(format!(
            "{flag} {wanted}: not an address that a container can have in network {}",
            names.join(", ")
        )));
    };
    let has = |other: &&Attachment| {
        other.endpoints.iter().any(|endpoint| {
            let mut addresses = endpoint.addresses.iter();
            endpoint.network_id == network.id && addresses.any(|net| net.addr() == wanted)
        })
    };
    match others.iter().find(has) {
        Some(other) => Err(Error::State(format!(
            "{flag} {wanted}: container {} has it",
            other.name
        ))),
        None => Ok(()),
    }
}

/// What netavark reads: its `NetworkOptions`.
fn input(
    container: &Container,
    networks: &[Network],
    endpoints: &[Endpoint],
    ports: &[Port],
) -> Value {
    let wanted = &container.request.network;
    let (mut interfaces, mut about) = (Map::new(), Map::new());
    for (index, (network, endpoint)) in networks.iter().zip(endpoints).enumerate() {
        let mut aliases = endpoint.aliases.clone();
        aliases.push(container.short_id().to_owned());
        interfaces.insert(
            network.name.clone(),
            json!({
                "interface_name": endpoint.interface,
                "static_ips": endpoint.addresses.iter().map(IpNet::addr).collect::<Vec<_>>(),
                "static_mac": endpoint.mac,
                "aliases": aliases,
            }),
        );
        let subnets: Vec<Value> = network
            .subnets
            .iter()
            .map(|subnet| json!({ "subnet": subnet.subnet, "gateway": subnet.gateway }))
            .collect();
        let mut options = Map::new();
        // Containers of one network do not reach those of another.
        options.insert("isolate".to_owned(), json!("true"));
        // The first network leads out.
        options.insert("metric".to_owned(), json!((100 + index).to_string()));
        if let Some(mtu) = network.mtu {
            options.insert("mtu".to_owned(), json!(mtu.to_string()));
        }
        about.insert(
            network.name.clone(),
            json!({
                "name": network.name,
                "id": network.id,
                "driver": "bridge",
                "network_interface": network.bridge,
                "subnets": subnets,
                "ipv6_enabled": network.has_v6(),
                "internal": network.internal,
                "dns_enabled": resolver::serves_names(network),
                "network_dns_servers": [],
                "ipam_options": { "driver": "host-local" },
                "options": options,
            }),
        );
    }
    // Of "0.0.0.0" and "::" netavark makes rules for all addresses of that family alone.
    let mappings: Vec<Value> = ports
        .iter()
        .map(|port| {
            json!({
                "host_ip": port.host_ip.map(|address| address.to_string()).unwrap_or_default(),
                "host_port": port.host_port,
                "container_port": port.container_port,
                "protocol": port.protocol,
                "range": 1,
            })
        })
        .collect();
    json!({
        "container_id": container.id,
        "container_name": container.name,
        "networks": interfaces,
        "network_info": about,
        "port_mappings": mappings,
        "dns_servers": wanted.dns,
    })
}

#[cfg(test)]
mod tests;
