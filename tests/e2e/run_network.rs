//! Networks of the command line: `caisson run --network`, `-p`, `caisson network`, `caisson port`.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::OnceLock;

use caisson_tests::{Command, Finished, Host, Image, Layer, seconds, until};
use rustix::process::{Pid, Signal, kill_process};

/// A web server of Debian's, and a program that measures TCP and UDP.
fn servers(host: &Host) -> &'static str {
    const NAME: &str = "caisson.test/servers:1";
    const CONFIG: &str = "user root; daemon off; pid /tmp/pid; error_log stderr;\n\
        events {}\n\
        http { access_log off; client_body_temp_path /tmp/b; proxy_temp_path /tmp/p;\n\
        fastcgi_temp_path /tmp/f; uwsgi_temp_path /tmp/u; scgi_temp_path /tmp/s;\n\
        server { listen 80; listen [::]:80; location / { return 200 \"served by $hostname\\n\"; } } }\n";
    static LOADED: OnceLock<()> = OnceLock::new();
    LOADED.get_or_init(|| {
        let layer = Layer::new()
            .programs(&["/usr/sbin/nginx", "/usr/bin/iperf3"])
            .file("etc/nginx.conf", 0o644, CONFIG)
            .dir("var/log", 0o755)
            .dir("var/log/nginx", 0o755);
        let mut image = Image::busybox(NAME).layer(layer).uncompressed();
        image.config["ExposedPorts"] = serde_json::json!({ "80/tcp": {} });
        host.load(&image);
    });
    NAME
}

/// What a web server answers, once it does.
fn get(address: &str) -> String {
    let mut last = String::new();
    let answer = until(seconds(10.0), || {
        let ask = || {
            let address: SocketAddr = address.parse().unwrap();
            let mut stream = TcpStream::connect_timeout(&address, seconds(2.0))?;
            stream.set_read_timeout(Some(seconds(2.0)))?;
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok::<_, std::io::Error>(answer)
        };
        match ask() {
            Ok(answer) if !answer.is_empty() => Some(answer),
            Ok(_) => None,
            Err(error) => {
                last = error.to_string();
                None
            }
        }
    });
    let answer = answer.unwrap_or_else(|| panic!("{address} does not answer: {last}"));
    answer
        .rsplit("\r\n\r\n")
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// The host's own address, which is no loopback.
fn own_address() -> String {
    let listed = Command::new(["ip", "-4", "-o", "address", "show", "scope", "global"])
        .run()
        .ok()
        .stdout();
    listed
        .lines()
        .filter(|line| !line.contains("caisson"))
        .find_map(|line| line.split_whitespace().nth(3)?.split('/').next())
        .expect("the host has an address")
        .to_owned()
}

/// Nothing on the host tells of a container any more. The links, mounts and files are the leak
/// check's.
fn expect_no_rules(subnet: &str) {
    let rules = Command::new(["nft", "list", "table", "inet", "netavark"])
        .run()
        .stdout();
    assert!(!rules.contains(subnet), "{rules}");
    let attached = fs::read_dir("/var/lib/caisson/networks/attached");
    assert_eq!(attached.unwrap().count(), 0);
}

/// In the default network, which [`Host::sh`] leaves out.
fn sh<'a>(host: &Host, flags: impl IntoIterator<Item = &'a str>, script: &'a str) -> Finished {
    host.sh(["--network", "bridge"].into_iter().chain(flags), script)
}

/// The first bytes of a container's address: those of its network.
fn network_of(host: &Host, container: &str) -> String {
    let settings = &host.inspect(container)["NetworkSettings"];
    let address = settings["IPAddress"].as_str().unwrap().to_owned();
    address.rsplit_once('.').unwrap().0.to_owned()
}

fn run<'a>(
    host: &Host,
    flags: impl IntoIterator<Item = &'a str>,
    rest: impl IntoIterator<Item = &'a str>,
) -> Finished {
    let words = ["run", "-d"].into_iter().chain(flags).chain(rest);
    host.caisson(words)
}

#[test]
fn ports_are_published_and_the_host_is_reached() {
    let host = Host::claim();
    let image = servers(&host);
    let script = "iperf3 -s -D; exec nginx -c /etc/nginx.conf";
    let flags = [
        "--name",
        "web",
        "-h",
        "box",
        "-P",
        "--expose",
        "9000/udp",
        "-p",
        "18080:80",
        "-p",
        "127.0.0.1:18081:80",
        "-p",
        "0.0.0.0:18082:80",
        "-p",
        "[::]:18082:80",
        "-p",
        "15201:5201",
        "-p",
        "15201:5201/udp",
    ];
    run(&host, flags, [image, "sh", "-c", script]).ok();
    let own = own_address();
    for address in [
        "127.0.0.1:18080",
        "127.0.0.1:18081",
        "127.0.0.1:18082",
        &format!("{own}:18080"),
        &format!("{own}:18082"),
    ] {
        assert_eq!(get(address), "served by box\n", "{address}");
    }
    // Published on the loopback alone.
    let other: SocketAddr = format!("{own}:18081").parse().unwrap();
    assert!(TcpStream::connect_timeout(&other, seconds(2.0)).is_err());
    let measured = Command::new([
        "iperf3",
        "-c",
        "127.0.0.1",
        "-p",
        "15201",
        "-u",
        "-n",
        "20K",
        "-J",
    ])
    .run()
    .ok();
    assert!(measured.json()["end"]["sum"]["packets"].as_u64() > Some(0));

    let ports = host.caisson(["port", "web"]).ok().stdout();
    for line in [
        "80/tcp -> 0.0.0.0:18080\n",
        "80/tcp -> 127.0.0.1:18081\n",
        "80/tcp -> 0.0.0.0:18082\n",
        "5201/udp -> 0.0.0.0:15201\n",
        "9000/udp -> 0.0.0.0:",
    ] {
        assert!(ports.contains(line), "{line:?} in {ports}");
    }
    // The network has no IPv6, of which the pair's other half would be.
    assert!(!ports.contains("[::]"), "{ports}");
    sh(&host, ["-p", "[::]:18083:80"], "true").expect_error(&["[::]:18083", "family"]);
    sh(&host, ["-p", "[::1]:18083:80"], "true").expect_error(&["[::1]:18083", "127.0.0.1"]);
    host.caisson(["port", "web", "5201/udp"])
        .expect_stdout("0.0.0.0:15201\n");
    host.caisson(["port", "web", "81"])
        .expect_error(&["81/tcp"]);
    host.caisson(["ps"])
        .expect_in_stdout("127.0.0.1:18081->80/tcp");
    let about = host.inspect("web");
    let bindings = &about["NetworkSettings"]["Ports"]["80/tcp"];
    assert_eq!(bindings[0]["HostPort"], "18080", "{about}");
    assert_eq!(about["HostConfig"]["NetworkMode"], "caisson");

    // What is taken, by a container or by a program of the host, is told and leaves nothing.
    let program = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = program.local_addr().unwrap().port();
    for taken in [18080, port] {
        let flag = format!("{taken}:80");
        sh(&host, ["-p", &flag], "true")
            .expect_error(&[&taken.to_string(), "in use"])
            .expect_code(125);
    }
    // From inside to a server of the host, by the gateway.
    let gateway = about["NetworkSettings"]["Gateway"].as_str().unwrap();
    let asked = host
        .command(["exec", "web", "nc", gateway, &port.to_string()])
        .start();
    let (mut stream, from) = program.accept().unwrap();
    stream.write_all(b"from the host").unwrap();
    drop(stream);
    asked.finish().expect_stdout("from the host");
    let address = about["NetworkSettings"]["IPAddress"].as_str().unwrap();
    assert_eq!(from.ip().to_string(), address);

    let network = network_of(&host, "web");
    host.caisson(["rm", "-f", "web"]).ok();
    expect_no_rules(&network);
    TcpListener::bind("0.0.0.0:18080").expect("the port is free again");
}

#[test]
fn containers_of_a_network_find_each_other_by_name() {
    let host = Host::claim();
    let image = servers(&host);
    host.caisson(["network", "create", "--ipv6", "-o", "mtu=1400", "app"])
        .ok();
    host.caisson([
        "network",
        "create",
        "--internal",
        "--subnet",
        "10.222.0.0/29",
        "back",
    ])
    .ok();
    let serve = [image, "nginx", "-c", "/etc/nginx.conf"];
    let flags = [
        "--name",
        "web",
        "-h",
        "web-host",
        "--network",
        "app",
        "--network-alias",
        "www",
        "-p",
        "0.0.0.0:18084:80",
        "-p",
        "[::]:18084:80",
    ];
    run(&host, flags, serve).ok();
    host.caisson(["port", "web"])
        .expect_stdout("80/tcp -> 0.0.0.0:18084\n80/tcp -> [::]:18084\n");
    assert_eq!(get("127.0.0.1:18084"), "served by web-host\n");
    let flags = [
        "--name",
        "db",
        "--network",
        "app",
        "--network",
        "back",
        "--ip6",
        "fd00::1",
    ];
    run(&host, flags, serve).expect_error(&["--ip6", "one --network"]);
    let flags = ["--name", "db", "--network", "back", "--network", "app"];
    run(&host, flags, serve).ok();

    let inside =
        |container: &str, script: &str| host.caisson(["exec", container, "sh", "-c", script]);
    for name in ["web", "www"] {
        let script = format!("until wget -qO- -T 20 http://{name}/; do sleep 1; done");
        inside("db", &script).expect_stdout("served by web-host\n");
    }
    inside("db", "ping -6 -c 1 -W 20 web").ok();
    let about = host.inspect("db");
    let address = about["NetworkSettings"]["Networks"]["app"]["IPAddress"]
        .as_str()
        .unwrap();
    assert_eq!(about["NetworkSettings"]["IPAddress"], "10.222.0.2");
    inside(
        "web",
        "cat /sys/class/net/eth0/mtu; nslookup db | grep -c ^Address",
    )
    .expect_in_stdout("1400\n");
    inside("db", "ls /sys/class/net | tr '\\n' ' '").expect_stdout("eth0 eth1 lo ");

    // Another network has neither the names nor a way there; an address is given once.
    let script = format!(
        "nslookup web >/dev/null 2>&1 && echo found; nc -w 3 {address} 80 </dev/null && echo reached; echo done"
    );
    sh(&host, [], &script).expect_stdout("done\n");
    host.sh(["--network", "back", "--ip", "10.222.0.2"], "true")
        .expect_error(&["10.222.0.2", "db has it"])
        .expect_code(125);
    host.sh(["--network", "back", "--ip", "10.223.0.2"], "true")
        .expect_error(&["10.223.0.2", "back"]);
    host.sh(
        [
            "--network",
            "back",
            "--ip",
            "10.222.0.6",
            "--mac-address",
            "02:00:00:00:07:06",
        ],
        "ip -4 -o address show dev eth0; cat /sys/class/net/eth0/address; ip route",
    )
    .expect_in_stdout("10.222.0.6/29")
    .expect_in_stdout("02:00:00:00:07:06\n10.222.0.0/29");
    sh(&host, ["--network-alias", "other"], "true").expect_error(&["--network-alias", "default"]);

    host.caisson(["network", "rm", "app"])
        .expect_error(&["app", "db, web"]);
    host.caisson(["network", "rm", "caisson"])
        .expect_error(&["default"]);
    host.caisson(["network", "inspect", "app"])
        .expect_in_stdout("\"Name\": \"web\"");
    let network = network_of(&host, "web");
    host.caisson(["rm", "-f", "web", "db"]).ok();
    expect_no_rules(&network);
    host.caisson(["network", "rm", "app"])
        .expect_stdout("app\n");
    host.caisson(["network", "prune", "-f"])
        .expect_in_stdout("back");
    host.caisson(["network", "ls"]).expect_in_stdout("caisson");
    host.sh(["--network", "app"], "true")
        .expect_error(&["no such network: app"])
        .expect_code(125);
}

#[test]
fn a_container_joins_the_microvm_of_another() {
    let host = Host::claim();
    let image = servers(&host);
    let serve = [image, "nginx", "-c", "/etc/nginx.conf"];
    run(
        &host,
        ["--name", "web", "-h", "box", "-p", "18080:80"],
        serve,
    )
    .ok();
    // It listens now.
    assert_eq!(get("127.0.0.1:18080"), "served by box\n");
    host.sh(
        ["--network", "container:web"],
        "hostname; wget -qO- -T 20 http://127.0.0.1/; grep -c box /etc/hosts; ls /sys/class/net | tr '\\n' ' '",
    )
    .expect_stdout("box\nserved by box\n1\neth0 lo ");
    assert_eq!(host.processes_of("caisson-vmm").len(), 1);

    run(
        &host,
        ["--name", "side", "--network", "container:web"],
        [image, "sleep", "1000"],
    )
    .ok();
    assert_eq!(host.processes_of("caisson-vmm").len(), 1);
    host.caisson(["exec", "side", "wget", "-qO-", "http://127.0.0.1/"])
        .expect_stdout("served by box\n");
    host.sh(["--network", "container:side", "-p", "1:1"], "true")
        .expect_error(&["--publish", "container:"]);
    // Its monitor killed, a container ends, and the other one stays.
    let monitor = host
        .processes_of("caisson")
        .into_iter()
        .max()
        .expect("the monitor of the last container");
    kill_process(Pid::from_raw(monitor).unwrap(), Signal::KILL).unwrap();
    host.wait_for_status("side", "exited");
    assert_eq!(get("127.0.0.1:18080"), "served by box\n");
    host.caisson(["exec", "web", "sh", "-c", "! ps | grep -q '[s]leep'"])
        .ok();
    host.caisson(["rm", "side"]).ok();
    // With the first one all end.
    run(
        &host,
        ["--name", "side", "--network", "container:web"],
        [image, "sleep", "1000"],
    )
    .ok();
    host.caisson(["rm", "-f", "web"]).ok();
    host.wait_for_status("side", "exited");
    host.sh(["--network", "container:side"], "true")
        .expect_error(&["no such container"]);
    host.caisson(["rm", "side"]).ok();
}

#[test]
fn the_hosts_network_and_nonsense_are_refused() {
    let host = Host::claim();
    for (flags, words) in [
        (&["--network", "host"][..], &["stack of its own", "-p"][..]),
        (&["--network", "none", "-p", "80:80"], &["--publish"]),
        (&["--network", "bridge", "-p", "http:80"], &["http:80"]),
        (
            &["--network", "bridge", "-p", "198.51.100.7:80:80"],
            &["198.51.100.7", "no address"],
        ),
        (&["--network", "container:gone"], &["gone"]),
    ] {
        host.sh(flags.iter().copied(), "true")
            .expect_error(words)
            .expect_code(125);
    }
    sh(
        &host,
        [
            "--dns",
            "192.0.2.53",
            "--dns-search",
            "example.test",
            "--dns-option",
            "ndots:3",
            "--add-host",
            "db:10.1.2.3",
            "--add-host",
            "me:host-gateway",
            "-h",
            "box",
        ],
        "cat /etc/resolv.conf; grep -E 'db|me|box' /etc/hosts; ip route | grep -o 'via [0-9.]*'",
    )
    .expect_in_stdout("search example.test\nnameserver 192.0.2.53\noptions ndots:3\n")
    .expect_in_stdout("10.1.2.3\tdb\n");
    expect_no_rules("dnat ip to");
}

#[test]
fn whoever_is_killed_no_network_is_left() {
    let host = Host::claim();
    let start = |name: &str| {
        run(
            &host,
            ["--name", name, "-p", "18080:80"],
            [host.busybox(), "sleep", "1000"],
        )
        .ok()
    };
    start("one");
    let network = network_of(&host, "one");
    for program in ["caisson", "containerd-shim-caisson-v2", "caisson-vmm"] {
        for pid in host.processes_of(program) {
            kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
        }
    }
    // Whoever looks next cleans up: the port can be had again.
    start("two");
    host.caisson(["rm", "one"]).ok();
    let [shim] = host.processes_of("containerd-shim-caisson-v2")[..] else {
        panic!("there is one shim");
    };
    kill_process(Pid::from_raw(shim).unwrap(), Signal::KILL).unwrap();
    host.wait_for_status("two", "exited");
    host.caisson(["rm", "two"]).ok();
    expect_no_rules(&network);
}

/// Puts something that is no program over one while it lives.
struct Hidden(&'static str);

impl Hidden {
    fn new(path: &'static str) -> Self {
        Command::new(["mount", "--bind", "/dev/null", path])
            .run()
            .ok();
        Self(path)
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        Command::new(["umount", self.0]).run();
    }
}

#[test]
fn without_netavark_there_is_no_network_and_a_clear_error() {
    let host = Host::claim();
    let hidden = Hidden::new("/usr/lib/podman/netavark");
    host.caisson(["run", "--rm", host.busybox(), "true"])
        .expect_error(&["netavark", "not installed", "--network none"])
        .expect_code(125);
    host.caisson(["check"])
        .expect_in_stdout("netavark is missing");
    host.sh(["--network", "none"], "echo runs")
        .expect_stdout("runs\n");
    drop(hidden);
    let _hidden = Hidden::new("/usr/lib/podman/aardvark-dns");
    host.caisson(["network", "create", "names"]).ok();
    host.sh(["--network", "names"], "true")
        .expect_error(&["aardvark-dns", "not installed"]);
    host.caisson(["network", "rm", "names"]).ok();
    sh(&host, [], "echo runs").expect_stdout("runs\n");
}
