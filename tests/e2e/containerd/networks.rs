//! Pod networks of the real CNI plugins: each is that of a runtime handler of CRI.

use std::{fs, path::Path};

use serde_json::{Value, json};

/// The bridge of [`BRIDGE`].
pub const BRIDGE_NAME: &str = "tests-br";
/// What interfaces of [`MACVLAN`] and those of ipvlan hang on; the tests make it.
pub const PARENT: &str = "tests-up";

/// A bridge with hostPort, the kubelet's bandwidth, and tuning.
pub const BRIDGE: &str = "caisson-bridge";
/// veth pairs.
pub const PTP: &str = "caisson-ptp";
/// veth pairs with a bandwidth of [`BITS_PER_SECOND`].
pub const LIMITED: &str = "caisson-limited";
/// macvlan on [`PARENT`].
pub const MACVLAN: &str = "caisson-macvlan";
/// ipvlan in the mode l2.
pub const IPVLAN: &str = "caisson-ipvlan";
/// ipvlan in the mode l3.
pub const IPVLAN_L3: &str = "caisson-ipvlan3";
/// ipvlan in the mode l3s.
pub const IPVLAN_L3S: &str = "caisson-ipvlan3s";

/// The limit of [`LIMITED`], each way.
pub const BITS_PER_SECOND: u64 = 4_000_000;

/// MTU of the pods' interfaces.
pub const MTU: u32 = 1430;

/// The handler's plugins, in their order, with addresses of `dataDir` below `directory`.
fn plugins(handler: &str, directory: &Path) -> Vec<Value> {
    let addresses = |number: u8| {
        json!({
            "type": "host-local",
            "ranges": [
                [{ "subnet": format!("10.{number}.0.0/24") }],
                [{ "subnet": format!("fd{number}::/64") }],
            ],
            "routes": [{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }],
            "dataDir": directory.join(format!("addresses-{handler}")),
        })
    };
    let ptp = |number: u8| json!({ "type": "ptp", "ipMasq": true, "mtu": MTU, "ipam": addresses(number) });
    let on_parent = |kind: &str, mode: &str, number: u8| {
        json!({
            "type": kind, "master": PARENT, "mode": mode, "mtu": MTU, "ipam": addresses(number),
        })
    };
    match handler {
        BRIDGE => vec![
            json!({
                "type": "bridge", "bridge": BRIDGE_NAME, "isGateway": true, "ipMasq": true,
                "hairpinMode": true, "mtu": MTU, "ipam": addresses(81),
            }),
            json!({ "type": "portmap", "capabilities": { "portMappings": true }, "snat": true }),
            json!({ "type": "bandwidth", "capabilities": { "bandwidth": true } }),
            json!({
                "type": "tuning",
                "sysctl": { "net.ipv4.conf.IFNAME.arp_notify": "1" },
            }),
        ],
        PTP => vec![ptp(82)],
        LIMITED => vec![
            ptp(83),
            json!({
                "type": "bandwidth",
                "ingressRate": BITS_PER_SECOND, "ingressBurst": BITS_PER_SECOND / 10,
                "egressRate": BITS_PER_SECOND, "egressBurst": BITS_PER_SECOND / 10,
            }),
        ],
        MACVLAN => vec![on_parent("macvlan", "bridge", 84)],
        IPVLAN => vec![on_parent("ipvlan", "l2", 85)],
        IPVLAN_L3 => vec![on_parent("ipvlan", "l3", 86)],
        _ => vec![on_parent("ipvlan", "l3s", 87)],
    }
}

/// Writes the networks into `directory`, and gives what containerd's configuration says of the
/// handlers; `cri` is the name of its plugin.
pub fn write(directory: &Path, cri: &str) -> String {
    let mut text = String::new();
    for handler in [BRIDGE, PTP, LIMITED, MACVLAN, IPVLAN, IPVLAN_L3, IPVLAN_L3S] {
        let network = directory.join(format!("net-{handler}"));
        fs::create_dir(&network).unwrap();
        let list = json!({
            "cniVersion": "1.0.0", "name": handler, "plugins": plugins(handler, directory),
        });
        fs::write(network.join("10-test.conflist"), list.to_string()).unwrap();
        text += &format!(
            "[plugins.\"{cri}\".containerd.runtimes.{handler}]\n\
             runtime_type = \"io.containerd.caisson.v2\"\n\
             pod_annotations = [\"io.caisson.*\"]\n\
             cni_conf_dir = \"{}\"\n",
            network.display()
        );
    }
    text
}
