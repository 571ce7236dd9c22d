//! Interfaces of the pod's network namespace in the guest. The namespace is the VMM's, as docker
//! finds it by the process id of a task.

use std::io::{Read, Write};
use std::net::TcpStream;

use caisson_tests::{Command, Host, seconds, until};

use crate::configuration::with_files;

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

/// Gives a namespace an interface `name` with the addresses; the host's end has `host`. As docker does
/// it has no IPv6 unless it has such an address, and as CNI's plugins do it hears no routers.
fn connect(vmm: i32, link: &str, name: &str, mac: &str, host: &str, addresses: &[&str]) {
    ip(&format!(
        "link add {link} type veth peer name {link}p address {mac} mtu 1400"
    ));
    ip(&format!("address add {host} dev {link}"));
    ip(&format!("link set {link} mtu 1400 up"));
    ip(&format!("link set {link}p netns {vmm} name {name}"));
    let run = |words: &[&str]| {
        let vmm = vmm.to_string();
        Command::new([&["nsenter", "-t", &vmm, "-n"], words].concat())
            .run()
            .ok();
    };
    let inside = |words: &str| {
        let words: Vec<_> = ["ip"].into_iter().chain(words.split(' ')).collect();
        run(&words);
    };
    let settings = if addresses.iter().any(|address| address.contains(':')) {
        "echo 0 > accept_ra && echo 0 > autoconf"
    } else {
        "echo 1 > disable_ipv6"
    };
    let script = format!("cd /proc/sys/net/ipv6/conf/{name} && {settings}");
    run(&["sh", "-c", &script]);
    for address in addresses {
        inside(&format!("address add {address} dev {name}"));
    }
    inside(&format!("link set {name} up"));
}

/// The interface that [`dial`] leads to.
fn connect_first(vmm: i32) {
    connect(
        vmm,
        "caisson-t0",
        "eth0",
        "02:00:00:00:05:02",
        "10.205.0.1/24",
        &["10.205.0.2/24"],
    );
}

/// Sends to a port of the guest that is read to the end, and gives the time.
fn time_to_send(port: u16, bytes: usize) -> f64 {
    let begin = std::time::Instant::now();
    let mut stream = dial(port);
    stream.write_all(&vec![0; bytes]).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut count = String::new();
    stream.read_to_string(&mut count).unwrap();
    assert_eq!(count.trim(), bytes.to_string());
    begin.elapsed().as_secs_f64()
}

#[test]
fn the_configuration_limits_interfaces() {
    const BYTES: usize = 800_000;
    let host = Host::claim();
    let links = Links;
    let image = host.busybox();
    let mut times = Vec::new();
    for config in ["", "network_rx_bytes_per_second = 300000\n"] {
        let server = format!("run -d --name net --network none {image} nc -ll -p 80 -e wc -c");
        with_files(&host, &[("config.toml", config)], &server).ok();
        let vmm = host.processes_of("caisson-vmm")[0];
        connect_first(vmm);
        times.push(time_to_send(80, BYTES));
        host.caisson(["rm", "-f", "net"]).ok();
        // The link goes with the VMM's namespace.
        let gone = until(seconds(5.0), || {
            (!std::path::Path::new("/sys/class/net/caisson-t0").exists()).then_some(())
        });
        assert!(gone.is_some());
    }
    drop(links);
    println!("{BYTES} bytes take {times:?} s");
    let least = (BYTES - 30_000) as f64 / 300_000.0;
    assert!(
        times[1] >= least && times[0] < times[1],
        "{times:?}: {least}"
    );
}

#[test]
fn interfaces_that_come_and_go_do_so_in_the_guest() {
    let host = Host::claim();
    let links = Links;
    host.caisson([
        "run",
        "-d",
        "--network",
        "none",
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
    connect_first(vmm);
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
    let settings = |name: &str| {
        inside(&format!(
            "cd /proc/sys/net/ipv6/conf/{name} && cat disable_ipv6 accept_ra autoconf"
        ))
    };
    settings("eth0").expect_stdout("1\n1\n1\n");
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
    settings("net1").expect_stdout("0\n0\n0\n");
    inside("ping -c 1 -W 5 10.206.0.1").ok();
    ip("link delete caisson-t1");
    wait_for("no net1", "! ip link show dev net1");
    inside("ping -c 1 -W 5 10.205.0.1").ok();

    host.caisson(["rm", "-f", "net"]).ok();
    drop(links);
}

/// How many of the VMM's descriptors are /dev/vhost-net.
fn vhosts_of(vmm: i32) -> usize {
    let fds = std::fs::read_dir(format!("/proc/{vmm}/fd")).unwrap();
    fds.filter_map(|fd| std::fs::read_link(fd.ok()?.path()).ok())
        .filter(|target| target.as_os_str() == "/dev/vhost-net")
        .count()
}

/// A server in a microVM of two processors, so of two queue pairs, that takes bytes at port 80 and
/// gives as many at port 81. Checks who moves the frames, and that they arrive.
fn exchange(host: &Host, config: &str, vhosts: usize) {
    const BYTES: usize = 2_000_000;
    let links = Links;
    let image = host.busybox();
    let server = format!(
        "run -d --name net --cpus 2 --network none {image} sh -c \"nc -ll -p 81 -e head -c {BYTES} /dev/zero & exec nc -ll -p 80 -e wc -c\""
    );
    with_files(host, &[("config.toml", config)], &server).ok();
    let vmm = host.processes_of("caisson-vmm")[0];
    connect_first(vmm);
    time_to_send(80, BYTES);
    let mut received = Vec::new();
    dial(81).read_to_end(&mut received).unwrap();
    assert_eq!(received.len(), BYTES);
    assert_eq!(vhosts_of(vmm), vhosts, "{config}");
    host.caisson([
        "exec",
        "net",
        "ping",
        "-c",
        "3",
        "-s",
        "8000",
        "-W",
        "5",
        "10.205.0.1",
    ])
    .ok();
    ip("link delete caisson-t0");
    let gone = until(seconds(10.0), || {
        let listed = host.caisson(["exec", "net", "ls", "/sys/class/net"]);
        (listed.stdout() == "lo\n").then_some(())
    });
    assert!(gone.is_some(), "the guest still has the interface");
    let closed = until(seconds(5.0), || (vhosts_of(vmm) == 0).then_some(()));
    assert!(closed.is_some(), "the VMM still has the kernel's queues");
    host.caisson(["rm", "-f", "net"]).ok();
    drop(links);
}

#[test]
fn the_hosts_kernel_moves_frames_where_it_may() {
    let host = Host::claim();
    Command::new(["modprobe", "vhost_net"]).run().ok();
    exchange(&host, "vhost_net = true\n", 2);
    // A limit is the VMM's.
    let limited = "vhost_net = true\nnetwork_rx_packets_per_second = 1000000\n";
    exchange(&host, limited, 0);
    Command::new(["rmmod", "vhost_net"]).run().ok();
    exchange(&host, "vhost_net = true\n", 0);
}
