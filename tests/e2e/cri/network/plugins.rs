//! One network after the other: two pods on each, in both families.

use std::time::Instant;

use caisson_tests::{Command, Host};
use k8s_cri::v1::{PortMapping, Protocol};
use serde_json::json;

use super::{Pod, Site, named_by, plugin, reach};
use crate::{
    containerd::{
        daemon::Version,
        networks::{self, BRIDGE_NAME, PARENT},
        with_containerd,
    },
    cri::client::Cri,
};

with_containerd!(
    two: [bridge, veth_pairs_and_bandwidth, macvlan, ipvlan, ipvlan_of_layer_3]
);

/// Published by the first pod of [`bridge`].
const HOST_PORT: i32 = 18100;

fn bridge(version: Version) {
    let host = Host::claim();
    let cri = Cri::start(&host, version);
    let site = Site::new(&cri, &[]);
    let a = Pod::start(&cri, networks::BRIDGE, "bridge-a", |config| {
        named_by("10.81.0.1")(config);
        config.port_mappings = [Protocol::Tcp, Protocol::Udp]
            .map(|protocol| PortMapping {
                protocol: protocol.into(),
                container_port: 7100,
                host_port: HOST_PORT,
                ..Default::default()
            })
            .to_vec();
    });
    let b = Pod::start(&cri, networks::BRIDGE, "bridge-b", |_| {});
    reach(&cri, &site, [&a, &b], ["10.81.0.1", "fd81::1"]);
    // hostPort: by the host, by another pod, by the pod itself.
    let published = [
        format!("10.81.0.1@{HOST_PORT}"),
        format!("fd81::1@{HOST_PORT}"),
    ];
    let published: Vec<&str> = published.iter().map(String::as_str).collect();
    let loopback = format!("127.0.0.1@{HOST_PORT}");
    site.ask(10_000, &[&published[..], &[&loopback]].concat());
    b.ask(&cri, 10_000, &published);
    a.ask(&cri, 10_000, &published[..1]);
    policy(&cri, &a, &b);
    second_interface(&cri, &a);
    for pod in [&a, &b] {
        cri.remove_pod(&pod.id);
    }
    let rules = Command::new(["nft", "list", "ruleset"]).run().ok().stdout();
    for address in a.addresses.iter().chain(&b.addresses) {
        let quoted = [format!("{address} "), format!("{address}:")];
        assert!(
            !quoted.iter().any(|text| rules.contains(text)),
            "{address}: {rules}"
        );
    }
    assert!(!rules.contains(&HOST_PORT.to_string()), "{rules}");
    let ports = format!("/sys/class/net/{BRIDGE_NAME}/brif");
    assert_eq!(std::fs::read_dir(ports).unwrap().count(), 0);
}

/// Rules of nftables on the host's side hold for the guest's frames.
fn policy(cri: &Cri<'_>, a: &Pod, b: &Pod) {
    let nft = |words: &str| {
        Command::new(["nft", words]).run().ok();
    };
    let ping = |address: &str| {
        let answer = cri.exec(&a.app, &format!("ping -c 1 -W 4 {address}"), 0);
        answer.unwrap().exit_code == 0
    };
    let (to, from) = (&b.addresses[0], &a.addresses[0]);
    assert!(ping(to) && ping("10.81.0.1"));
    nft("add table bridge tests");
    nft("add chain bridge tests forward { type filter hook forward priority 0; }");
    nft(&format!(
        "add rule bridge tests forward ip saddr {from} ip daddr {to} drop"
    ));
    nft("add table inet tests");
    nft("add chain inet tests input { type filter hook input priority 0; }");
    nft(&format!(
        "add rule inet tests input ip saddr {from} icmp type echo-request drop"
    ));
    assert!(!ping(to) && !ping("10.81.0.1"), "the rules drop them");
    assert!(ping(&b.addresses[1]), "nothing was said of IPv6");
    nft("delete table bridge tests");
    nft("delete table inet tests");
    assert!(ping(to) && ping("10.81.0.1"));
}

/// A further interface with a MAC that another plugin gives it, as a meta-plugin makes it after the
/// pod's start.
fn second_interface(cri: &Cri<'_>, pod: &Pod) {
    const MAC: &str = "02:00:00:00:90:02";
    let mut config = json!({
        "cniVersion": "1.0.0", "name": "second", "type": "ptp", "mtu": 9000,
        "ipam": {
            "type": "host-local", "ranges": [[{ "subnet": "10.90.0.0/24" }]],
            "dataDir": cri.daemon.host.scratch().join("second"),
        },
    });
    let result = plugin("ADD", pod, "net1", &config);
    let tuning = json!({
        "cniVersion": "1.0.0", "name": "second", "type": "tuning", "mac": MAC,
        "prevResult": result,
    });
    plugin("ADD", pod, "net1", &tuning);
    let layout = pod.is_as_its_namespace(cri);
    let wanted = format!("net1 \"{MAC}\" mtu 9000 no arp false");
    assert!(layout.contains(&wanted), "{layout:#?}");
    pod.ask(cri, 100_000, &["10.90.0.1", "10.81.0.1"]);
    config["prevResult"] = result;
    plugin("DEL", pod, "net1", &config);
    let layout = pod.is_as_its_namespace(cri);
    assert!(
        !layout.iter().any(|line| line.contains("net1")),
        "{layout:#?}"
    );
    pod.ask(cri, 1000, &["10.81.0.1"]);
}

fn veth_pairs_and_bandwidth(version: Version) {
    let host = Host::claim();
    let cri = Cri::start(&host, version);
    let site = Site::new(&cri, &[]);
    let a = Pod::start(&cri, networks::PTP, "ptp-a", named_by("10.82.0.1"));
    let b = Pod::start(&cri, networks::PTP, "ptp-b", |_| {});
    reach(&cri, &site, [&a, &b], ["10.82.0.1", "fd82::1"]);
    // A tunnel's MTU is the default route's alone (Cilium), and may change.
    for mtu in [1300, 1350] {
        let way = format!("default via 10.82.0.1 dev eth0 mtu {mtu} advmss 1200");
        a.inside(&format!("ip route replace {way}")).ok();
        let layout = a.is_as_its_namespace(&cri);
        let wanted = format!("\"mtu\":{mtu}");
        assert!(
            layout.iter().any(|line| line.contains(&wanted)),
            "{layout:#?}"
        );
    }
    a.ask(&cri, 100_000, &["10.82.0.1"]);
    cri.remove_pod(&b.id);
    // The plugin's limit holds for a guest's frames: so many bytes, less the burst, take their time
    // both ways, and less without it.
    let limited = Pod::start(&cri, networks::LIMITED, "limited", |_| {});
    const BYTES: u64 = 1_500_000;
    let time = |pod: &Pod, host: &str| {
        let begin = Instant::now();
        pod.ask(&cri, BYTES as usize, &[host]);
        begin.elapsed().as_secs_f64()
    };
    let least = (BYTES * 8) as f64 / networks::BITS_PER_SECOND as f64 * 0.85;
    let (free, bound) = (time(&a, "10.82.0.1"), time(&limited, "10.83.0.1"));
    println!("{BYTES} bytes take {free:.1} s, and {bound:.1} s with a limit");
    assert!(bound >= least, "{bound} s: at least {least} s");
    cri.remove_pod(&limited.id);
    cri.remove_pod(&a.id);
}

fn macvlan(version: Version) {
    let host = Host::claim();
    let cri = Cri::start(&host, version);
    let site = Site::new(&cri, &["10.84.0.1/24", "fd84::1/64"]);
    let a = Pod::start(&cri, networks::MACVLAN, "macvlan-a", named_by("10.84.0.1"));
    let b = Pod::start(&cri, networks::MACVLAN, "macvlan-b", |_| {});
    reach(&cri, &site, [&a, &b], ["10.84.0.1", "fd84::1"]);
    for pod in [&a, &b] {
        cri.remove_pod(&pod.id);
    }
}

fn ipvlan(version: Version) {
    let host = Host::claim();
    let cri = Cri::start(&host, version);
    let site = Site::new(&cri, &["10.85.0.1/24", "fd85::1/64", "10.91.0.1/24"]);
    let a = Pod::start(&cri, networks::IPVLAN, "ipvlan-a", named_by("10.85.0.1"));
    let b = Pod::start(&cri, networks::IPVLAN, "ipvlan-b", |_| {});
    reach(&cri, &site, [&a, &b], ["10.85.0.1", "fd85::1"]);
    // All have their parent's MAC, even two of one pod.
    let second = json!({
        "cniVersion": "1.0.0", "name": "second", "type": "ipvlan", "master": PARENT,
        "ipam": {
            "type": "host-local", "ranges": [[{ "subnet": "10.91.0.0/24" }]],
            "dataDir": host.scratch().join("second"),
        },
    });
    plugin("ADD", &a, "net1", &second);
    let layout = a.is_as_its_namespace(&cri);
    let wanted = format!("net1 \"{}\" mtu 1500 no arp false", parents_mac());
    assert!(layout.contains(&wanted), "{layout:#?}");
    a.ask(&cri, 100_000, &["10.91.0.1", "10.85.0.1"]);
    plugin("DEL", &a, "net1", &second);
    a.is_as_its_namespace(&cri);
    for pod in [&a, &b] {
        cri.remove_pod(&pod.id);
    }
}

fn parents_mac() -> String {
    let path = format!("/sys/class/net/{PARENT}/address");
    std::fs::read_to_string(path).unwrap().trim().to_owned()
}

/// Nobody asks for addresses on such a network, and beyond it the kernel routes by the parent alone.
fn ipvlan_of_layer_3(version: Version) {
    let host = Host::claim();
    let cri = Cri::start(&host, version);
    let _site = Site::new(&cri, &[]);
    let a = Pod::start(&cri, networks::IPVLAN_L3, "l3-a", |_| {});
    let b = Pod::start(&cri, networks::IPVLAN_L3, "l3-b", |_| {});
    for (pod, other) in [(&a, &b), (&b, &a)] {
        let layout = pod.is_as_its_namespace(&cri);
        let wanted = format!(
            "eth0 \"{}\" mtu {} no arp true",
            parents_mac(),
            networks::MTU
        );
        assert!(layout.contains(&wanted), "{layout:#?}");
        let others: Vec<&str> = other.addresses.iter().map(String::as_str).collect();
        assert_eq!(others.len(), 2);
        pod.ask(&cri, 100_000, &others);
    }
    for pod in [&a, &b] {
        cri.remove_pod(&pod.id);
    }
    // Packets of the mode l3s never pass where frames are taken over.
    let config = cri.pod("l3s");
    let refused = cri
        .try_run_pod_by(networks::IPVLAN_L3S, &config)
        .unwrap_err();
    let message = refused.message();
    assert!(
        message.contains("eth0") && message.contains("l3s"),
        "{message}"
    );
    let list = cri.call(async |mut client| {
        client
            .list_pod_sandbox(k8s_cri::v1::ListPodSandboxRequest::default())
            .await
    });
    for pod in list.unwrap().items {
        cri.remove_pod(&pod.id);
    }
}
