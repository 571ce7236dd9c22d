//! What a container's flags ask of the network.

use std::net::IpAddr;

use caisson_sandbox::user;
use clap::ArgMatches;
use serde::{Deserialize, Serialize};

use super::{
    passt,
    ports::{self, Port},
    store::{DEFAULT, Network},
};
use crate::{
    arguments::{one, values},
    error::Error,
    options,
};

/// `--network`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The loopback interface only.
    #[default]
    None,
    /// What a user without root can have: [`super::passt`].
    User,
    /// An interface in each of these networks, the first of which leads out.
    Networks(Vec<String>),
    /// The microVM of another container: the name given, then that container's id.
    Container(String),
}

/// All that flags say about the network.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// --network.
    pub mode: Mode,
    /// --network-alias: names in the networks beside the container's own.
    pub aliases: Vec<String>,
    /// --ip, --ip6.
    pub addresses: Vec<IpAddr>,
    /// --mac-address.
    pub mac: Option<String>,
    /// -p, and what -P adds; as asked for.
    pub ports: Vec<Port>,
    /// --dns.
    pub dns: Vec<IpAddr>,
    /// --dns-search.
    pub dns_searches: Vec<String>,
    /// --dns-option.
    pub dns_options: Vec<String>,
    /// --add-host: a name, and an address or "host-gateway".
    pub hosts: Vec<(String, String)>,
}

/// Flags that mean nothing without a network of the container's own.
const OF_NETWORKS: [&str; 9] = [
    "network-alias",
    "ip",
    "ip6",
    "mac-address",
    "publish",
    "expose",
    "dns",
    "dns-search",
    "dns-option",
];

impl Wanted {
    /// What the flags of `run` say; the container of `--network container:…` is not looked up.
    ///
    /// # Errors
    /// They make no sense, or not together.
    pub fn of(matches: &ArgMatches) -> Result<Self, Error> {
        Self::of_caller(matches, user().is_none())
    }

    fn of_caller(matches: &ArgMatches, root: bool) -> Result<Self, Error> {
        let mode = mode(&values(matches, "network"), root)?;
        let mut wanted = Self {
            aliases: values(matches, "network-alias")
                .into_iter()
                .map(|name| options::hostname(name).map(|()| name.to_owned()))
                .collect::<Result<_, _>>()
                .map_err(|_: Error| {
                    Error::Usage("--network-alias: not a name of a host".to_owned())
                })?,
            addresses: addresses(matches)?,
            mac: one(matches, "mac-address").map(check_mac).transpose()?,
            dns: values(matches, "dns")
                .into_iter()
                .map(|text| address("--dns", text))
                .collect::<Result<_, _>>()?,
            dns_searches: words(matches, "dns-search")?,
            dns_options: words(matches, "dns-option")?,
            hosts: values(matches, "add-host")
                .into_iter()
                .map(host)
                .collect::<Result<_, _>>()?,
            mode,
            ..Self::default()
        };
        for text in values(matches, "publish") {
            wanted.ports.extend(ports::publish(text)?);
        }
        ports::check_number(&wanted.ports)?;
        wanted.check(matches)?;
        Ok(wanted)
    }

    fn check(&self, matches: &ArgMatches) -> Result<(), Error> {
        let given = |flag: &&str| !values(matches, flag).is_empty();
        let conflict = |flag: &str, with: &str| {
            Err(Error::Usage(format!(
                "--{flag} does not go with --network {with}"
            )))
        };
        let (networks, with) = match &self.mode {
            Mode::Networks(networks) => (networks, ""),
            Mode::User if given(&"network-alias") => {
                return conflict("network-alias", passt::NAME);
            }
            Mode::User => (&vec![passt::NAME.to_owned()], ""),
            // Docker lets -p be, and publishes nothing; who asks for a port wants to reach it.
            Mode::None => (&Vec::new(), "none"),
            Mode::Container(_) => (&Vec::new(), "container:…"),
        };
        if networks.is_empty() {
            if let Some(flag) = OF_NETWORKS.iter().find(|flag| given(flag)) {
                return conflict(flag, with);
            }
            if matches.get_flag("publish-all") {
                return conflict("publish-all", with);
            }
        }
        if matches!(self.mode, Mode::Container(_)) {
            // They are the other container's.
            for flag in ["hostname", "add-host"] {
                if given(&flag) {
                    return conflict(flag, with);
                }
            }
        }
        if networks.len() > 1
            && let Some(flag) = ["ip", "ip6", "mac-address"].iter().find(|flag| given(flag))
        {
            return Err(Error::Usage(format!(
                "--{flag} needs one --network: it would be the same in each"
            )));
        }
        Ok(())
    }
}

fn mode(given: &[&str], root: bool) -> Result<Mode, Error> {
    let alone = |what: &str| {
        if given.len() > 1 {
            return Err(Error::Usage(format!(
                "--network {what} does not go with another --network"
            )));
        }
        Ok(())
    };
    let mut networks: Vec<String> = Vec::new();
    for text in given {
        match *text {
            "none" => {
                alone("none")?;
                return Ok(Mode::None);
            }
            passt::NAME if root => {
                return Err(Error::Usage(
                    "--network passt is for users without root; root has --network bridge"
                        .to_owned(),
                ));
            }
            passt::NAME => {
                alone(passt::NAME)?;
                return Ok(Mode::User);
            }
            "host" => {
                return Err(Error::Usage(
                    "--network host: a microVM has a network stack of its own and cannot use the host's; \
                     publish ports by -p, or reach the host at the network's gateway"
                        .to_owned(),
                ));
            }
            text => {
                if let Some(name) = text.strip_prefix("container:") {
                    alone(text)?;
                    if name.is_empty() {
                        return Err(Error::Usage(format!(
                            "--network {text}: the container's name is missing"
                        )));
                    }
                    return Ok(Mode::Container(name.to_owned()));
                }
                if !root {
                    return Err(Error::Usage(format!(
                        "--network {text}: bridges, and networks on them, need root. Without root there are \
                         passt (the default: a way out, and published ports), none, and container:NAME; \
                         or run this as root"
                    )));
                }
                let name = match text {
                    "bridge" | "default" => DEFAULT,
                    name => name,
                };
                options::container_name(name)
                    .map_err(|_| Error::Usage(format!("--network {text}: not a network's name")))?;
                if networks.iter().any(|other| other == name) {
                    return Err(Error::Usage(format!("--network {text} is given twice")));
                }
                networks.push(name.to_owned());
            }
        }
    }
    if networks.is_empty() && !root {
        return Ok(Mode::User);
    }
    if networks.is_empty() {
        networks.push(DEFAULT.to_owned());
    }
    Ok(Mode::Networks(networks))
}

fn address(flag: &str, text: &str) -> Result<IpAddr, Error> {
    text.parse()
        .map_err(|_| Error::Usage(format!("{flag} {text}: not an IP address")))
}

fn addresses(matches: &ArgMatches) -> Result<Vec<IpAddr>, Error> {
    let mut all = Vec::new();
    for (flag, six) in [("ip", false), ("ip6", true)] {
        if let Some(text) = one(matches, flag) {
            let address = address(&format!("--{flag}"), text)?;
            if address.is_ipv6() != six {
                return Err(Error::Usage(format!(
                    "--{flag} {text}: an address of the other family; there are --ip and --ip6"
                )));
            }
            all.push(address);
        }
    }
    Ok(all)
}

/// Words that go into a line of resolv.conf.
fn words(matches: &ArgMatches, flag: &str) -> Result<Vec<String>, Error> {
    values(matches, flag)
        .into_iter()
        .map(|text| {
            if text.is_empty() || text.contains(|c: char| c.is_whitespace() || c.is_control()) {
                return Err(Error::Usage(format!("--{flag} {text:?}: not one word")));
            }
            Ok(text.to_owned())
        })
        .collect()
}

/// "NAME:ADDRESS".
fn host(text: &str) -> Result<(String, String), Error> {
    let wrong = || {
        Error::Usage(format!(
            "--add-host {text}: expected NAME:ADDRESS, or NAME:host-gateway"
        ))
    };
    let (name, place) = text.split_once([':', '=']).ok_or_else(wrong)?;
    options::hostname(name).map_err(|_| wrong())?;
    let plain = place
        .strip_prefix('[')
        .and_then(|place| place.strip_suffix(']'))
        .unwrap_or(place);
    if plain != "host-gateway" && plain.parse::<IpAddr>().is_err() {
        return Err(wrong());
    }
    Ok((name.to_owned(), plain.to_owned()))
}

/// Lines of /etc/hosts.
///
/// # Errors
/// The gateway of a container without a network.
pub fn host_lines(wanted: &Wanted, networks: &[Network]) -> Result<Vec<String>, Error> {
    let gateway = match networks.first() {
        // Its gateway is passt, which stands for nobody.
        Some(network) if network.is_passt() => passt::host_address(),
        network => network
            .and_then(|network| network.subnets.first())
            .map(|subnet| subnet.gateway),
    };
    wanted
        .hosts
        .iter()
        .map(|(name, place)| {
            let address = if place == "host-gateway" {
                let gateway = gateway.ok_or_else(|| {
                    Error::Usage(format!(
                        "--add-host {name}:{place}: there is no gateway without a network"
                    ))
                })?;
                gateway.to_string()
            } else {
                place.clone()
            };
            Ok(format!("{address}\t{name}"))
        })
        .collect()
}

/// A hardware address of one machine, in lower case.
///
/// # Errors
/// Something else.
pub fn check_mac(text: &str) -> Result<String, Error> {
    let bytes: Option<Vec<u8>> = text
        .split([':', '-'])
        .map(|byte| (byte.len() == 2).then(|| u8::from_str_radix(byte, 16).ok())?)
        .collect();
    match bytes.as_deref() {
        // The lowest bit of the first byte is a group's; all zeros is nobody's.
        Some(bytes @ [first, _, _, _, _, _]) if first & 1 == 0 && bytes.iter().any(|b| *b != 0) => {
            Ok(bytes
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect::<Vec<_>>()
                .join(":"))
        }
        _ => Err(Error::Usage(format!(
            "--mac-address {text}: not a hardware address of one machine, such as 02:00:00:00:00:01"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(flags: &[&str]) -> Result<Wanted, Error> {
        by(flags, true)
    }

    fn by(flags: &[&str], root: bool) -> Result<Wanted, Error> {
        let words = ["caisson", "run"].iter().chain(flags).chain(&["image"]);
        let matches = crate::arguments::command()
            .try_get_matches_from(words)
            .unwrap();
        Wanted::of_caller(matches.subcommand().unwrap().1, root)
    }

    #[test]
    fn without_root_there_is_passt() {
        for flags in [&[][..], &["--network", "passt", "-p", "8080:80"]] {
            assert_eq!(by(flags, false).unwrap().mode, Mode::User);
        }
        assert_eq!(by(&["--net", "none"], false).unwrap().mode, Mode::None);
        for (flags, word) in [
            (&["--network", "bridge"][..], "need root"),
            (&["--network", "mine"], "need root"),
            (&["--network", "passt", "--network", "none"], "another"),
            (&["--network-alias", "x"], "does not go with"),
            (&["--network", "host"], "network stack of its own"),
        ] {
            let error = by(flags, false).unwrap_err().to_string();
            assert!(error.contains(word), "{flags:?}: {error}");
        }
        let error = wanted(&["--network", "passt"]).unwrap_err().to_string();
        assert!(error.contains("without root"), "{error}");
    }

    #[test]
    fn networks_are_chosen() {
        let default = Mode::Networks(vec![DEFAULT.to_owned()]);
        assert_eq!(wanted(&[]).unwrap().mode, default);
        assert_eq!(wanted(&["--network", "bridge"]).unwrap().mode, default);
        assert_eq!(wanted(&["--net", "none"]).unwrap().mode, Mode::None);
        assert_eq!(
            wanted(&["--network", "container:x"]).unwrap().mode,
            Mode::Container("x".to_owned())
        );
        let two = wanted(&["--network", "one", "--network", "two"]).unwrap();
        assert_eq!(
            two.mode,
            Mode::Networks(vec!["one".to_owned(), "two".to_owned()])
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (flags, word) in [
            (&["--network", "host"][..], "network stack of its own"),
            (&["--network", "none", "--network", "one"], "another"),
            (&["--network", "one", "--network", "one"], "twice"),
            (&["--network", "container:"], "missing"),
            (&["--network", "../x"], "not a network's name"),
            (&["--network", "none", "-p", "80"], "--publish"),
            (&["--network", "none", "-P"], "--publish-all"),
            (&["--network", "container:x", "--dns", "1.1.1.1"], "--dns"),
            (&["--network", "container:x", "-h", "box"], "--hostname"),
            (
                &["--network", "a1", "--network", "b1", "--ip", "10.0.0.9"],
                "needs one",
            ),
            (&["--ip", "::1"], "other family"),
            (&["--ip", "x"], "not an IP address"),
            (&["--dns", "x"], "not an IP address"),
            (&["--dns-search", "a b"], "not one word"),
            (&["--network-alias", "-x-"], "not a name"),
            (&["--add-host", "x"], "NAME:ADDRESS"),
            (&["--add-host", "x:y"], "NAME:ADDRESS"),
            (&["--mac-address", "01:00:00:00:00:00"], "not a hardware"),
            (&["--mac-address", "02:00"], "not a hardware"),
            (&["-p", "80:"], "not a port"),
        ] {
            let error = wanted(flags).unwrap_err().to_string();
            assert!(error.contains(word), "{flags:?}: {error}");
        }
    }

    #[test]
    fn hosts_get_lines() {
        let wanted = wanted(&["--add-host", "a:10.0.0.1", "--add-host", "b=[::1]"]).unwrap();
        assert_eq!(host_lines(&wanted, &[]).unwrap(), ["10.0.0.1\ta", "::1\tb"]);
        let gateway = self::wanted(&["--add-host", "a:host-gateway"]).unwrap();
        assert!(host_lines(&gateway, &[]).is_err());
        assert_eq!(check_mac("02-00-00-00-00-AB").unwrap(), "02:00:00:00:00:ab");
    }
}
