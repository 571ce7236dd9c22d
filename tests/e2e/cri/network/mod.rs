//! Pods on the networks of the real CNI plugins.

mod faults;
mod limits;
mod plugins;
mod services;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use caisson_tests::{Command, Finished, Image, Layer, Running, seconds, until};
use k8s_cri::v1::{DnsConfig, PodSandboxConfig};
use serde_json::{Value, json};

use super::client::{Cri, container};
use crate::{containerd::networks, storage::python};

const SERVE: &str = include_str!("serve.py");
const ASK: &str = include_str!("ask.py");
const IMAGE: &str = "docker.io/library/network:1";

/// Where Debian has the plugins.
const PLUGINS: &str = "/usr/lib/cni";

/// ip, getent and python with [`SERVE`] and [`ASK`].
fn image() -> &'static Image {
    static MADE: OnceLock<Image> = OnceLock::new();
    MADE.get_or_init(|| {
        let layer = Layer::new()
            .programs(&["/usr/sbin/ip", "/usr/bin/getent"])
            .dir("net", 0o755)
            .file("net/serve.py", 0o644, SERVE)
            .file("net/ask.py", 0o644, ASK);
        let layer = python(layer, &[], &["socket", "selectors"]);
        Image::busybox(IMAGE).layer(layer).uncompressed()
    })
}

/// What the tests have on the host: the parent of macvlans and ipvlans with a peer, and servers.
struct Site {
    directory: PathBuf,
    _server: Running,
}

/// The other end of [`networks::PARENT`].
const PEER: &str = "tests-peer";

impl Site {
    /// `addresses` are those of the peer.
    fn new(cri: &Cri<'_>, addresses: &[&str]) -> Self {
        cri.daemon.import_for_cri(image());
        Self::clean();
        ip(&format!(
            "link add {} type veth peer name {PEER}",
            networks::PARENT
        ));
        for link in [networks::PARENT, PEER] {
            ip(&format!("link set {link} up"));
        }
        for address in addresses {
            let nodad = if address.contains(':') { " nodad" } else { "" };
            ip(&format!("address add {address} dev {PEER}{nodad}"));
        }
        let directory = cri.daemon.host.scratch().to_owned();
        for (name, text) in [("serve.py", SERVE), ("ask.py", ASK)] {
            fs::write(directory.join(name), text).unwrap();
        }
        let serve = directory.join("serve.py").display().to_string();
        let mut server = Command::new(["python3", &serve, "dns"])
            .within(600.0)
            .start();
        server.wait_for_stdout("ready");
        Self {
            directory,
            _server: server,
        }
    }

    /// Asks echoes from the host.
    #[track_caller]
    fn ask(&self, bytes: usize, targets: &[&str]) {
        let script = self.directory.join("ask.py").display().to_string();
        let bytes = bytes.to_string();
        Command::new([&["python3", &script, &bytes], targets].concat())
            .run()
            .ok();
    }

    fn clean() {
        for link in [networks::PARENT, networks::BRIDGE_NAME] {
            Command::new(["ip", "link", "delete", link]).run();
        }
        for table in [["bridge", "tests"], ["inet", "tests"]] {
            Command::new(["nft", "delete", "table", table[0], table[1]]).run();
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        // A command that hangs panics, and a second panic would end all tests.
        let _ = std::panic::catch_unwind(Self::clean);
    }
}

#[track_caller]
fn ip(words: &str) {
    Command::new(["ip"].into_iter().chain(words.split(' ')))
        .run()
        .ok();
}

/// A pod whose container `serve` runs [`SERVE`].
struct Pod {
    id: String,
    app: String,
    /// IPv4, IPv6.
    addresses: Vec<String>,
    /// Its network namespace on the host.
    namespace: String,
}

impl Pod {
    #[track_caller]
    fn start(
        cri: &Cri<'_>,
        handler: &str,
        name: &str,
        change: impl FnOnce(&mut PodSandboxConfig),
    ) -> Self {
        let mut config = cri.pod(name);
        change(&mut config);
        let id = cri.try_run_pod_by(handler, &config).unwrap();
        let mut serve = container("serve", "exec python3 /net/serve.py");
        serve.image.as_mut().unwrap().image = IMAGE.to_owned();
        let app = cri.run(&id, &config, serve);
        let ready = until(seconds(20.0), || {
            (cri.log(&config, "serve") == ["stdout F ready"]).then_some(())
        });
        assert!(ready.is_some(), "{:?}", cri.log(&config, "serve"));
        let (addresses, namespace) = cri.network_of(&id);
        Self {
            id,
            app,
            addresses,
            namespace,
        }
    }

    /// Asks echoes from the guest.
    #[track_caller]
    fn ask(&self, cri: &Cri<'_>, bytes: usize, targets: &[&str]) {
        let targets = targets.join(" ");
        cri.output(&self.app, &format!("python3 /net/ask.py {bytes} {targets}"));
    }

    /// Runs a program in its network namespace on the host.
    fn inside(&self, words: &str) -> Finished {
        let enter = ["nsenter".to_owned(), format!("--net={}", self.namespace)];
        Command::new(enter.into_iter().chain(words.split(' ').map(str::to_owned))).run()
    }

    /// Waits until the guest has what its namespace has.
    #[track_caller]
    fn is_as_its_namespace(&self, cri: &Cri<'_>) -> BTreeSet<String> {
        let script = LAYOUT
            .map(|words| format!("/usr/sbin/ip -j {words}"))
            .join(" && echo && ");
        let (mut wanted, mut seen) = (BTreeSet::new(), BTreeSet::new());
        let equal = until(seconds(10.0), || {
            let parts = LAYOUT.map(|words| self.inside(&format!("ip -j {words}")).ok().stdout());
            wanted = layout(parts.iter().map(String::as_str));
            let answer = cri.output(&self.app, &script);
            seen = layout(answer.lines().filter(|line| !line.is_empty()));
            (wanted == seen).then_some(())
        });
        assert!(
            equal.is_some(),
            "not in the guest: {:#?}\nin the guest alone: {:#?}",
            wanted.difference(&seen).collect::<Vec<_>>(),
            seen.difference(&wanted).collect::<Vec<_>>()
        );
        seen
    }
}

/// Commands of ip(8) that tell all of a network.
const LAYOUT: [&str; 4] = [
    "address show",
    "-4 route show",
    "-6 route show",
    "neigh show nud permanent",
];

/// What is the same in a guest and its namespace, of the answers to [`LAYOUT`].
fn layout<'a>(answers: impl Iterator<Item = &'a str>) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for answer in answers {
        let answer: Value = serde_json::from_str(answer).unwrap_or_else(|_| panic!("{answer}"));
        for item in answer.as_array().unwrap() {
            describe(item, &mut all);
        }
    }
    all
}

fn describe(item: &Value, all: &mut BTreeSet<String>) {
    let Some(name) = item["ifname"].as_str() else {
        let keys = [
            "dst", "gateway", "dev", "prefsrc", "metric", "metrics", "scope", "lladdr",
        ];
        let told = keys.map(|key| format!("{key} {}", item[key]));
        all.insert(told.join(" "));
        return;
    };
    if name == "lo" || name.starts_with("caisson") {
        return;
    }
    if !item["flags"].as_array().unwrap().contains(&json!("UP")) {
        return;
    }
    let has = |flag: &str| item["flags"].as_array().unwrap().contains(&json!(flag));
    all.insert(format!(
        "{name} {} mtu {} no arp {}",
        item["address"],
        item["mtu"],
        has("NOARP")
    ));
    for address in item["addr_info"].as_array().unwrap() {
        let (local, prefix) = (&address["local"], &address["prefixlen"]);
        all.insert(format!("{name} {local}/{prefix}"));
    }
}

/// Runs a plugin as a meta-plugin does for further interfaces of a pod, and gives its result.
#[track_caller]
fn plugin(command: &str, pod: &Pod, interface: &str, config: &Value) -> Value {
    let kind = config["type"].as_str().unwrap();
    let finished = Command::new([Path::new(PLUGINS).join(kind)])
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", &pod.id)
        .env("CNI_NETNS", &pod.namespace)
        .env("CNI_IFNAME", interface)
        .env("CNI_PATH", PLUGINS)
        .stdin(config.to_string())
        .run()
        .ok();
    serde_json::from_str(&finished.stdout()).unwrap_or_default()
}

/// Each of two pods has what its namespace has, and reaches the other, the host's addresses and
/// its name server; the host reaches them.
#[track_caller]
fn reach(cri: &Cri<'_>, site: &Site, pods: [&Pod; 2], host: [&str; 2]) {
    for pod in pods {
        let layout = pod.is_as_its_namespace(cri);
        for address in &pod.addresses {
            let found = layout
                .iter()
                .any(|line| line.contains(&format!("\"{address}\"")));
            assert!(found, "{address}: {layout:#?}");
        }
        assert!(
            layout
                .iter()
                .any(|line| line.contains(&format!("mtu {} ", networks::MTU)))
        );
    }
    let [a, b] = pods.map(|pod| pod.addresses.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!((a.len(), b.len()), (2, 2), "IPv4 and IPv6");
    pods[0].ask(cri, 300_000, &[&b[..], &host].concat());
    pods[1].ask(cri, 1000, &a);
    site.ask(300_000, &[a, b].concat());
    let names = "getent ahostsv4 service.tests && getent ahostsv6 service.tests";
    let names = cri.output(&pods[0].app, names);
    assert!(
        names.contains("10.99.0.7") && names.contains("fd99::7"),
        "{names}"
    );
    let other = cri
        .exec(&pods[0].app, "getent hosts other.tests", 0)
        .unwrap();
    assert_eq!(other.exit_code, 2, "no such name");
}

/// A pod's configuration whose name server is this one.
fn named_by(server: &str) -> impl FnOnce(&mut PodSandboxConfig) {
    move |config| {
        config.dns_config = Some(DnsConfig {
            servers: vec![server.to_owned()],
            ..Default::default()
        });
    }
}
