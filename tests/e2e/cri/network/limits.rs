//! The limits that a pod asks for.

use std::{collections::HashMap, time::Instant};

use caisson_tests::Host;

use super::{Pod, Site};
use crate::{
    containerd::{daemon::Version, networks, with_containerd},
    cri::client::Cri,
};

with_containerd!(two: [annotations_limit_interfaces]);

fn annotations_limit_interfaces(version: Version) {
    const BYTES: usize = 1_000_000;
    const RATE: usize = 400_000;
    let host = Host::claim();
    let cri = Cri::start(&host, version);
    let _site = Site::new(&cri, &[]);
    let annotated = |name: &str, value: &str| {
        HashMap::from([(format!("io.caisson.network-{name}"), value.to_owned())])
    };
    let time = |pod: &Pod| {
        let begin = Instant::now();
        pod.ask(&cri, BYTES, &["10.81.0.1"]);
        begin.elapsed().as_secs_f64()
    };
    let free = Pod::start(&cri, networks::BRIDGE, "free", |_| {});
    let unlimited = time(&free);
    cri.remove_pod(&free.id);
    let least = (BYTES - RATE / 10) as f64 / RATE as f64;
    for name in ["rx-bytes-per-second", "tx-bytes-per-second"] {
        let pod = Pod::start(&cri, networks::BRIDGE, name, |config| {
            config.annotations = annotated(name, &RATE.to_string());
        });
        let limited = time(&pod);
        println!("{name}: {BYTES} bytes take {limited:.1} s, and {unlimited:.1} s without");
        assert!(limited >= least, "{name}: {limited} s; at least {least} s");
        cri.remove_pod(&pod.id);
    }
    let mut config = cri.pod("wrong");
    config.annotations = annotated("tx-packets-per-second", "many");
    let refused = cri.try_run_pod_by(networks::BRIDGE, &config).unwrap_err();
    let message = refused.message();
    assert!(
        message.contains("io.caisson.network-tx-packets-per-second") && message.contains("many"),
        "{message}"
    );
}
