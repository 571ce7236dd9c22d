//! docker with Caisson, as containerd's runtime and as an OCI runtime, by a dockerd of the test's own.

use std::{fs, net::UdpSocket, thread};

use caisson_tests::{Command, Finished, Host, Image, Running, Terminal, seconds, until};
use rustix::process::Signal;
use serde_json::json;

/// containerd's shim, without a program between.
const SHIM: &str = "io.containerd.caisson.v2";

/// The program, called by containerd's shim for runc.
const OCI: &str = "caisson";

/// The bridge of the daemon's default network, and its address.
const BRIDGE: &str = "caisson-docker";
const GATEWAY: &str = "10.99.7.1";

struct Docker {
    daemon: Option<Running>,
    socket: String,
    host: Host,
}

impl Docker {
    /// A daemon with an image `busybox`.
    fn start() -> Self {
        let host = Host::claim();
        let path = |name: &str| host.scratch().join(name).display().to_string();
        for words in [
            vec!["ip", "link", "add", BRIDGE, "type", "bridge"],
            vec!["ip", "address", "add", "10.99.7.1/24", "dev", BRIDGE],
        ] {
            Command::new(words).run().ok();
        }
        let config = json!({
            "runtimes": { OCI: { "path": host.program() } },
            "data-root": path("data"),
            "exec-root": path("exec"),
            "pidfile": path("pid"),
            "hosts": [format!("unix://{}", path("s"))],
            "bridge": BRIDGE,
            "group": "root",
        });
        fs::write(host.scratch().join("daemon.json"), config.to_string()).unwrap();
        let programs = format!(
            "{}:/usr/sbin:/usr/bin:/sbin:/bin",
            host.prefix().join("bin").display()
        );
        let daemon = Command::new(["dockerd", "--config-file", &path("daemon.json")])
            .env("PATH", programs)
            .within(600.0)
            .start();
        let docker = Self {
            daemon: Some(daemon),
            socket: format!("unix://{}", path("s")),
            host,
        };
        let up = until(seconds(30.0), || {
            (docker.run(&["version"]).code() == 0).then_some(())
        });
        assert!(up.is_some(), "dockerd does not answer");
        let archive = docker.host.scratch().join("busybox.tar");
        fs::write(&archive, Image::busybox("x").layers[0].tar()).unwrap();
        docker
            .run(&["import", &archive.display().to_string(), "busybox"])
            .ok();
        docker
    }

    /// An image saved by `caisson`.
    fn load_saved(&self, image: &str) {
        let archive = self.host.scratch().join("saved.tar");
        let path = archive.display().to_string();
        self.host.caisson(["save", "-o", &path, image]).ok();
        self.run(&["load", "-i", &path])
            .ok()
            .expect_in_stdout(image);
        let told = self.host.caisson(["image", "inspect", image]).ok().json();
        assert_eq!(
            self.inspect(image, "{{.Id}}"),
            told[0]["Id"].as_str().unwrap()
        );
    }

    fn words(&self, words: &[&str]) -> Vec<String> {
        let mut all = ["docker", "--host", &self.socket]
            .map(str::to_owned)
            .to_vec();
        all.extend(words.iter().map(|word| (*word).to_owned()));
        all
    }

    fn run(&self, words: &[&str]) -> Finished {
        Command::new(self.words(words)).within(60.0).run()
    }

    fn inspect(&self, name: &str, format: &str) -> String {
        self.run(&["inspect", name, "--format", format]).ok().line()
    }

    fn interfaces(&self, name: &str) -> String {
        self.run(&["exec", name, "ls", "/sys/class/net"])
            .ok()
            .stdout()
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let all = self.run(&["ps", "-a", "-q"]).stdout();
        for id in all.lines() {
            self.run(&["rm", "-f", id]);
        }
        if let Some(daemon) = self.daemon.take() {
            daemon.signal(Signal::TERM);
            let finished = daemon.finish();
            if std::thread::panicking() {
                let log = finished.stderr();
                let lines: Vec<&str> = log.lines().collect();
                let tail = lines.len().saturating_sub(40);
                eprintln!("--- dockerd\n{}", lines[tail..].join("\n"));
            }
        }
        Command::new(["ip", "link", "delete", BRIDGE]).run();
    }
}

#[test]
fn containers_run_by_both_ways() {
    let docker = Docker::start();
    docker.load_saved(docker.host.busybox());
    for runtime in [SHIM, OCI] {
        let run = |flags: &[&str], words: &[&str]| {
            let mut all = vec!["run", "--rm", "--runtime", runtime, "--network", "none"];
            all.extend(flags);
            all.push("busybox");
            all.extend(words);
            Command::new(docker.words(&all))
                .stdin("typed\n")
                .within(60.0)
                .run()
        };
        let finished = run(
            &["-i"],
            &["sh", "-c", "cat; uname -r; echo err >&2; exit 7"],
        );
        let finished = finished.expect_code(7);
        let out = finished.stdout();
        assert!(
            out.starts_with("typed\n") && out.contains("caisson"),
            "{finished}"
        );
        assert_eq!(finished.stderr(), "err\n");
        run(&[], &["no-such-program"]).expect_code(127);
    }
}

#[test]
fn a_container_is_managed() {
    let docker = Docker::start();
    let script = "trap 'echo term; exit 3' TERM; echo started; while :; do sleep 0.2; done";
    docker
        .run(&[
            "run",
            "-d",
            "--name",
            "one",
            "--runtime",
            SHIM,
            "--network",
            "none",
            "-m",
            "200m",
            "busybox",
            "sh",
            "-c",
            script,
        ])
        .ok();
    let finished = docker
        .run(&["exec", "one", "sh", "-c", "echo in exec; exit 5"])
        .expect_code(5);
    assert_eq!(finished.stdout(), "in exec\n");
    let mut terminal = Terminal::start(docker.words(&[
        "exec",
        "-it",
        "one",
        "sh",
        "-c",
        "tty; read x; echo got $x; exit 2",
    ]));
    terminal.expect("/dev/pts/");
    terminal.send("word\r");
    terminal.expect("got word");
    assert_eq!(terminal.finish(), 2);
    let stats = docker.run(&["stats", "--no-stream", "--format", "{{json .}}", "one"]);
    assert_ne!(stats.ok().json()["MemUsage"], "0B / 0B");
    // The host has one process of it: never one that happens to have a number of the guest's.
    let top = docker.run(&["top", "one", "-eo", "pid,comm"]).ok().stdout();
    let commands: Vec<&str> = top
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().nth(1))
        .collect();
    assert_eq!(commands, ["caisson-vmm"], "{top}");
    docker.run(&["pause", "one"]).ok();
    assert_eq!(docker.inspect("one", "{{.State.Status}}"), "paused");
    docker.run(&["unpause", "one"]).ok();
    docker.run(&["update", "--pids-limit", "33", "one"]).ok();
    docker
        .run(&["exec", "one", "cat", "/sys/fs/cgroup/pids.max"])
        .expect_stdout("33\n");
    docker.run(&["stop", "-t", "60", "one"]).ok();
    assert_eq!(docker.inspect("one", "{{.State.ExitCode}}"), "3");
    docker
        .run(&["logs", "one"])
        .expect_stdout("started\nterm\n");
    docker
        .run(&[
            "run",
            "--name",
            "big",
            "--runtime",
            SHIM,
            "--network",
            "none",
            "-m",
            "64m",
            "busybox",
            "tail",
            "/dev/zero",
        ])
        .expect_code(137);
    assert_eq!(docker.inspect("big", "{{.State.OOMKilled}}"), "true");
}

/// A name server of the host's, as long as the test program runs, for names that are not docker's:
/// each has the address 192.0.2.53, and no other kind of record (RFC 1035, section 4).
fn serve_names() {
    const TYPE_A: &[u8] = &[0, 1, 0, 1];
    let socket = UdpSocket::bind((GATEWAY, 53)).unwrap();
    thread::spawn(move || {
        let mut query = [0; 512];
        while let Ok((length, from)) = socket.recv_from(&mut query) {
            let name = query[12..length]
                .iter()
                .position(|byte| *byte == 0)
                .unwrap();
            let question = &query[12..12 + name + 5];
            let is_a = question.ends_with(TYPE_A);
            let counts = [0, 1, 0, u8::from(is_a), 0, 0, 0, 0];
            let mut answer = [&query[..2], &[0x81, 0x80], &counts, question].concat();
            if is_a {
                let record = [&[0xc0, 12], TYPE_A, &[0, 0, 0, 60, 0, 4], &[192, 0, 2, 53]];
                answer.extend(record.concat());
            }
            socket.send_to(&answer, from).unwrap();
        }
    });
}

#[test]
fn networks_reach_the_guest() {
    let docker = Docker::start();
    serve_names();
    let serve = "mkdir /w; echo from inside > /w/index.html; exec httpd -f -p 80 -h /w";
    docker
        .run(&[
            "run",
            "-d",
            "--name",
            "web",
            "--runtime",
            SHIM,
            "--dns",
            GATEWAY,
            "-p",
            "127.0.0.1:18080:80",
            "busybox",
            "sh",
            "-c",
            serve,
        ])
        .ok();
    let fetched = || {
        let answer = until(seconds(10.0), || {
            let fetch = [
                "busybox",
                "wget",
                "-q",
                "-O",
                "-",
                "http://127.0.0.1:18080/",
            ];
            let finished = Command::new(fetch).run();
            (finished.code() == 0).then(|| finished.stdout())
        });
        assert_eq!(answer.as_deref(), Some("from inside\n"));
    };
    fetched();
    docker
        .run(&["exec", "web", "ping", "-c", "1", "-W", "10", GATEWAY])
        .ok();
    // The interface is the first one's, which loses nothing by the attempt.
    let join = [
        "run",
        "--rm",
        "--runtime",
        SHIM,
        "--network",
        "container:web",
        "busybox",
        "true",
    ];
    docker.run(&join).expect_error(&["another microVM"]);
    fetched();
    docker.run(&["network", "create", "second"]).ok();
    docker.run(&["network", "connect", "second", "web"]).ok();
    let has = |names: &str| {
        let seen = until(seconds(10.0), || {
            (docker.interfaces("web") == names).then_some(())
        });
        assert!(seen.is_some(), "{}", docker.interfaces("web"));
    };
    has("eth0\neth1\nlo\n");
    // Docker's names, and those that it asks others for, from one that was connected later, and from
    // one that began so.
    let ask = [
        "sh",
        "-c",
        "ping -c 1 -W 10 web && nslookup -type=a outside.test",
    ];
    let found = until(seconds(10.0), || {
        let finished = docker.run(&[&["exec", "web"], &ask[..]].concat());
        finished.stdout().contains("192.0.2.53").then_some(())
    });
    assert!(
        found.is_some(),
        "{}",
        docker.run(&[
            "exec",
            "web",
            "sh",
            "-c",
            "cat /etc/resolv.conf; nslookup outside.test",
        ])
    );
    let other = [
        "run",
        "--rm",
        "--runtime",
        SHIM,
        "--dns",
        GATEWAY,
        "--network",
        "second",
        "busybox",
    ];
    docker
        .run(&[&other, &ask[..]].concat())
        .ok()
        .expect_in_stdout("192.0.2.53");
    docker.run(&["network", "disconnect", "second", "web"]).ok();
    has("eth0\nlo\n");
    docker.run(&["network", "rm", "second"]).ok();
    docker.run(&["kill", "web"]).ok();
    docker.run(&["start", "web"]).ok();
    fetched();
    docker
        .run(&[
            "run",
            "--rm",
            "--runtime",
            OCI,
            "busybox",
            "ping",
            "-c",
            "1",
            "-W",
            "10",
            GATEWAY,
        ])
        .ok();
}
