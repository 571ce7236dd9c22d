//! Interfaces of the pod's network namespace in the guest. The namespace is the VMM's, as docker
//! finds it by the process id of a task.

use std::io::{Read, Write};
use std::net::TcpStream;

use caisson_tests::{Command, Host, seconds, until};

fn ip(words: &str) {
    Command::new(["ip"].into_iter().chain(words.split(' ')))
        .run()
        .ok();
}

/// Takes the host's ends of the links along when the test ends.
struct Links;

impl Drop for Links {
    fn drop(&mut self) {
        for link in ["caisson-t0", "caisson-t1"] {
            let _ = std::process::Command::new("ip")
                .args(["link", "delete", link])
                .stderr(std::process::Stdio::null())
                .status();
        }
    }
}

/// A connection to a server in the guest, which may not listen yet.
fn dial(port: u16) -> TcpStream {
    let stream = until(seconds(10.0), || {
        TcpStream::connect(("10.205.0.2", port)).ok()
    });
    let stream = stream.expect("the server in the guest listens");
    stream.set_read_timeout(Some(seconds(10.0))).unwrap();
    stream
}

/// Gives a namespace an interface `name` with the addresses; the host's end has `host`.
fn connect(vmm: i32, link: &str, name: &str, mac: &str, host: &str, addresses: &[&str]) {
    ip(&format!(
        "link add {link} type veth peer name {link}p address {mac} mtu 1400"
    ));
    ip(&format!("address add {host} dev {link}"));
    ip(&format!("link set {link} mtu 1400 up"));
    ip(&format!("link set {link}p netns {vmm} name {name}"));
    let inside = |words: &str| {
        let enter = ["nsenter", "-t", &vmm.to_string(), "-n", "ip"].map(str::to_owned);
        let words = words.split(' ').map(str::to_owned);
        Command::new(enter.into_iter().chain(words)).run().ok();
    };
    for address in addresses {
        inside(&format!("address add {address} dev {name}"));
    }
    inside(&format!("link set {name} up"));
}

#[test]
fn interfaces_that_come_and_go_do_so_in_the_guest() {
    let host = Host::claim();
    let links = Links;
    host.caisson([
        "run",
        "-d",
        "--name",
        "net",
        host.busybox(),
        "sleep",
        "1000",
    ])
    .ok();
    let [vmm] = host.processes_of("caisson-vmm")[..] else {
        panic!("there is one VMM");
    };
    connect(
        vmm,
        "caisson-t0",
        "eth0",
        "02:00:00:00:05:02",
        "10.205.0.1/24",
        &["10.205.0.2/24"],
    );
    let inside = |script: &str| host.caisson(["exec", "net", "sh", "-c", script]);
    let wait_for = |what: &str, script: &str| {
        let seen = until(seconds(10.0), || (inside(script).code() == 0).then_some(()));
        assert!(
            seen.is_some(),
            "{what}: {}",
            inside("ip address; ip route").stdout()
        );
    };
    wait_for("eth0", "ip address show dev eth0 | grep -q 10.205.0.2/24");
    inside("cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu")
        .expect_stdout("02:00:00:00:05:02\n1400\n");
    inside("ip route").expect_stdout("10.205.0.0/24 dev eth0 scope link  src 10.205.0.2 \n");
    inside("grep -c 10.205.0.2 /etc/hosts").expect_stdout("1\n");
    inside("ping -c 2 -W 5 10.205.0.1").ok();

    // Both ways, more than a queue holds at a time.
    let server = host
        .command([
            "exec",
            "net",
            "sh",
            "-c",
            "nc -l -p 80 | md5sum; head -c 3000000 /dev/zero | nc -l -p 81",
        ])
        .start();
    let data: Vec<u8> = (0..3_000_000u32).map(|n| (n * 31 % 251) as u8).collect();
    let expected = Command::new(["md5sum"]).stdin(data.clone()).run().stdout();
    let mut stream = dial(80);
    stream.write_all(&data).unwrap();
    drop(stream);
    let mut received = Vec::new();
    dial(81).read_to_end(&mut received).unwrap();
    assert_eq!(received, vec![0; 3_000_000]);
    server.finish().expect_stdout(&expected);

    // Another one, and IPv6.
    connect(
        vmm,
        "caisson-t1",
        "net1",
        "02:00:00:00:06:02",
        "10.206.0.1/24",
        &["10.206.0.2/24", "fd06::2/64"],
    );
    wait_for("net1", "ip address show dev net1 | grep -q fd06::2/64");
    inside("ping -c 1 -W 5 10.206.0.1").ok();
    ip("link delete caisson-t1");
    wait_for("no net1", "! ip link show dev net1");
    inside("ping -c 1 -W 5 10.205.0.1").ok();

    host.caisson(["rm", "-f", "net"]).ok();
    drop(links);
}
