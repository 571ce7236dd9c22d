//! Networks that are taken apart below a running pod: the guest has what is left, and the pod can
//! be removed.

use std::fs;

use caisson_tests::{Command, Host, seconds, until};

use super::{Pod, Site, ip, named_by};
use crate::{
    containerd::{
        daemon::{Version, kill},
        networks, with_containerd,
    },
    cri::client::Cri,
};

with_containerd!(
    two: [changes_are_followed, a_pod_without_its_network_is_removed]
);

const GATEWAY: &str = "10.82.0.1";

fn changes_are_followed(version: Version) {
    let host = Host::claim();
    let cri = Cri::start(&host, version);
    let site = Site::new(&cri, &[]);
    let pod = Pod::start(&cri, networks::PTP, "changes", named_by(GATEWAY));
    let address = pod.addresses[0].clone();
    let change = |words: &[&str]| {
        for words in words {
            pod.inside(&format!("ip {words}")).ok();
        }
        pod.is_as_its_namespace(&cri)
    };
    let has = |words: &str| {
        pod.is_as_its_namespace(&cri)
            .iter()
            .any(|line| line.contains(words))
    };
    let talks = || {
        pod.ask(&cri, 50_000, &[GATEWAY]);
        site.ask(50_000, &[&address]);
    };
    talks();
    // The MTU, larger than at the start too; the MAC.
    let to_pod = Command::new(["ip", "route", "get", &address]).run().ok();
    let to_pod = to_pod.stdout();
    let mut words = to_pod.split_whitespace();
    let end = words
        .find(|word| *word == "dev")
        .and_then(|_| words.next())
        .unwrap();
    for mtu in [1300, 1490] {
        ip(&format!("link set {end} mtu {mtu}"));
        change(&[&format!("link set eth0 mtu {mtu}")]);
        assert!(has(&format!("mtu {mtu} ")));
        talks();
    }
    change(&["link set eth0 address 02:00:00:00:82:99"]);
    assert!(has("02:00:00:00:82:99"));
    // Others that knew the pod by its old MAC ask anew.
    Command::new(["ip", "neigh", "flush", "all"]).run().ok();
    talks();
    // Addresses, routes and neighbours.
    change(&[
        "address add 10.99.1.1/32 dev eth0",
        "address add fd99::1/128 dev eth0 nodad",
        "route add 10.99.2.0/24 via 10.82.0.1 metric 77",
        "neigh add 10.82.0.99 lladdr 02:00:00:00:00:99 dev eth0 nud permanent",
    ]);
    for words in ["10.99.1.1", "fd99::1", "10.99.2.0/24", "02:00:00:00:00:99"] {
        assert!(has(words), "{words}");
    }
    change(&[
        "address del 10.99.1.1/32 dev eth0",
        "address del fd99::1/128 dev eth0",
        "route del 10.99.2.0/24",
        "neigh del 10.82.0.99 dev eth0",
    ]);
    for words in ["10.99.1.1", "fd99::1", "10.99.2.0/24", "02:00:00:00:00:99"] {
        assert!(!has(words), "{words}");
    }
    // Down: with the link go its routes, as on any host.
    let routes = pod.inside("ip -4 route").ok().stdout();
    change(&["link set eth0 down"]);
    assert!(!has("eth0"));
    change(&["link set eth0 up"]);
    // Those without a gateway first, which the others need.
    let (far, near): (Vec<&str>, Vec<&str>) = routes.lines().partition(|line| line.contains("via"));
    for route in near.iter().chain(&far) {
        pod.inside(&format!("ip route replace {}", route.trim()))
            .ok();
    }
    pod.is_as_its_namespace(&cri);
    talks();
    // The interface goes; what runs in the pod does not.
    pod.inside("ip link delete eth0").ok();
    let layout = pod.is_as_its_namespace(&cri);
    assert!(layout.is_empty(), "{layout:#?}");
    assert_eq!(cri.output(&pod.app, "cat /proc/1/comm"), "python3\n");
    cri.remove_pod(&pod.id);
}

fn a_pod_without_its_network_is_removed(version: Version) {
    let host = Host::claim();
    let cri = Cri::start(&host, version);
    let site = Site::new(&cri, &[]);
    // Its namespace has no name any more.
    let pod = Pod::start(&cri, networks::PTP, "nameless", named_by(GATEWAY));
    Command::new(["umount", "-l", &pod.namespace]).run().ok();
    fs::remove_file(&pod.namespace).unwrap();
    pod.ask(&cri, 50_000, &[GATEWAY]);
    site.ask(50_000, &[&pod.addresses[0]]);
    cri.remove_pod(&pod.id);
    // Its machine dies: the interface is the namespace's again, and the plugin takes it away.
    let pod = Pod::start(&cri, networks::PTP, "dead", named_by(GATEWAY));
    let taken = |pod: &Pod| {
        let links = pod.inside("ip -br link").ok().stdout();
        let rules = pod.inside("tc qdisc show dev eth0").ok().stdout();
        (links.contains("caisson"), rules.contains("ingress"))
    };
    assert_eq!(taken(&pod), (true, true));
    kill(host.processes_of("caisson-vmm")[0]);
    assert_eq!(cri.ended(&pod.app).exit_code, 137);
    let back = until(seconds(10.0), || {
        (taken(&pod) == (false, false)).then_some(())
    });
    assert!(back.is_some(), "{:?}", taken(&pod));
    cri.remove_pod(&pod.id);
}
