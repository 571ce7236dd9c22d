//! `network` and `port`.

use std::{collections::BTreeMap, net::IpAddr};

use caisson_sandbox::Config;
use clap::ArgMatches;
use ipnet::IpNet;
use serde_json::{Map, Value, json};

use super::{
    address,
    attachment::{self, Attachment},
    passt, ports,
    store::{Draft, Network, Networks, Subnet},
    wanted::Mode,
};
use crate::{
    Format,
    arguments::{one, values},
    container::{Container, Containers},
    error::Error,
    images, inspect, options,
    output::{for_each, say},
    ps,
};

/// Names that mean something else.
const RESERVED: [&str; 6] = [
    "bridge",
    "default",
    "host",
    "none",
    "container",
    passt::NAME,
];

/// Bytes that a link can carry at a time: the least of IPv4 and IPv6, the most of virtio-net.
const MTU: std::ops::RangeInclusive<u32> = 1280..=65_535;

/// Runs `network`.
///
/// # Errors
/// Those of its verbs.
pub fn noun(matches: &ArgMatches) -> Result<u8, Error> {
    if caisson_sandbox::user().is_some() {
        return Err(Error::State(
            "networks on bridges need root. Without root each container has a way out of its own, by passt; \
             several share one by --network container:NAME"
                .to_owned(),
        ));
    }
    match matches.subcommand() {
        Some(("create", matches)) => create(matches),
        Some(("ls", matches)) => list(matches),
        Some(("rm", matches)) => remove(matches),
        Some(("inspect", matches)) => inspect(matches),
        Some(("prune", matches)) => prune(matches),
        other => Err(Error::Usage(format!(
            "unknown command \"network {}\"",
            other.map_or("", |(verb, _)| verb)
        ))),
    }
}

/// All networks, the default one among them, and the containers that may have some.
fn open() -> Result<(Containers, Networks), Error> {
    let containers = Containers::open()?;
    let networks = Networks::of(&containers.config);
    {
        let _lock = networks.lock()?;
        networks.ensure_default()?;
    }
    Ok((containers, networks))
}

fn create(matches: &ArgMatches) -> Result<u8, Error> {
    let draft = draft(matches)?;
    let (_, networks) = open()?;
    let _lock = networks.lock()?;
    say!("{}", networks.create(draft)?.id);
    Ok(0)
}

fn draft(matches: &ArgMatches) -> Result<Draft, Error> {
    let name = one(matches, "name").unwrap_or_default();
    options::container_name(name).map_err(|_| {
        Error::Usage(format!(
            "invalid network name ({name}): only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed, two at least"
        ))
    })?;
    if RESERVED.contains(&name) {
        return Err(Error::Usage(format!(
            "a network cannot have the name {name}: `--network {name}` means something else"
        )));
    }
    if let Some(driver) = one(matches, "driver").filter(|driver| *driver != "bridge") {
        return Err(Error::Usage(format!(
            "--driver {driver}: there is \"bridge\""
        )));
    }
    let mut draft = Draft {
        name: name.to_owned(),
        subnets: subnets(
            &values(matches, "subnet"),
            &values(matches, "gateway"),
            &values(matches, "ip-range"),
        )?,
        ipv6: matches.get_flag("ipv6"),
        internal: matches.get_flag("internal"),
        dns: true,
        mtu: None,
        labels: values(matches, "label")
            .into_iter()
            .map(|text| {
                let (key, value) = text.split_once('=').unwrap_or((text, ""));
                (key.to_owned(), value.to_owned())
            })
            .collect(),
    };
    for text in values(matches, "opt") {
        match text.split_once('=') {
            Some(("mtu" | "com.docker.network.driver.mtu", bytes)) => {
                let bytes = bytes.parse().ok().filter(|bytes| MTU.contains(bytes));
                draft.mtu = Some(bytes.ok_or_else(|| {
                    Error::Usage(format!(
                        "-o {text}: not a number of bytes from {} to {}",
                        MTU.start(),
                        MTU.end()
                    ))
                })?);
            }
            _ => {
                return Err(Error::Usage(format!(
                    "-o {text}: unknown option; there is mtu=BYTES"
                )));
            }
        }
    }
    Ok(draft)
}

/// Each gateway and each range goes with the subnet that has it.
fn subnets(nets: &[&str], gateways: &[&str], ranges: &[&str]) -> Result<Vec<Subnet>, Error> {
    let mut subnets: Vec<Subnet> = Vec::new();
    for text in nets {
        let net = network("--subnet", text)?;
        let six = matches!(net, IpNet::V6(_));
        if net.prefix_len() == 0 || net.prefix_len() > if six { 126 } else { 30 } {
            return Err(Error::Usage(format!(
                "--subnet {text}: too large or too small for a network; such as 10.5.0.0/24 or fd00:5::/64"
            )));
        }
        if subnets
            .iter()
            .any(|other| matches!(other.subnet, IpNet::V6(_)) == six)
        {
            return Err(Error::Usage(format!(
                "--subnet {text}: a network has one subnet of IPv4 and one of IPv6 at most"
            )));
        }
        subnets.push(Subnet::of(net));
    }
    for text in gateways {
        let gateway: IpAddr = text
            .parse()
            .map_err(|_| Error::Usage(format!("--gateway {text}: not an IP address")))?;
        let of = subnets
            .iter_mut()
            .find(|subnet| subnet.subnet.contains(&gateway));
        let Some(subnet) = of else {
            return Err(Error::Usage(format!(
                "--gateway {text}: in none of the subnets given by --subnet"
            )));
        };
        // Any other address stands for the subnet's first, which it may take.
        subnet.gateway = subnet.subnet.network();
        if !address::can_have(subnet, gateway) {
            return Err(Error::Usage(format!(
                "--gateway {text}: not an address that a host can have in {}",
                subnet.subnet
            )));
        }
        subnet.gateway = gateway;
    }
    for text in ranges {
        let range = network("--ip-range", text)?;
        let of = subnets
            .iter_mut()
            .find(|subnet| subnet.subnet.contains(&range));
        let Some(subnet) = of else {
            return Err(Error::Usage(format!(
                "--ip-range {text}: in none of the subnets given by --subnet"
            )));
        };
        subnet.range = Some(range);
    }
    Ok(subnets)
}

/// A network's address without bits of a host.
fn network(flag: &str, text: &str) -> Result<IpNet, Error> {
    let wrong = |why: String| Error::Usage(format!("{flag} {text}: {why}"));
    let net: IpNet = text
        .parse()
        .map_err(|_| wrong("not a network, such as 10.5.0.0/24".to_owned()))?;
    if net != net.trunc() {
        return Err(wrong(format!("has bits of a host: try {}", net.trunc())));
    }
    Ok(net)
}

fn list(matches: &ArgMatches) -> Result<u8, Error> {
    let format = Format::of(matches)?;
    let (_, networks) = open()?;
    let mut rows = vec![["NETWORK ID", "NAME", "DRIVER", "SUBNETS"].map(str::to_owned)];
    let whole = matches.get_flag("no-trunc");
    for network in networks.all()? {
        let id = if whole {
            network.id.clone()
        } else {
            network.id.get(..12).unwrap_or(&network.id).to_owned()
        };
        let subnets: Vec<String> = network
            .subnets
            .iter()
            .map(|subnet| subnet.subnet.to_string())
            .collect();
        if matches.get_flag("quiet") {
            say!("{id}");
        } else if format == Format::Json {
            let labels: Vec<String> = network
                .labels
                .iter()
                .map(|(key, value)| format!("{key}={value}"))
                .collect();
            say!(
                "{}",
                json!({
                    "ID": id,
                    "Name": network.name,
                    "Driver": "bridge",
                    "Scope": "local",
                    "IPv6": network.has_v6().to_string(),
                    "Internal": network.internal.to_string(),
                    "Labels": labels.join(","),
                    "CreatedAt": humantime::format_rfc3339_seconds(network.created).to_string(),
                })
            );
        } else {
            rows.push([id, network.name, "bridge".to_owned(), subnets.join(", ")]);
        }
    }
    if !matches.get_flag("quiet") && format == Format::Table {
        ps::print_table(&rows);
    }
    Ok(0)
}

fn inspect(matches: &ArgMatches) -> Result<u8, Error> {
    Format::of(matches)?;
    let (_, networks) = open()?;
    let attached = Attachment::all(&networks)?;
    Ok(inspect::print(values(matches, "network"), |name| {
        Ok(describe(&networks.get(name)?, &attached))
    }))
}

fn describe(network: &Network, attached: &[Attachment]) -> Value {
    let configs: Vec<Value> = network
        .subnets
        .iter()
        .map(|subnet| {
            let mut config = json!({ "Subnet": subnet.subnet, "Gateway": subnet.gateway });
            if let Some(range) = subnet.range {
                config["IPRange"] = json!(range);
            }
            config
        })
        .collect();
    let mut containers = Map::new();
    for record in attached {
        let endpoints = record.endpoints.iter();
        for endpoint in endpoints.filter(|endpoint| endpoint.network_id == network.id) {
            let of = |six: bool| {
                let mut addresses = endpoint.addresses.iter();
                let found = addresses.find(|net| matches!(net, IpNet::V6(_)) == six);
                found.map(IpNet::to_string).unwrap_or_default()
            };
            containers.insert(
                record.container.clone(),
                json!({
                    "Name": record.name,
                    "MacAddress": endpoint.mac,
                    "IPv4Address": of(false),
                    "IPv6Address": of(true),
                }),
            );
        }
    }
    let mut driver_options = BTreeMap::new();
    driver_options.insert("com.docker.network.bridge.name", network.bridge.clone());
    if let Some(mtu) = network.mtu {
        driver_options.insert("com.docker.network.driver.mtu", mtu.to_string());
    }
    json!({
        "Name": network.name,
        "Id": network.id,
        "Created": humantime::format_rfc3339_nanos(network.created).to_string(),
        "Scope": "local",
        "Driver": "bridge",
        "EnableIPv4": network.has_v4(),
        "EnableIPv6": network.has_v6(),
        "IPAM": { "Driver": "default", "Config": configs },
        "Internal": network.internal,
        "Containers": containers,
        "Options": driver_options,
        "Labels": network.labels,
    })
}

/// Names of containers that have, or are about to have, an interface in a network.
fn users(network: &Network, attached: &[Attachment], containers: &[Container]) -> Vec<String> {
    let asks = |container: &&Container| {
        let Mode::Networks(names) = &container.request.network.mode else {
            return false;
        };
        let named = |name: &String| *name == network.name || network.id.starts_with(name.as_str());
        container.is_active() && names.iter().any(named)
    };
    let has = |record: &&Attachment| {
        let mut endpoints = record.endpoints.iter();
        endpoints.any(|endpoint| endpoint.network_id == network.id)
    };
    let mut names: Vec<String> = containers
        .iter()
        .filter(asks)
        .map(|container| container.name.clone())
        .chain(
            attached
                .iter()
                .filter(has)
                .map(|record| record.name.clone()),
        )
        .collect();
    names.sort();
    names.dedup();
    names
}

fn remove(matches: &ArgMatches) -> Result<u8, Error> {
    let (containers, networks) = open()?;
    // Before the lock: those that have died let go of their networks.
    let all = containers.all()?;
    attachment::forget_strangers(&containers, &networks)?;
    let _lock = networks.lock()?;
    let attached = Attachment::all(&networks)?;
    let one = |name: &str| {
        let network = networks.get(name)?;
        if network.is_default() {
            return Err(Error::State(format!(
                "network {name} is the default one, and stays"
            )));
        }
        match users(&network, &attached, &all).as_slice() {
            [] => networks.remove(&network),
            users => Err(Error::State(format!(
                "network {name} is in use by {}: stop the container first",
                users.join(", ")
            ))),
        }
    };
    let force = matches.get_flag("force");
    Ok(for_each(values(matches, "network"), |name| {
        match one(name) {
            // As docker: -f is content when there is nothing.
            Err(Error::NoSuchNetwork(_)) if force => Ok(()),
            result => result.map(|()| say!("{name}")),
        }
    }))
}

fn prune(matches: &ArgMatches) -> Result<u8, Error> {
    if !matches.get_flag("force")
        && !images::confirm("all networks not used by at least one container")?
    {
        return Ok(0);
    }
    let (containers, networks) = open()?;
    let all = containers.all()?;
    attachment::forget_strangers(&containers, &networks)?;
    let _lock = networks.lock()?;
    let attached = Attachment::all(&networks)?;
    let mut deleted = Vec::new();
    for network in networks.all()? {
        if !network.is_default() && users(&network, &attached, &all).is_empty() {
            networks.remove(&network)?;
            deleted.push(network.name);
        }
    }
    if !deleted.is_empty() {
        say!("Deleted Networks:\n{}", deleted.join("\n"));
    }
    Ok(0)
}

/// Runs `port`.
///
/// # Errors
/// No such container, a port that it does not publish.
pub fn port(matches: &ArgMatches) -> Result<u8, Error> {
    let containers = Containers::open()?;
    let container = containers.find(one(matches, "container").unwrap_or_default())?;
    let published = published(&containers.config, &container.id);
    let Some(wanted) = one(matches, "port") else {
        for (inner, outer) in published {
            say!("{inner} -> {outer}");
        }
        return Ok(0);
    };
    let exposed = ports::exposed([wanted])
        .ok()
        .filter(|exposed| exposed.len() == 1)
        .and_then(|exposed| exposed.first().copied())
        .ok_or_else(|| Error::Usage(format!("{wanted}: not a port, such as 80 or 53/udp")))?;
    let inner = format!("{}/{}", exposed.0, exposed.1);
    let found: Vec<_> = published
        .iter()
        .filter(|(name, _)| *name == inner)
        .collect();
    if found.is_empty() {
        return Err(Error::State(format!(
            "container {} has not published port {inner}",
            container.name
        )));
    }
    for (_, outer) in found {
        say!("{outer}");
    }
    Ok(0)
}

/// "80/tcp" and "0.0.0.0:8080", in order.
fn published(config: &Config, id: &str) -> Vec<(String, String)> {
    let Some(record) = Attachment::read(config, id) else {
        return Vec::new();
    };
    let (v4, v6) = record.families();
    let mut ports = record.ports.clone();
    ports.sort_by_key(|port| (port.container_port, port.protocol));
    ports
        .iter()
        .flat_map(|port| {
            let outer = port.outer(v4, v6).into_iter();
            outer.map(|address| (port.inner(), address.to_string()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn given(words: &[&str]) -> Result<Draft, Error> {
        let words = ["caisson", "network", "create"].iter().chain(words);
        let matches = crate::arguments::command()
            .try_get_matches_from(words)
            .unwrap();
        let (_, matches) = matches.subcommand().unwrap();
        draft(matches.subcommand().unwrap().1)
    }

    #[test]
    fn networks_are_described() {
        let draft = given(&[
            "--subnet",
            "10.5.0.0/16",
            "--ip-range",
            "10.5.9.0/24",
            "--gateway",
            "10.5.0.254",
            "--subnet",
            "fd00:5::/64",
            "--label",
            "a=b",
            "-o",
            "mtu=1400",
            "--internal",
            "net1",
        ])
        .unwrap();
        assert_eq!(draft.subnets.len(), 2);
        assert_eq!(draft.subnets[0].gateway.to_string(), "10.5.0.254");
        assert_eq!(draft.subnets[0].range.unwrap().to_string(), "10.5.9.0/24");
        assert_eq!(draft.subnets[1].gateway.to_string(), "fd00:5::1");
        assert_eq!((draft.mtu, draft.internal), (Some(1400), true));
        assert_eq!(draft.labels["a"], "b");
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (words, word) in [
            (&["host"][..], "means something else"),
            (&["../x"], "invalid network name"),
            (&["--driver", "overlay", "net1"], "overlay"),
            (&["--subnet", "10.5.0.0", "net1"], "not a network"),
            (&["--subnet", "10.5.0.1/24", "net1"], "10.5.0.0/24"),
            (&["--subnet", "10.5.0.0/31", "net1"], "too small"),
            (&["--subnet", "0.0.0.0/0", "net1"], "too large"),
            (
                &["--subnet", "10.5.0.0/24", "--subnet", "10.6.0.0/24", "net1"],
                "one subnet",
            ),
            (&["--gateway", "10.5.0.1", "net1"], "none of the subnets"),
            (
                &["--subnet", "10.5.0.0/24", "--gateway", "10.5.0.255", "net1"],
                "can have",
            ),
            (
                &[
                    "--subnet",
                    "10.5.0.0/24",
                    "--ip-range",
                    "10.6.0.0/25",
                    "net1",
                ],
                "none of the subnets",
            ),
            (&["-o", "mtu=9", "net1"], "1280"),
            (&["-o", "color=red", "net1"], "unknown option"),
        ] {
            let error = given(words).unwrap_err().to_string();
            assert!(error.contains(word), "{words:?}: {error}");
        }
    }
}
