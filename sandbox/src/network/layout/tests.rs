use std::{fs, path::Path, process::Command};

use rtnetlink::packet_route::link::Inet6DevConf;

use super::*;
use crate::network::namespace::Namespace;

fn settings(forwarding: i32, accept_ra: i32) -> Ipv6 {
    let mut settings = Inet6DevConf::default();
    settings.forwarding = forwarding;
    settings.accept_ra = accept_ra;
    ipv6_settings(&AfSpecUnspec::Inet6(vec![AfSpecInet6::DevConf(settings)])).unwrap()
}

#[test]
fn a_namespace_that_forwards_takes_no_advertisements_unless_told_so() {
    for (forwarding, accept_ra, taken) in [(0, 0, 0), (0, 1, 1), (1, 1, 0), (0, 2, 2), (1, 2, 2)] {
        assert_eq!(settings(forwarding, accept_ra).accept_ra, taken);
    }
}

#[test]
fn nothing_is_accepted_when_the_kernel_tells_no_settings() {
    let mut message = LinkMessage::default();
    message.header.link_layer_type = LinkLayerType::Ether;
    message.header.flags = LinkFlags::Up;
    message
        .attributes
        .push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(
            Vec::new(),
        )]));
    let link = link(&message).unwrap();
    assert_eq!((link.ipv6.accept_ra, link.ipv6.autoconf), (0, false));
}

#[test]
fn addresses_of_advertisements_are_told_from_others() {
    let mut message = AddressMessage::default();
    assert!(!is_advertised_address(&message));
    let protocol = AddressProtocol::RouterAnnouncement;
    message
        .attributes
        .push(AddressAttribute::Protocol(protocol));
    assert!(is_advertised_address(&message));
}

#[test]
fn metrics_that_a_guest_may_refuse_are_left_out() {
    assert_eq!(metric(&RouteMetric::Mtu(1400)), Some((2, 1400)));
    assert_eq!(metric(&RouteMetric::CcAlgo("bbr".to_owned())), None);
    assert_eq!(metric(&RouteMetric::Features(8)), None);
}

/// Runs `ip` in the calling thread's network namespace.
fn ip(arguments: &str) {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .unwrap();
    assert!(output.status.success(), "ip {arguments}: {output:?}");
}

/// What the kernel that runs the test says of a namespace of its own.
#[tokio::test]
async fn the_guest_is_told_what_the_kernel_says() {
    // SAFETY: a network namespace is of the one thread, which shares nothing that hangs on it.
    let own = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) };
    if own.is_err() || Command::new("ip").arg("-V").output().is_err() {
        eprintln!("skipped: needs root and the program ip");
        return;
    }
    ip("link add eth0 type veth peer name eth1");
    let set = |name: &str, value: &str| {
        fs::write(format!("/proc/sys/net/ipv6/conf/{name}"), value).unwrap();
    };
    set("eth0/autoconf", "0");
    set("eth1/accept_ra", "0");
    ip("link set eth0 up");
    ip("link set eth1 up");
    ip("address add 10.0.0.2/24 dev eth0");
    ip("route add default via 10.0.0.1 mtu lock 1400 advmss 1000 initcwnd 5");
    for (device, metric) in [("eth0", 5), ("eth1", 6)] {
        // As an advertisement makes them.
        ip(&format!(
            "-6 route add default via fe80::1 dev {device} proto ra metric {metric}"
        ));
        ip(&format!(
            "-6 route add fd01::/64 dev {device} proto kernel metric {metric} expires 600"
        ));
    }
    let namespace = Namespace::open(Path::new("/proc/thread-self/ns/net"))
        .await
        .unwrap();
    let told = async || read(namespace.handle()).await.unwrap().to_proto(|_| None);
    let network = told().await;
    let of = |name: &str| network.interfaces.iter().find(|i| i.name == name).unwrap();
    let settings = |i: &agent::NetworkInterface| (i.disable_ipv6, i.accept_ra, i.autoconf);
    assert_eq!(settings(of("eth0")), (false, 1, false));
    assert_eq!(settings(of("eth1")), (false, 0, true));
    let find = |destination: &str, device: &str| {
        let mut routes = network.routes.iter();
        routes.find(|route| route.destination == destination && route.device == device)
    };
    let metrics = |route: &agent::Route| {
        let pairs = route.metrics.iter().map(|one| (one.kind, one.value));
        pairs.collect::<Vec<_>>()
    };
    let mut ways = network.routes.iter();
    let way = ways.find(|route| route.gateway == "10.0.0.1").unwrap();
    assert_eq!(metrics(way), [(1, 1 << 2), (2, 1400), (8, 1000), (11, 5)]);
    assert!(metrics(find("10.0.0.0/24", "eth0").unwrap()).is_empty());
    // Where the guest takes advertisements itself, it finds these by itself.
    assert!(find("fd01::/64", "eth1").is_some() && find("fd01::/64", "eth0").is_none());
    let routers = network
        .routes
        .iter()
        .filter(|route| route.gateway == "fe80::1");
    let of: Vec<_> = routers.map(|route| route.device.as_str()).collect();
    assert_eq!(of, ["eth1"]);

    set("eth0/disable_ipv6", "1");
    let network = told().await;
    let eth0 = network
        .interfaces
        .iter()
        .find(|i| i.name == "eth0")
        .unwrap();
    assert!(eth0.disable_ipv6);
}
