use std::{fs, process::Command};

use caisson_protocol::agent::RouteMetric;

use super::{routes::*, *};

fn body(message: &Message) -> &[u8] {
    message.body()
}

fn values(message: &Message, fixed: usize) -> Vec<(u16, Vec<u8>)> {
    attributes(&body(message)[fixed..])
        .map(|(kind, value)| (kind, value.to_vec()))
        .collect()
}

#[test]
fn an_ipv4_address_has_its_broadcast_address() {
    let message = address_message(RTM_NEWADDR, SET, 3, "10.88.0.5".parse().unwrap(), 16);
    assert_eq!(body(&message)[..8], [AF_INET, 16, 0, 0, 3, 0, 0, 0]);
    let address = vec![10, 88, 0, 5];
    assert_eq!(
        values(&message, 8),
        [
            (IFA_FLAGS, IFA_F_NOPREFIXROUTE.to_ne_bytes().to_vec()),
            (IFA_LOCAL, address.clone()),
            (IFA_ADDRESS, address),
            (IFA_BROADCAST, vec![10, 88, 255, 255])
        ]
    );
    let message = address_message(RTM_NEWADDR, SET, 3, "10.88.0.5".parse().unwrap(), 31);
    assert_eq!(values(&message, 8).len(), 3);
}

#[test]
fn an_ipv6_address_is_used_at_once() {
    let message = address_message(RTM_NEWADDR, SET, 3, "fd00::5".parse().unwrap(), 64);
    assert_eq!(body(&message)[..4], [AF_INET6, 64, 0, 0]);
    let flags = IFA_F_NODAD | IFA_F_NOPREFIXROUTE;
    assert_eq!(
        values(&message, 8)[0],
        (IFA_FLAGS, flags.to_ne_bytes().to_vec())
    );
    assert_eq!(values(&message, 8).len(), 3);
}

fn route(destination: &str, gateway: &str) -> Route {
    Route {
        destination: destination.to_owned(),
        gateway: gateway.to_owned(),
        ..Default::default()
    }
}

#[test]
fn a_default_route_has_no_destination() {
    for destination in ["", "0.0.0.0/0"] {
        let message = route_message(&route(destination, "10.88.0.1"), 2).unwrap();
        assert_eq!(body(&message)[..8], [AF_INET, 0, 0, 0, 254, 4, 0, 1]);
        assert_eq!(
            values(&message, 12),
            [
                (RTA_OIF, vec![2, 0, 0, 0]),
                (RTA_GATEWAY, vec![10, 88, 0, 1])
            ]
        );
    }
}

#[test]
fn routes_carry_scope_metric_source_and_onlink() {
    let message = route_message(
        &Route {
            source: "10.1.0.9".to_owned(),
            metric: 7,
            flags: RTNH_F_ONLINK,
            ..route("10.1.2.3/16", "169.254.1.1")
        },
        2,
    )
    .unwrap();
    assert_eq!(body(&message)[8..12], 4u32.to_ne_bytes());
    let values = values(&message, 12);
    assert!(values.contains(&(RTA_DST, vec![10, 1, 0, 0])), "{values:?}");
    assert!(values.contains(&(RTA_PREFSRC, vec![10, 1, 0, 9])));
    assert!(values.contains(&(RTA_PRIORITY, vec![7, 0, 0, 0])));
    // On the link, because no gateway is needed.
    let direct = route_message(&route("10.1.0.0/16", ""), 2).unwrap();
    assert_eq!(body(&direct)[6], RT_SCOPE_LINK);
    // IPv4 by an IPv6 router.
    let via = route_message(&route("10.1.0.0/16", "fe80::1"), 2).unwrap();
    let value = super::tests::values(&via, 12).pop().unwrap();
    assert_eq!((value.0, value.1.len()), (RTA_VIA, 18));
}

fn with_metrics(pairs: &[(u32, u32)], route: Route) -> Route {
    let metric = |&(kind, value): &(u32, u32)| RouteMetric {
        kind,
        value,
        ..Default::default()
    };
    Route {
        metrics: pairs.iter().map(metric).collect(),
        ..route
    }
}

#[test]
fn routes_that_differ_in_their_metrics_are_not_the_same() {
    let message = |pairs: &[(u32, u32)]| {
        let route = with_metrics(pairs, route("", "10.88.0.1"));
        route_message(&route, 2).unwrap()
    };
    let values = values(&message(&[(2, 1400), (8, 1000)]), 12);
    let nested = values.iter().find(|(kind, _)| *kind == RTA_METRICS);
    let nested: Vec<_> = attributes(&nested.unwrap().1)
        .map(|(kind, value)| (kind, u32_at(value, 0)))
        .collect();
    assert_eq!(nested, [(2, 1400), (8, 1000)]);
    let key = |pairs: &[(u32, u32)]| key_of(message(pairs).body()).unwrap();
    assert_eq!(key(&[(2, 1400), (8, 1000)]), key(&[(8, 1000), (2, 1400)]));
    assert_ne!(key(&[(2, 1400)]), key(&[(2, 1300)]));
    assert_ne!(key(&[(2, 1400)]), key(&[]));
    let unknown = with_metrics(&[(65536, 1)], route("", "10.88.0.1"));
    assert!(route_message(&unknown, 2).is_err());
}

#[test]
fn only_advertised_addresses_are_for_a_time() {
    assert!(is_advertised(&[AF_INET6, 64, 0, 0]));
    assert!(!is_advertised(&[AF_INET6, 64, IFA_F_PERMANENT, 0]));
    assert!(!is_advertised(&[AF_INET, 24, 0, 0]));
}

#[test]
fn malformed_routes_are_refused() {
    assert!(route_message(&route("", ""), 2).is_err());
    assert!(route_message(&route("fd00::/64", "10.0.0.1"), 2).is_err());
    assert!(route_message(&route("10.0.0.0/33", ""), 2).is_err());
    assert!(route_message(&route("10.0.0.0/8", "nonsense"), 2).is_err());
    for (flags, scope) in [(1, 0), (0, 256)] {
        let route = Route {
            flags,
            scope,
            ..route("10.0.0.0/8", "")
        };
        assert!(route_message(&route, 2).is_err());
    }
}

#[test]
fn a_neighbour_stays_for_good_unless_told_otherwise() {
    let mut neighbour = Neighbour {
        address: "169.254.1.1".to_owned(),
        mac: "ee:ee:ee:ee:ee:ee".to_owned(),
        ..Default::default()
    };
    let message = neighbour_message(&neighbour, 5).unwrap();
    assert_eq!(
        body(&message)[..12],
        [AF_INET, 0, 0, 0, 5, 0, 0, 0, 0x80, 0, 0, 0]
    );
    assert_eq!(
        values(&message, 12),
        [
            (NDA_DST, vec![169, 254, 1, 1]),
            (NDA_LLADDR, vec![0xEE; 6]),
            (NDA_PROTOCOL, vec![RTPROT_STATIC])
        ]
    );
    neighbour.mac = "ee:ee:ee:ee:ee".to_owned();
    assert!(neighbour_message(&neighbour, 5).is_err());
}

#[test]
fn names_and_addresses_are_checked() {
    for name in ["", "lo", "..", "a/b", "a b", "sixteen-letters-"] {
        assert!(check_name(name).is_err(), "{name}");
    }
    check_name("eth0").unwrap();
    for mac in [
        "",
        "aa:bb:cc:dd:ee",
        "aa:bb:cc:dd:ee:fg",
        "aabb:cc:dd:ee:f:0",
    ] {
        assert!(parse_mac(mac).is_err(), "{mac}");
    }
    assert_eq!(parse_cidr("fd00::1").unwrap().1, 128);
    for text in ["10.0.0.1/", "10.0.0.1/33", "/8", "x/8", "10.0.0.1/-1"] {
        assert!(parse_cidr(text).is_err(), "{text}");
    }
    assert_eq!(
        network_of("10.1.2.3".parse().unwrap(), 0),
        IpAddr::V4(Ipv4Addr::UNSPECIFIED)
    );
}

/// Runs `ip` in the calling thread's network namespace.
fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .unwrap();
    assert!(output.status.success(), "ip {arguments}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// What [`configure`] makes of what the host says of eth1's router advertisements.
fn advertisements(request: &mut Network, configure: &mut impl FnMut(&Network) -> Result<()>) {
    const DIRECTORY: &str = "/proc/sys/net/ipv6/conf/eth1";
    let settings = || {
        ["disable_ipv6", "accept_ra", "autoconf"]
            .map(|name| fs::read_to_string(format!("{DIRECTORY}/{name}")).unwrap())
            .join("")
    };
    let made = "fd77::1/64";
    let has_made = || ip("addr show eth1").contains(made);
    // As an advertisement makes it.
    let advertise = || {
        ip(&format!(
            "addr add {made} dev eth1 valid_lft 900 preferred_lft 900"
        ))
    };
    // The host has told nothing.
    assert_eq!(settings(), "0\n0\n0\n");
    advertise();
    configure(request).unwrap();
    assert!(!has_made());

    request.interfaces[0].accept_ra = 1;
    request.interfaces[0].autoconf = true;
    configure(request).unwrap();
    assert_eq!(settings(), "0\n1\n1\n");
    advertise();
    ip("-6 route add default via fe80::77 dev eth1 proto ra metric 77 expires 900");
    // The pod's own sysctl stays, as the host says nothing new.
    fs::write(format!("{DIRECTORY}/accept_ra"), "2").unwrap();
    configure(request).unwrap();
    assert!(has_made() && ip("-6 route").contains("fe80::77"));
    assert_eq!(settings(), "0\n2\n1\n");

    let addresses = std::mem::take(&mut request.interfaces[0].addresses);
    let routes = std::mem::take(&mut request.routes);
    request.interfaces[0].disable_ipv6 = true;
    configure(request).unwrap();
    assert_eq!(settings(), "1\n2\n1\n");
    assert!(!ip("addr show eth1").contains("inet6"));
    request.interfaces[0].disable_ipv6 = false;
    request.interfaces[0].addresses = addresses;
    request.routes = routes;
    configure(request).unwrap();
    assert!(ip("addr show eth1").contains("fd09::2/64"));
    assert_eq!(settings(), "0\n2\n1\n");
    // A sysctl of the pod's own turns IPv6 off and on again.
    let switch = |value| fs::write(format!("{DIRECTORY}/disable_ipv6"), value).unwrap();
    switch("1");
    configure(request).unwrap();
    assert!(!ip("addr show eth1").contains("inet6"));
    switch("0");
    configure(request).unwrap();
    assert!(ip("addr show eth1").contains("fd09::2/64"));
}

/// A whole configuration in a network namespace of the test's own, by the kernel that runs it.
#[test]
fn the_kernel_takes_it() {
    // SAFETY: a network namespace is of the one thread, which shares nothing that hangs on it.
    let own = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) };
    if own.is_err() || Command::new("ip").arg("-V").output().is_err() {
        eprintln!("skipped: needs root and the program ip");
        return;
    }
    // Each has the name that the other is to get.
    ip(
        "link add eth0 address 02:00:00:00:00:01 type veth peer name eth1 address 02:00:00:00:00:02",
    );
    let interface = |name: &str, mac: &str, addresses: &[&str]| NetworkInterface {
        name: name.to_owned(),
        mac: mac.to_owned(),
        mtu: 1400,
        addresses: addresses.iter().map(|a| (*a).to_owned()).collect(),
        ..Default::default()
    };
    let on = |device: &str, route: Route| Route {
        device: device.to_owned(),
        ..route
    };
    let mut request = Network {
        interfaces: vec![
            interface(
                "eth1",
                "02:00:00:00:00:01",
                &["10.9.0.2/24", "fd09::2/64", "fe80::99/64"],
            ),
            interface("eth0", "02:00:00:00:00:02", &["10.8.0.2/32"]),
        ],
        // The gateway's own route comes last and is still set first.
        routes: vec![
            on(
                "eth0",
                with_metrics(&[(1, 1 << 2), (2, 1350), (8, 1200)], route("", "10.8.0.1")),
            ),
            on("eth0", route("10.8.0.1/32", "")),
            on("eth1", route("fd09::/64", "")),
            // The same destination by two interfaces.
            on("eth1", route("fe80::/64", "")),
            on("eth0", route("fe80::/64", "")),
            on("eth1", route("10.7.0.0/16", "")),
            on("eth0", route("10.7.0.0/16", "")),
            on(
                "eth1",
                Route {
                    metric: 50,
                    source: "fd09::2".to_owned(),
                    ..with_metrics(&[(2, 1300)], route("fd10::/64", "fd09::1"))
                },
            ),
            on(
                "eth1",
                Route {
                    flags: RTNH_F_ONLINK,
                    ..route("10.10.0.0/16", "169.254.1.1")
                },
            ),
        ],
        neighbours: vec![Neighbour {
            address: "169.254.1.1".to_owned(),
            mac: "ee:ee:ee:ee:ee:ee".to_owned(),
            device: "eth1".to_owned(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let mut told = ipv6::Told::new();
    let mut configure = |request: &Network| configure_after(request, &mut told);
    configure_loopback().unwrap();
    configure(&request).unwrap();
    configure(&request).expect("it can be asked for twice");
    assert!(ip("addr show lo").contains("127.0.0.1"));
    let first = ip("addr show eth1");
    for part in [
        "02:00:00:00:00:01",
        "10.9.0.2/24 brd 10.9.0.255",
        "fd09::2/64",
        "fe80::99/64 scope link",
        "mtu 1400",
    ] {
        assert!(first.contains(part), "{part}: {first}");
    }
    assert!(
        !first.contains("fe80::ff:fe00:1/64"),
        "the kernel makes no link-local address by itself: {first}"
    );
    let routes = ip("-4 route");
    for part in [
        "default via 10.8.0.1 dev eth0 proto static mtu lock 1350 advmss 1200",
        "10.8.0.1 dev eth0 proto static scope link",
        "10.7.0.0/16 dev eth0",
        "10.7.0.0/16 dev eth1",
        "10.10.0.0/16 via 169.254.1.1 dev eth1 proto static onlink",
    ] {
        assert!(routes.contains(part), "{part}: {routes}");
    }
    let routes = ip("-6 route");
    assert!(routes.contains("fe80::/64 dev eth0") && routes.contains("fe80::/64 dev eth1"));
    assert!(routes.contains("fd10::/64 via fd09::1 dev eth1") && routes.contains("metric 50"));
    assert!(routes.contains("mtu 1300"), "{routes}");
    assert!(ip("neigh").contains("169.254.1.1 dev eth1 lladdr ee:ee:ee:ee:ee:ee PERMANENT"));

    // A route whose MTU changes is another one.
    request.routes[0].metrics[1].value = 1250;
    request.routes[7].metrics.clear();
    configure(&request).unwrap();
    let routes = ip("-4 route show default");
    assert!(routes.contains("mtu lock 1250 advmss 1200") && !routes.contains("1350"));
    assert!(!ip("-6 route").contains("mtu 1300"));

    advertisements(&mut request, &mut configure);

    // Another pod's addresses replace the first one's.
    request.interfaces[0].addresses = vec!["10.9.0.3/24".to_owned()];
    request.routes.clear();
    request.neighbours.clear();
    request.interfaces[1].no_arp = true;
    configure(&request).unwrap();
    assert_eq!(ip("neigh show nud permanent"), "");
    assert!(ip("link show eth0").contains("NOARP"));
    let first = ip("addr show eth1");
    assert!(
        first.contains("10.9.0.3/24") && !first.contains("10.9.0.2/") && !first.contains("fd09")
    );
    assert_eq!(
        ip("-4 route"),
        "",
        "routes that are not wanted any more are gone"
    );
    assert!(!ip("-6 route").contains("fd10"));

    // What the kernel refuses is told in its words.
    request.routes = vec![on("eth0", route("10.20.0.0/16", "10.99.0.1"))];
    let message = configure(&request).unwrap_err().message;
    assert!(
        message.contains("10.20.0.0/16 via 10.99.0.1") && message.contains("gateway"),
        "{message}"
    );
    request.routes.clear();
    request.interfaces[0].mac = "02:00:00:00:00:09".to_owned();
    let message = configure(&request).unwrap_err().message;
    assert!(message.contains("02:00:00:00:00:09"), "{message}");
}
