//! What networks there are: `<state_dir>/networks/<name>.json`.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Read},
    net::IpAddr,
    path::{Path, PathBuf},
    time::SystemTime,
};

use caisson_sandbox::Config;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::address;
use crate::{container::Containers, document, error::Error, lock::Lock};

/// The network of containers that ask for none.
pub const DEFAULT: &str = "caisson";

/// Bits of the default network's prefix, and of others that nobody has given a subnet.
const PREFIX_OF_DEFAULT: u8 = 16;
const PREFIX: u8 = 24;

/// A network. It does not change once it is made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// Unique.
    pub name: String,
    /// 64 hexadecimal digits.
    pub id: String,
    /// When it was made.
    pub created: SystemTime,
    /// Interface of the host.
    pub bridge: String,
    /// One of IPv4, or one of IPv6, or both.
    pub subnets: Vec<Subnet>,
    /// Nothing leads out of it.
    pub internal: bool,
    /// Containers find each other by name.
    pub dns: bool,
    /// Bytes; `None` = the kernel's 1500.
    pub mtu: Option<u32>,
    /// The user's.
    pub labels: BTreeMap<String, String>,
}

/// A network's addresses of one family.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnet {
    /// All of them.
    pub subnet: IpNet,
    /// The host's own.
    pub gateway: IpAddr,
    /// Those that are given out by themselves; `None` = all.
    pub range: Option<IpNet>,
}

impl Network {
    /// It is the one that is always there.
    pub fn is_default(&self) -> bool {
        self.name == DEFAULT
    }

    /// It has addresses of IPv6.
    pub fn has_v6(&self) -> bool {
        self.subnets
            .iter()
            .any(|subnet| matches!(subnet.subnet, IpNet::V6(_)))
    }

    /// It has addresses of IPv4.
    pub fn has_v4(&self) -> bool {
        self.subnets
            .iter()
            .any(|subnet| matches!(subnet.subnet, IpNet::V4(_)))
    }
}

/// What `network create` asks for.
#[derive(Debug, Clone, Default)]
pub struct Draft {
    /// Of the network.
    pub name: String,
    /// Those given; one of IPv4 is found if there is none.
    pub subnets: Vec<Subnet>,
    /// One of IPv6 is found if none is given.
    pub ipv6: bool,
    /// See [`Network`].
    pub internal: bool,
    /// See [`Network`].
    pub dns: bool,
    /// See [`Network`].
    pub mtu: Option<u32>,
    /// See [`Network`].
    pub labels: BTreeMap<String, String>,
}

/// All networks of this host.
pub struct Networks {
    directory: PathBuf,
}

impl Networks {
    /// Those of a configuration.
    pub fn of(config: &Config) -> Self {
        Self {
            directory: config.state_dir.join("networks"),
        }
    }

    /// Keeps others from changing networks and what is attached to them.
    ///
    /// # Errors
    /// The lock cannot be taken.
    pub fn lock(&self) -> Result<Lock, Error> {
        let attached = self.attached();
        fs::create_dir_all(&attached).map_err(Error::file("create", &attached))?;
        Lock::take(&self.directory)
    }

    /// Directory of the records of running containers.
    pub fn attached(&self) -> PathBuf {
        self.directory.join("attached")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}.json"))
    }

    /// Every network, by name, the default one first.
    ///
    /// # Errors
    /// The directory or a file of it cannot be read.
    pub fn all(&self) -> Result<Vec<Network>, Error> {
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(Error::file("list", &self.directory))?,
        };
        let mut all = Vec::new();
        for entry in entries.flatten() {
            let path = entry.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "json")
            {
                all.push(read(&path)?);
            }
        }
        all.sort_by_key(|network: &Network| (!network.is_default(), network.name.clone()));
        Ok(all)
    }

    /// The network of that name, id, or beginning of an id.
    ///
    /// # Errors
    /// None, or several.
    pub fn get(&self, name: &str) -> Result<Network, Error> {
        let name = resolve(name);
        let all = self.all()?;
        if let Some(network) = all.iter().find(|network| network.name == name) {
            return Ok(network.clone());
        }
        let mut found = all
            .into_iter()
            .filter(|network| !name.is_empty() && network.id.starts_with(name));
        match (found.next(), found.next()) {
            (Some(network), None) => Ok(network),
            (Some(_), Some(_)) => Err(Error::State(format!(
                "network id {name} is ambiguous: give more of it"
            ))),
            (None, _) => Err(Error::NoSuchNetwork(name.to_owned())),
        }
    }

    /// Makes the default network if it is not there yet. The caller holds the lock.
    ///
    /// # Errors
    /// No private network is free, no space.
    pub fn ensure_default(&self) -> Result<(), Error> {
        if self.path(DEFAULT).exists() {
            return Ok(());
        }
        self.create(Draft {
            name: DEFAULT.to_owned(),
            ..Draft::default()
        })
        .map(drop)
    }

    /// Makes a network. The caller holds the lock.
    ///
    /// # Errors
    /// Its name or its subnet is taken; no private network is free; no space.
    pub fn create(&self, draft: Draft) -> Result<Network, Error> {
        let others = self.all()?;
        if others.iter().any(|network| network.name == draft.name) {
            return Err(Error::State(format!(
                "network {} exists already",
                draft.name
            )));
        }
        let subnets = subnets(&draft, &others, &address::of_host())?;
        let network = Network {
            id: Containers::new_id()?,
            created: SystemTime::now(),
            bridge: free_bridge(&others),
            subnets,
            internal: draft.internal,
            dns: draft.dns,
            mtu: draft.mtu,
            labels: draft.labels,
            name: draft.name,
        };
        document::write(&self.path(&network.name), &network)?;
        Ok(network)
    }

    /// Removes a network that nobody is attached to. The caller holds the lock.
    ///
    /// # Errors
    /// Its file cannot be removed.
    pub fn remove(&self, network: &Network) -> Result<(), Error> {
        let path = self.path(&network.name);
        fs::remove_file(&path).map_err(Error::file("remove", path))
    }
}

/// Docker's names for the default network are ours, too.
fn resolve(name: &str) -> &str {
    if matches!(name, "bridge" | "default") {
        DEFAULT
    } else {
        name
    }
}

fn read(path: &Path) -> Result<Network, Error> {
    let text = fs::read(path).map_err(Error::file("read", path))?;
    serde_json::from_slice(&text).map_err(|error| Error::File {
        what: "read",
        path: path.to_owned(),
        source: io::Error::other(error),
    })
}

/// The subnets given, none of which may be taken, and those that are to be found.
fn subnets(draft: &Draft, others: &[Network], host: &[IpNet]) -> Result<Vec<Subnet>, Error> {
    let mut subnets = draft.subnets.clone();
    let of_others = || {
        others
            .iter()
            .flat_map(|network| network.subnets.iter().map(move |subnet| (network, subnet)))
    };
    for subnet in &subnets {
        let wanted = &subnet.subnet;
        let other = of_others().find(|(_, other)| address::overlap(wanted, &other.subnet));
        if let Some((network, other)) = other {
            return Err(Error::State(format!(
                "the subnet {wanted} overlaps {} of network {}",
                other.subnet, network.name
            )));
        }
        if let Some(route) = host.iter().find(|route| address::overlap(wanted, route)) {
            return Err(Error::State(format!(
                "the subnet {wanted} overlaps {route}, which this host has a route to"
            )));
        }
    }
    let taken: Vec<IpNet> = of_others()
        .map(|(_, subnet)| subnet.subnet)
        .chain(host.iter().copied())
        .collect();
    let has = |subnets: &[Subnet], six: bool| {
        let mut all = subnets.iter();
        all.any(|subnet| matches!(subnet.subnet, IpNet::V6(_)) == six)
    };
    // One of IPv6 alone makes a network without IPv4, unless --ipv6 asks for it besides.
    if !has(&subnets, false) && (subnets.is_empty() || draft.ipv6) {
        let prefix = if draft.name == DEFAULT {
            PREFIX_OF_DEFAULT
        } else {
            PREFIX
        };
        subnets.insert(0, Subnet::of(address::free_v4(prefix, &taken)?));
    }
    if draft.ipv6 && !has(&subnets, true) {
        subnets.push(Subnet::of(address::free_v6(&taken, random)?));
    }
    Ok(subnets)
}

impl Subnet {
    /// With the first address for the host, as everybody expects it.
    pub fn of(subnet: IpNet) -> Self {
        let gateway = match subnet.network() {
            IpAddr::V4(first) if subnet.prefix_len() < 31 => {
                IpAddr::V4(u32::from(first).wrapping_add(1).into())
            }
            IpAddr::V6(first) => IpAddr::V6(u128::from(first).wrapping_add(1).into()),
            first => first,
        };
        Self {
            subnet,
            gateway,
            range: None,
        }
    }
}

fn random() -> Result<u64, Error> {
    let mut bytes = [0; 8];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(Error::io("read /dev/urandom"))?;
    Ok(u64::from_ne_bytes(bytes))
}

/// "caisson0", or the next number that no network and no interface of the host has.
fn free_bridge(others: &[Network]) -> String {
    (0..u32::MAX)
        .map(|number| format!("caisson{number}"))
        .find(|name| {
            !others.iter().any(|network| network.bridge == *name)
                && !Path::new("/sys/class/net").join(name).exists()
        })
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn networks(directory: &Path) -> Networks {
        Networks {
            directory: directory.join("networks"),
        }
    }

    fn draft(name: &str, subnet: Option<&str>) -> Draft {
        Draft {
            name: name.to_owned(),
            subnets: subnet
                .map(|subnet| Subnet::of(subnet.parse().unwrap()))
                .into_iter()
                .collect(),
            ..Draft::default()
        }
    }

    #[test]
    fn networks_come_and_go_and_keep_apart() {
        let directory = tempfile::tempdir().unwrap();
        let networks = networks(directory.path());
        assert!(networks.all().unwrap().is_empty());
        let _lock = networks.lock().unwrap();
        networks.ensure_default().unwrap();
        networks.ensure_default().unwrap();
        let default = networks.get("bridge").unwrap();
        assert!(default.is_default() && default.bridge.starts_with("caisson"));
        let one = networks.create(draft("one", None)).unwrap();
        assert_ne!(one.bridge, default.bridge);
        assert!(!address::overlap(
            &one.subnets[0].subnet,
            &default.subnets[0].subnet
        ));
        assert_eq!(networks.get(&one.id[..12]).unwrap(), one);
        let taken = one.subnets[0].subnet.to_string();
        for (wrong, word) in [
            (draft("one", None), "exists"),
            (draft("two", Some(&taken)), "overlaps"),
            (draft("two", Some("127.0.0.0/8")), ""),
        ] {
            let error = networks.create(wrong).err().map(|error| error.to_string());
            assert!(error.is_none_or(|error| error.contains(word)));
        }
        networks.remove(&one).unwrap();
        assert!(matches!(networks.get("one"), Err(Error::NoSuchNetwork(_))));
        assert!(matches!(networks.get(""), Err(Error::NoSuchNetwork(_))));
        assert_eq!(networks.all().unwrap()[0], default);
    }

    #[test]
    fn subnets_are_found_for_both_families() {
        let host = ["10.208.0.0/24".parse().unwrap()];
        let of = |draft: &Draft| subnets(draft, &[], &host);
        let found = of(&Draft {
            ipv6: true,
            ..draft("x", None)
        })
        .unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].subnet.to_string(), "10.208.1.0/24");
        assert_eq!(found[0].gateway.to_string(), "10.208.1.1");
        assert!(found[1].subnet.to_string().starts_with("fd"));
        // One of IPv6 alone is a network without IPv4.
        let six = of(&draft("x", Some("fd00:1::/64"))).unwrap();
        assert_eq!(six.len(), 1);
        let both = of(&Draft {
            ipv6: true,
            ..draft("x", Some("fd00:1::/64"))
        })
        .unwrap();
        assert_eq!(both.len(), 2);
        assert_eq!(both[1].gateway.to_string(), "fd00:1::1");
        let error = of(&draft("x", Some("10.208.0.0/16"))).unwrap_err();
        assert!(error.to_string().contains("10.208.0.0/24"), "{error}");
    }
}
