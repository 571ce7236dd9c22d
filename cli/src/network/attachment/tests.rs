//! Records, addresses, and what netavark is told.

use super::*;
use crate::network::store::Subnet;

struct Fixture {
    _directory: tempfile::TempDir,
    config: Config,
    networks: Networks,
    network: Network,
}

fn fixture(subnet: &str) -> Fixture {
    let directory = tempfile::tempdir().unwrap();
    let config = Config {
        state_dir: directory.path().to_owned(),
        run_dir: directory.path().join("run"),
        ..Config::default()
    };
    let networks = Networks::of(&config);
    drop(networks.lock().unwrap());
    let network = Network {
        name: "one".to_owned(),
        id: "1d".repeat(32),
        created: std::time::SystemTime::UNIX_EPOCH,
        bridge: "caisson7".to_owned(),
        subnets: vec![Subnet::of(subnet.parse().unwrap())],
        internal: false,
        dns: true,
        mtu: None,
        labels: std::collections::BTreeMap::new(),
    };
    Fixture {
        _directory: directory,
        config,
        networks,
        network,
    }
}

fn container(id: &str, address: Option<&str>) -> Container {
    let mut container = Container::new(
        id.to_owned(),
        format!("name-{id}"),
        String::new(),
        String::new(),
        vec![],
    );
    container.request.network = Wanted {
        mode: Mode::Networks(vec!["one".to_owned()]),
        addresses: address
            .map(|text| text.parse().unwrap())
            .into_iter()
            .collect(),
        ports: crate::network::ports::publish("127.0.0.1:81:80").unwrap(),
        ..Wanted::default()
    };
    container
}

fn attachment(container: &Container, endpoints: Vec<Endpoint>) -> Attachment {
    Attachment {
        boot: boot(),
        container: container.id.clone(),
        name: container.name.clone(),
        endpoints,
        ports: vec![],
        input: Value::Null,
        is_left: false,
    }
}

#[test]
fn addresses_are_given_once_until_there_are_none() {
    let fixture = fixture("192.0.2.0/29");
    let networks = [fixture.network.clone()];
    let mut others = Vec::new();
    for last in 2..7 {
        let container = container(&last.to_string(), None);
        let made = endpoints(&container, &networks, &others).unwrap();
        assert_eq!(
            made[0].addresses[0].to_string(),
            format!("192.0.2.{last}/29")
        );
        assert_eq!(made[0].mac, format!("0e:ca:c0:00:02:{last:02x}"));
        others.push(attachment(&container, made));
    }
    let full = endpoints(&container("8", None), &networks, &others).unwrap_err();
    assert!(full.to_string().contains("no address left in 192.0.2.0/29"));
    for (address, word) in [
        ("192.0.2.3", "container name-3 has it"),
        ("192.0.2.1", "not an address"),
        ("192.0.2.7", "not an address"),
        ("198.51.100.2", "not an address"),
        ("fd00::2", "not an address"),
    ] {
        let wanted = container("9", Some(address));
        let error = endpoints(&wanted, &networks, &others)
            .unwrap_err()
            .to_string();
        assert!(error.contains(word), "{address}: {error}");
    }
    others.remove(1);
    let again = endpoints(&container("9", Some("192.0.2.3")), &networks, &others).unwrap();
    assert_eq!(again[0].addresses[0].to_string(), "192.0.2.3/29");
    let mut same = container("9", Some("192.0.2.3"));
    same.request.network.mac = Some("0e:ca:c0:00:02:02".to_owned());
    let error = endpoints(&same, &networks, &others)
        .unwrap_err()
        .to_string();
    assert!(error.contains("name-2"), "{error}");
}

#[test]
fn netavark_is_told_all() {
    let fixture = fixture("192.0.2.0/24");
    let networks = [fixture.network.clone()];
    let container = container("0123456789abcdef", Some("192.0.2.9"));
    let made = endpoints(&container, &networks, &[]).unwrap();
    let told = input(
        &container,
        &networks,
        &made,
        &container.request.network.ports,
    );
    assert_eq!(told["networks"]["one"]["static_ips"], json!(["192.0.2.9"]));
    assert_eq!(told["networks"]["one"]["aliases"], json!(["0123456789ab"]));
    assert_eq!(told["network_info"]["one"]["dns_enabled"], true);
    assert_eq!(
        told["network_info"]["one"]["subnets"],
        json!([{ "subnet": "192.0.2.0/24", "gateway": "192.0.2.1" }])
    );
    assert_eq!(
        told["port_mappings"],
        json!([{ "host_ip": "127.0.0.1", "host_port": 81, "container_port": 80, "protocol": "tcp", "range": 1 }])
    );
}

#[test]
fn records_are_found_again() {
    let fixture = fixture("192.0.2.0/24");
    let container = container("a", None);
    let record = attachment(&container, vec![]);
    fs::write(
        path(&fixture.networks, "a"),
        serde_json::to_vec(&record).unwrap(),
    )
    .unwrap();
    fs::write(path(&fixture.networks, "b"), "damaged").unwrap();
    fs::write(fixture.networks.attached().join("new"), "unfinished").unwrap();
    assert_eq!(Attachment::all(&fixture.networks).unwrap(), [record]);
}

#[test]
fn after_a_restart_of_the_host_there_is_only_the_record() {
    let fixture = fixture("192.0.2.0/24");
    let mut record = attachment(&container("a", None), vec![]);
    record.boot = "an earlier one".to_owned();
    let path = path(&fixture.networks, "a");
    fs::write(&path, serde_json::to_vec(&record).unwrap()).unwrap();
    // What a file system that outlives the host has kept of the namespace.
    let namespace = namespace_of(&fixture.config, "a");
    fs::create_dir_all(namespace.parent().unwrap()).unwrap();
    fs::write(&namespace, []).unwrap();
    detach(&fixture.config, "a").unwrap();
    assert!(!path.exists() && !namespace.exists() && !fixture.config.run_dir.exists());
    detach(&fixture.config, "a").unwrap();
}

/// A record is what takes things away. netavark is either not there or refuses what it is told here.
#[test]
fn what_netavark_has_not_taken_away_is_tried_once_more() {
    let fixture = fixture("192.0.2.0/24");
    let mut record = attachment(&container("a", None), vec![]);
    record.input = json!({});
    write(&fixture.networks, &record).unwrap();
    assert!(Attachment::read(&fixture.config, "a").is_some());
    detach(&fixture.config, "a").unwrap_err();
    let left = Attachment::all(&fixture.networks).unwrap();
    assert!(left[0].is_left && left[0].input == record.input);
    assert!(!namespace_of(&fixture.config, "a").exists());
    // The container does not run, so it has nothing to show.
    assert_eq!(Attachment::read(&fixture.config, "a"), None);
    detach(&fixture.config, "a").unwrap();
    assert!(Attachment::all(&fixture.networks).unwrap().is_empty());
}
