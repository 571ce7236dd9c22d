//! Debian's redis, nginx and iperf3 in a guest, under load over the pod's network.

use caisson_tests::{Command, Host, Image, Layer, seconds, until};

use super::{Pod, Site, image, named_by};
use crate::{
    containerd::{daemon::Version, networks, with_containerd},
    cri::client::{Cri, container},
};

with_containerd!(two: [redis_and_nginx_under_load]);

const IMAGE: &str = "docker.io/library/services:1";

const NGINX: &str = "user root; error_log stderr; pid /tmp/nginx.pid; worker_processes 1;
events { worker_connections 256; }
http {
    access_log off;
    server { listen 8080 backlog=256; listen [::]:8080 backlog=256; root /www; }
}
";

/// Starts all.
const START: &str = "mkdir -p /www /var/log/nginx /var/lib/nginx
    yes 'a line of text' | head -c 20000 >/www/data
    redis-server --save '' --protected-mode no >/dev/null & iperf3 -s >/dev/null &
    exec nginx -e stderr -c /net/nginx.conf -g 'daemon off;'";

/// Gets /data over several connections at a time, each of which is kept, and checks every answer.
const GET: &str = r#"
import http.client, sys, threading
address, expected, wrong = sys.argv[1], b"a line of text\n" * 1334, []
expected = expected[:20000]
def get():
    try:
        connection = http.client.HTTPConnection(address, 8080, timeout=60)
        for _ in range(125):
            connection.request("GET", "/data")
            answer = connection.getresponse()
            if answer.status != 200 or answer.read() != expected:
                wrong.append(answer.status)
    except Exception as error:
        wrong.append(error)
threads = [threading.Thread(target=get) for _ in range(16)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
if wrong:
    sys.exit(f"{wrong}")
print("2000 answers")
"#;

fn services() -> Image {
    let programs = Layer::new()
        .programs(&[
            "/usr/bin/redis-server",
            "/usr/bin/redis-cli",
            "/usr/bin/redis-benchmark",
            "/usr/sbin/nginx",
            "/usr/bin/iperf3",
        ])
        .file("net/nginx.conf", 0o644, NGINX);
    let mut all = image().clone().layer(programs);
    all.name = IMAGE.to_owned();
    all
}

/// A client of iperf3; bits a second that arrived, and the part of datagrams that did not, percent.
#[track_caller]
fn iperf(address: &str, flags: &[&str]) -> (f64, f64) {
    let words = [&["iperf3", "-J", "-t", "2", "-c", address], flags].concat();
    // The server does not listen for a moment between two clients.
    let answer = until(seconds(3.0), || {
        let finished = Command::new(&words).within(60.0).run();
        (finished.code() == 0).then(|| finished.json())
    });
    let answer = answer.expect("iperf3 is served");
    let end = &answer["end"];
    let sum = if end["sum_received"].is_object() {
        &end["sum_received"]
    } else {
        &end["sum"]
    };
    let number = |key: &str| sum[key].as_f64().unwrap_or(0.0);
    (number("bits_per_second"), number("lost_percent"))
}

fn redis_and_nginx_under_load(version: Version) {
    let host = Host::claim();
    let cri = Cri::start(&host, version);
    let site = Site::new(&cri, &[]);
    cri.daemon.import_for_cri(&services());
    let pod = Pod::start(&cri, networks::BRIDGE, "services", named_by("10.81.0.1"));
    let config = cri.pod("services");
    let mut servers = container("servers", START);
    servers.image.as_mut().unwrap().image = IMAGE.to_owned();
    let servers = cri.run(&pod.id, &config, servers);
    let [four, six] = [&pod.addresses[0], &pod.addresses[1]];
    let redis = |words: &[&str]| Command::new([&["redis-cli", "-h", four], words].concat()).run();
    let up = until(seconds(10.0), || {
        redis(&["ping"]).stdout().starts_with("PONG").then_some(())
    });
    assert!(up.is_some(), "{:?}", cri.log(&config, "servers"));

    for (address, clients) in [(four, "20"), (six, "50")] {
        let words = [
            "redis-benchmark",
            "-h",
            address,
            "-n",
            "1500",
            "-c",
            clients,
            "-q",
            "incr",
            "n",
        ];
        Command::new(words).within(60.0).run().ok();
    }
    redis(&["get", "n"]).expect_stdout("3000\n");
    // In the guest itself.
    cri.output(
        &servers,
        "redis-benchmark -n 500 -c 10 -q incr n >/dev/null",
    );
    redis(&["get", "n"]).expect_stdout("3500\n");

    let script = host.scratch().join("get.py");
    std::fs::write(&script, GET).unwrap();
    for address in [four, six] {
        Command::new(["python3", script.to_str().unwrap(), address])
            .within(60.0)
            .run()
            .expect_stdout("2000 answers\n");
    }
    // Much over one connection, checked, and many at a time.
    site.ask(8_000_000, &[four]);
    for flags in [&["-P", "8"][..], &["-P", "8", "-R"]] {
        let (bits, _) = iperf(four, flags);
        assert!(bits > 1e6, "{flags:?}: {bits}");
    }
    for flags in [&["-u", "-b", "2M"][..], &["-u", "-b", "2M", "-R"]] {
        let (bits, lost) = iperf(four, flags);
        assert!(
            bits > 1e6 && lost < 20.0,
            "{flags:?}: {bits}, {lost} % lost"
        );
    }
    cri.remove_pod(&pod.id);
}
