//! `network`, `port`, and the flags of `run` about networks.

use clap::{Arg, Command};

use super::{format, list, switch, value};

/// Flags of `run`.
pub fn flags() -> [Arg; 12] {
    [
        list(
            "network",
            None,
            "NETWORK",
            "A network's name [default: bridge; passt without root], \"none\" or \"container:NAME\"",
        )
        .visible_alias("net"),
        list(
            "network-alias",
            None,
            "NAME",
            "Another name of the container in its networks",
        ),
        value("ip", None, "ADDRESS", "Address of IPv4 in the network"),
        value("ip6", None, "ADDRESS", "Address of IPv6 in the network"),
        value("mac-address", None, "ADDRESS", "Hardware address"),
        list(
            "publish",
            Some('p'),
            "[[IP:]HOST:]PORT[/udp]",
            "Give the host a port of the container",
        ),
        switch(
            "publish-all",
            Some('P'),
            "Publish every exposed port at one that is free",
        ),
        list(
            "expose",
            None,
            "PORT[/udp]",
            "A port for -P beside those of the image",
        ),
        list("dns", None, "ADDRESS", "A name server"),
        list("dns-search", None, "DOMAIN", "A domain to search; . = none"),
        list("dns-option", None, "OPTION", "An option of resolv.conf").visible_alias("dns-opt"),
        list(
            "add-host",
            None,
            "NAME:ADDRESS",
            "A line of /etc/hosts; host-gateway = the host",
        ),
    ]
}

fn networks() -> Arg {
    Arg::new("network")
        .value_name("NETWORK")
        .required(true)
        .num_args(1..)
}

/// The verbs.
pub fn commands() -> [Command; 2] {
    [noun(), port()]
}

fn port() -> Command {
    Command::new("port")
        .about("List ports that a container has published")
        .args([
            Arg::new("container").value_name("CONTAINER").required(true),
            Arg::new("port").value_name("PORT[/udp]"),
        ])
}

fn noun() -> Command {
    Command::new("network")
        .about("Networks of containers")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommands([
            Command::new("create")
                .about("Make a network in which containers find each other by name")
                .args([
                    value("driver", Some('d'), "DRIVER", "\"bridge\""),
                    list(
                        "subnet",
                        None,
                        "NETWORK",
                        "Its addresses, such as 10.5.0.0/24 [default: some that are free]",
                    ),
                    list(
                        "gateway",
                        None,
                        "ADDRESS",
                        "Of the host [default: the first]",
                    ),
                    list(
                        "ip-range",
                        None,
                        "NETWORK",
                        "Part of the subnet that addresses are given from",
                    ),
                    switch("ipv6", None, "With addresses of IPv6"),
                    switch("internal", None, "Without a way out"),
                    list("opt", Some('o'), "KEY=VALUE", "mtu=BYTES"),
                    list("label", None, "KEY=VALUE", "A label"),
                    Arg::new("name").value_name("NETWORK").required(true),
                ]),
            Command::new("ls")
                .visible_alias("list")
                .about("List networks")
                .args([
                    switch("quiet", Some('q'), "Only ids"),
                    switch("no-trunc", None, "Do not shorten"),
                    format(),
                ]),
            Command::new("inspect")
                .about("Tell all about networks, as JSON")
                .args([format(), networks()]),
            Command::new("rm")
                .visible_alias("remove")
                .about("Remove networks that no container has")
                .args([
                    switch("force", Some('f'), "Be content when there is none"),
                    networks(),
                ]),
            Command::new("prune")
                .about("Remove all networks that no container has")
                .arg(switch("force", Some('f'), "Do not ask")),
        ])
}
