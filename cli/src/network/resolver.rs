//! What is in a container's resolv.conf.

use std::{fs, net::IpAddr};

use super::{
    store::Network,
    wanted::{Mode, Wanted},
};

/// Lines of resolv.conf(5).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resolver {
    /// Name servers.
    pub servers: Vec<IpAddr>,
    /// Domains that are searched.
    pub searches: Vec<String>,
    /// Options.
    pub options: Vec<String>,
}

impl Resolver {
    /// Reads resolv.conf(5).
    fn parse(text: &str) -> Self {
        let mut resolver = Self::default();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                // A scope (fe80::1%eth0) means an interface of the host.
                Some("nameserver") => {
                    resolver
                        .servers
                        .extend(words.next().and_then(|word| word.parse::<IpAddr>().ok()));
                }
                // The last one counts.
                Some("search" | "domain") => {
                    resolver.searches = words.map(str::to_owned).collect();
                }
                Some("options") => resolver.options.extend(words.map(str::to_owned)),
                _ => {}
            }
        }
        resolver
    }

    /// The host's. Name servers on its loopback, which a container cannot reach, are left out, and
    /// those that systemd-resolved asks take their place.
    fn of_host() -> Self {
        let mut resolver = Self::parse(&read("/etc/resolv.conf"));
        let local = |server: &IpAddr| server.is_loopback();
        if !resolver.servers.is_empty() && resolver.servers.iter().all(local) {
            resolver.servers = Self::parse(&read("/run/systemd/resolve/resolv.conf")).servers;
        }
        resolver.servers.retain(|server| !local(server));
        resolver
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Whether netavark has a name server on the network: where containers have names, and on the
/// default network of a host whose own name server is on its loopback alone. On such a host passt
/// passes questions on, too.
pub fn serves_names(network: &Network) -> bool {
    network.dns
        || ((network.is_default() || network.is_passt()) && {
            let has_any = !Resolver::parse(&read("/etc/resolv.conf"))
                .servers
                .is_empty();
            has_any && Resolver::of_host().servers.is_empty()
        })
}

/// What a container of these networks is given. Where names are served the server asks those of
/// `--dns` itself.
pub fn of_container(wanted: &Wanted, networks: &[Network]) -> Resolver {
    if wanted.mode == Mode::None {
        return Resolver::default();
    }
    let host = Resolver::of_host();
    let serving: Vec<IpAddr> = networks
        .iter()
        .filter(|network| serves_names(network))
        // passt asks those of the host alone.
        .filter(|network| !network.is_passt() || wanted.dns.is_empty())
        .flat_map(|network| network.subnets.iter().map(|subnet| subnet.gateway))
        .collect();
    let or = |given: &[String], hosts: Vec<String>| {
        if given.is_empty() {
            hosts
        } else {
            // Docker's word for none at all.
            let mut given = given.to_vec();
            given.retain(|word| word != ".");
            given
        }
    };
    Resolver {
        servers: match (serving.is_empty(), wanted.dns.is_empty()) {
            (false, _) => serving,
            (true, false) => wanted.dns.clone(),
            (true, true) => host.servers,
        },
        searches: or(&wanted.dns_searches, host.searches),
        options: or(&wanted.dns_options, host.options),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read() {
        let resolver = Resolver::parse(
            "# comment\nnameserver 10.0.0.53\nnameserver fe80::1%eth0\ndomain a\nsearch b c\n\
             options ndots:2 rotate\nnameserver\nsortlist x\n",
        );
        assert_eq!(resolver.servers, ["10.0.0.53".parse::<IpAddr>().unwrap()]);
        assert_eq!(resolver.searches, ["b", "c"]);
        assert_eq!(resolver.options, ["ndots:2", "rotate"]);
    }

    #[test]
    fn flags_come_before_the_hosts_words() {
        let wanted = Wanted {
            mode: Mode::Networks(vec!["caisson".to_owned()]),
            dns: vec!["192.0.2.53".parse().unwrap()],
            dns_searches: vec![".".to_owned()],
            dns_options: vec!["ndots:3".to_owned()],
            ..Wanted::default()
        };
        let resolver = of_container(&wanted, &[]);
        assert_eq!(resolver.servers, wanted.dns);
        assert!(resolver.searches.is_empty());
        assert_eq!(resolver.options, ["ndots:3"]);
        let none = Wanted::default();
        assert_eq!(of_container(&none, &[]), Resolver::default());
    }
}
