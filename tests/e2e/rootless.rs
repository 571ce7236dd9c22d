//! `caisson` by users who are not root.

use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use caisson_tests::{Command, Finished, Host, Image, Layer, seconds, until};
use rustix::process::{Pid, Signal, kill_process};

/// A user of the host for one test.
struct User {
    name: &'static str,
    uid: u32,
    home: PathBuf,
    runtime: PathBuf,
    program: OsString,
}

impl User {
    /// Makes one who may use KVM, with a range of ids. Of an earlier test that failed nothing stays.
    fn add(host: &Host, name: &'static str) -> Self {
        Command::new(["userdel", "--force", "--remove", name]).run();
        Command::new(["useradd", "--create-home", "--groups", "kvm", name])
            .run()
            .ok();
        let home = Path::new("/home").join(name);
        let uid = fs::metadata(&home).unwrap().uid();
        let runtime = PathBuf::from(format!("/run/user/{uid}"));
        fs::create_dir_all(&runtime).unwrap();
        chown(&runtime, Some(uid), Some(uid)).unwrap();
        fs::set_permissions(&runtime, fs::Permissions::from_mode(0o700)).unwrap();
        Self {
            name,
            uid,
            home,
            runtime,
            program: host.program().into_os_string(),
        }
    }

    /// A command with the user's groups, as after a login.
    fn command<'a>(&self, words: impl IntoIterator<Item = &'a str>) -> Command {
        let scale = std::env::var("CAISSON_TIMEOUT_SCALE").unwrap_or_else(|_| "1".to_owned());
        let mut all: Vec<OsString> = ["runuser", "-u", self.name, "--", "env", "-i", "-C"]
            .map(OsString::from)
            .to_vec();
        all.push(self.home.clone().into());
        all.push("PATH=/usr/local/bin:/usr/bin:/bin".into());
        all.push(format!("HOME={}", self.home.display()).into());
        all.push(format!("XDG_RUNTIME_DIR={}", self.runtime.display()).into());
        all.push(format!("CAISSON_TIMEOUT_SCALE={scale}").into());
        all.extend(words.into_iter().map(OsString::from));
        Command::new(all)
    }

    fn caisson<'a>(&'a self, words: impl IntoIterator<Item = &'a str>) -> Finished {
        let program = self.program.to_str().unwrap();
        self.command(std::iter::once(program).chain(words)).run()
    }

    /// Loads an image into the user's own store.
    fn load<'a>(&self, image: &'a Image) -> &'a str {
        let layout = self.home.join("layout");
        image.write_layout(&layout);
        let home = layout.to_str().unwrap();
        Command::new(["chown", "-R", self.name, home]).run().ok();
        self.caisson(["load", "-i", home]).ok();
        fs::remove_dir_all(&layout).unwrap();
        &image.name
    }

    /// `caisson run --rm` of a script without a network.
    fn sh<'a>(&'a self, flags: impl IntoIterator<Item = &'a str>, script: &'a str) -> Finished {
        let mut words = vec!["run", "--rm", "--network", "none"];
        words.extend(flags);
        words.extend([BUSYBOX, "sh", "-c", script]);
        self.caisson(words)
    }

    fn state(&self) -> PathBuf {
        self.home.join(".local/share/caisson")
    }

    /// First and number of the user's ids.
    fn range(&self) -> (u32, u32) {
        let text = fs::read_to_string("/etc/subuid").unwrap();
        let line = text
            .lines()
            .find(|line| line.split(':').next() == Some(self.name));
        let mut fields = line.expect("a range of ids").split(':').skip(1);
        let mut number = || fields.next().unwrap().parse().unwrap();
        (number(), number())
    }

    /// Processes of the user and of the user's ids.
    fn processes(&self) -> Vec<String> {
        let (first, count) = self.range();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let status = fs::read_to_string(entry.path().join("status")).unwrap_or_default();
            let uid = field(&status, "Uid:").and_then(|uid| uid.parse::<u32>().ok());
            if uid.is_some_and(|uid| uid == self.uid || (first..first + count).contains(&uid)) {
                let name = field(&status, "Name:").unwrap_or_default();
                found.push(format!("{} {name}", entry.file_name().display()));
            }
        }
        found
    }

    /// Nothing of any container is left, but for images and volumes.
    fn expect_nothing_left(&self) {
        let mut left = Vec::new();
        let clean = until(seconds(5.0), || {
            left = self.processes();
            let run = self.runtime.join("caisson");
            if run.exists() {
                left.push(run.display().to_string());
            }
            for directory in ["containers", "networks/attached"] {
                let entries = fs::read_dir(self.state().join(directory));
                left.extend(
                    entries
                        .into_iter()
                        .flatten()
                        .flatten()
                        .map(|entry| entry.path().display().to_string()),
                );
            }
            left.is_empty().then_some(())
        });
        assert!(clean.is_some(), "{} has left {left:#?}", self.name);
    }
}

impl Drop for User {
    fn drop(&mut self) {
        Command::new(["userdel", "--force", "--remove", self.name]).run();
        let _ = fs::remove_dir_all(&self.runtime);
    }
}

const BUSYBOX: &str = "caisson.test/busybox:latest";

fn busybox() -> Image {
    Image::busybox(BUSYBOX)
}

/// The first word after `name` in a text like /proc/PID/status.
fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()
}

fn status_of(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/status")).unwrap()
}

#[test]
fn a_container_runs_and_leaves_nothing() {
    let host = Host::claim();
    let ann = User::add(&host, "ann");
    ann.load(&busybox());
    let out = ann.sh(
        ["-h", "box", "-m", "128m"],
        "id -u; hostname; echo err >&2; exit 7",
    );
    let out = out.expect_code(7);
    assert_eq!(
        (out.stdout(), out.stderr()),
        ("0\nbox\n".into(), "err\n".into())
    );
    ann.expect_nothing_left();
    let data = fs::metadata(ann.state()).unwrap();
    assert_eq!((data.uid(), data.mode() & 0o777), (ann.uid, 0o700));
}

#[test]
fn the_vmm_is_jailed_as_roots_is() {
    let host = Host::claim();
    let ann = User::add(&host, "ann");
    ann.load(&busybox());
    let directory = ann.home.join("shared");
    ann.command(["mkdir", "shared"]).run().ok();
    let share = format!("{}:/shared", directory.display());
    let words = [
        "run",
        "-d",
        "--name",
        "one",
        "--network",
        "none",
        "-v",
        &share,
    ];
    ann.caisson(words.into_iter().chain([BUSYBOX, "sleep", "1000"]))
        .ok();
    let (first, count) = ann.range();
    let [vmm] = host.processes_of("caisson-vmm")[..] else {
        panic!("one VMM");
    };
    let status = status_of(vmm);
    let uid: u32 = field(&status, "Uid:").unwrap().parse().unwrap();
    assert!((first..first + count).contains(&uid), "{status}");
    for (name, value) in [("CapEff:", 0), ("CapPrm:", 0), ("CapBnd:", 0)] {
        let found = u64::from_str_radix(field(&status, name).unwrap(), 16).unwrap();
        assert_eq!(found, value, "{status}");
    }
    assert_eq!(field(&status, "Seccomp:"), Some("2"), "{status}");
    assert_eq!(field(&status, "NoNewPrivs:"), Some("1"), "{status}");
    let link = |pid: i32, name: &str| fs::read_link(format!("/proc/{pid}/ns/{name}")).unwrap();
    let [shim] = host.processes_of("containerd-shim-caisson-v2")[..] else {
        panic!("one shim");
    };
    for name in ["user", "mnt", "net", "ipc", "uts", "pid"] {
        assert_ne!(link(vmm, name), link(shim, name), "{name}");
    }
    let root = fs::read_dir(format!("/proc/{vmm}/root")).unwrap();
    assert_eq!(root.count(), 0, "its root is empty");
    // The file server and the shim are the user, with capabilities over the user's ids alone.
    for program in ["caisson-fs", "containerd-shim-caisson-v2"] {
        for pid in host.processes_of(program) {
            let status = status_of(pid);
            assert_eq!(field(&status, "Uid:").unwrap(), ann.uid.to_string());
            assert_ne!(link(pid, "user"), link(1, "user"), "{program}");
        }
    }
    ann.caisson(["rm", "-f", "one"]).ok();
    ann.expect_nothing_left();
}

#[test]
fn verbs_and_volumes() {
    let host = Host::claim();
    let ann = User::add(&host, "ann");
    ann.load(&busybox());
    ann.command(["mkdir", "shared"]).run().ok();
    let share = format!("{}/shared:/shared", ann.home.display());
    let script = "echo started; id -u > /shared/by-root; echo kept > /data/file; \
                  chown 1000:1000 /data/file; touch /done; exec sleep 1000";
    let flags = [
        "run",
        "-d",
        "--name",
        "one",
        "--network",
        "none",
        "-v",
        &share,
    ];
    let words = flags
        .into_iter()
        .chain(["-v", "keep:/data", BUSYBOX, "sh", "-c", script]);
    ann.caisson(words).ok();
    let ready = until(seconds(10.0), || {
        let asked = ann.caisson(["exec", "one", "ls", "/done"]);
        (asked.code() == 0).then_some(())
    });
    assert!(ready.is_some());
    ann.caisson(["ps"]).ok().expect_in_stdout("one");
    ann.caisson(["logs", "one"]).expect_stdout("started\n");
    ann.caisson(["exec", "-e", "A=b", "one", "sh", "-c", "echo $A; exit 3"])
        .expect_code(3);
    // What root of the container writes is the user's.
    let written = fs::metadata(ann.home.join("shared/by-root")).unwrap();
    assert_eq!(written.uid(), ann.uid);
    // What others of the container write has an id of the user's range.
    let volume = ann.state().join("volumes/keep/_data/file");
    assert_eq!(fs::metadata(volume).unwrap().uid(), ann.range().0 + 999);
    ann.caisson(["cp", "one:/data/file", "copied"]).ok();
    assert_eq!(fs::read(ann.home.join("copied")).unwrap(), b"kept\n");
    let inspected = ann.caisson(["inspect", "one"]).ok().json();
    assert_eq!(inspected[0]["HostConfig"]["NetworkMode"], "none");
    ann.caisson(["ps", "--sandboxes"])
        .ok()
        .expect_in_stdout("caisson.");
    ann.caisson(["stop", "-t", "0", "one"]).ok();
    ann.caisson(["rm", "one"]).ok();
    ann.sh(["-v", "keep:/data"], "cat /data/file")
        .expect_stdout("kept\n");
    ann.caisson(["volume", "rm", "keep"]).ok();
    assert!(!ann.state().join("volumes/keep").exists());
    ann.expect_nothing_left();
}

#[test]
fn users_do_not_meet() {
    let host = Host::claim();
    let (ann, bob) = (User::add(&host, "ann"), User::add(&host, "bob"));
    for user in [&ann, &bob] {
        user.load(&busybox());
        let words = ["run", "-d", "--name", "same", "--network", "none", BUSYBOX];
        user.caisson(words.into_iter().chain(["sleep", "1000"]))
            .ok();
    }
    let id = |user: &User| user.caisson(["ps", "-q", "--no-trunc"]).ok().line();
    let (anns, bobs) = (id(&ann), id(&bob));
    assert!(!anns.is_empty() && anns != bobs && !anns.contains('\n'));
    assert!(!host.caisson(["ps", "-a"]).ok().stdout().contains("same"));
    let store = ann.state().display().to_string();
    assert_ne!(bob.command(["ls", &store]).run().code(), 0);
    bob.caisson(["exec", &anns, "true"])
        .expect_error(&["no such container"]);
    // Neither by the place of the other's things.
    let runtime = format!("XDG_RUNTIME_DIR={}", ann.runtime.display());
    let data = format!("XDG_DATA_HOME={}/.local/share", ann.home.display());
    let program = bob.program.to_str().unwrap();
    bob.command(["env", &runtime, &data, program, "rm", "-f", &anns])
        .run()
        .expect_error(&["permission denied"]);
    ann.caisson(["exec", "same", "true"]).ok();
    for user in [&ann, &bob] {
        user.caisson(["rm", "-f", "same"]).ok();
        user.expect_nothing_left();
    }
}

#[test]
fn what_is_killed_leaves_nothing() {
    let host = Host::claim();
    let ann = User::add(&host, "ann");
    ann.load(&busybox());
    for program in ["caisson", "containerd-shim-caisson-v2", "caisson-vmm"] {
        let words = ["run", "-d", "--name", "one", BUSYBOX, "sleep", "1000"];
        ann.caisson(words).ok();
        for pid in host.processes_of(program) {
            let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL);
        }
        let ended = until(seconds(20.0), || {
            let told = ann.caisson(["inspect", "one"]).ok().json();
            (told[0]["State"]["Status"] == "exited").then_some(())
        });
        assert!(ended.is_some(), "{program}");
        ann.caisson(["rm", "one"]).ok();
        ann.expect_nothing_left();
    }
}

/// A web server of busybox', and a program that measures TCP and UDP.
fn servers() -> Image {
    let layer = Layer::new()
        .programs(&["/usr/bin/iperf3"])
        .dir("www", 0o755)
        .file("www/index.html", 0o644, "served\n");
    busybox().layer(layer).uncompressed()
}

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
        ask()
            .map_err(|error| last = error.to_string())
            .ok()
            .filter(|text| !text.is_empty())
    });
    answer.unwrap_or_else(|| panic!("{address} does not answer: {last}"))
}

/// The host's own address, which is no loopback.
fn own_address() -> String {
    let listed = Command::new(["ip", "-4", "-o", "address", "show", "dev", "eth0"]);
    let listed = listed.run().ok().stdout();
    let address = listed.split_whitespace().nth(3).unwrap();
    address.split('/').next().unwrap().to_owned()
}

#[test]
fn ports_are_published_and_the_host_is_reached() {
    let host = Host::claim();
    let ann = User::add(&host, "ann");
    ann.load(&servers());
    let own = own_address();
    let script = "iperf3 -s -D; exec httpd -f -p 80 -h /www";
    let words = [
        "run",
        "-d",
        "--name",
        "web",
        "-p",
        "8080:80",
        "-p",
        "127.0.0.1:8081:80",
        "-p",
        "5201:5201",
        "-p",
        "5201:5201/udp",
        "-p",
        "80",
        BUSYBOX,
        "sh",
        "-c",
        script,
    ];
    ann.caisson(words).ok();
    for address in ["127.0.0.1:8080", "127.0.0.1:8081", &format!("{own}:8080")] {
        assert!(get(address).ends_with("served\n"), "{address}");
    }
    let beside = TcpStream::connect((own.as_str(), 8081));
    assert!(beside.is_err(), "published on the loopback only");
    let any = ann.caisson(["port", "web", "80"]).ok().stdout();
    let any = any.lines().find(|line| !line.contains(":808")).unwrap();
    assert!(get(&any.replace("0.0.0.0", "127.0.0.1")).ends_with("served\n"));
    // Once: the server in the background has been seen to answer no second client.
    let words = ["iperf3", "-J", "-c", "127.0.0.1", "-u", "-n", "20K"];
    let told = Command::new(words).run().ok().json();
    assert!(told["end"]["sum"]["packets"].as_u64() > Some(0), "{told}");
    // The other way: to the host, by its own address and by name.
    let listener = TcpListener::bind((own.as_str(), 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let answering = std::thread::spawn(move || {
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"from the host\n").unwrap();
        }
    });
    for to in [own.as_str(), "outside"] {
        let words = [
            "run",
            "--rm",
            "--add-host",
            "outside:host-gateway",
            BUSYBOX,
            "sh",
            "-c",
        ];
        let script = format!("nc {to} {port} </dev/null");
        ann.caisson(words.into_iter().chain([script.as_str()]))
            .expect_stdout("from the host\n");
    }
    answering.join().unwrap();
    // The host's loopback is the host's.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let script = format!("nc -w 5 10.207.0.1 {port} </dev/null");
    let words = ["run", "--rm", BUSYBOX, "sh", "-c", &script];
    assert_ne!(ann.caisson(words).code(), 0);
    let settings = &ann.caisson(["inspect", "web"]).ok().json()[0];
    assert_eq!(settings["HostConfig"]["NetworkMode"], "passt");
    assert_eq!(settings["NetworkSettings"]["Gateway"], "10.207.0.1");
    // One more in its microVM.
    let words = ["run", "--rm", "--network", "container:web", BUSYBOX];
    let words = words
        .into_iter()
        .chain(["wget", "-q", "-O", "-", "http://127.0.0.1/"]);
    ann.caisson(words).expect_stdout("served\n");
    let taken = ann.caisson(["run", "--rm", "-p", "8080:80", BUSYBOX, "true"]);
    taken.expect_error(&["8080", "in use"]);
    ann.caisson(["rm", "-f", "web"]).ok();
    ann.expect_nothing_left();
    TcpListener::bind("0.0.0.0:8080").unwrap();
}

#[test]
fn what_needs_root_is_refused_with_the_reason() {
    let host = Host::claim();
    let ann = User::add(&host, "ann");
    ann.load(&busybox());
    let run = |flags: &[&'static str]| {
        let words = ["run", "--rm"]
            .iter()
            .chain(flags)
            .chain(&[BUSYBOX, "true"]);
        ann.caisson(words.copied().collect::<Vec<_>>())
    };
    run(&["-p", "80:80"]).expect_error(&["80/tcp", "ip_unprivileged_port_start", "higher"]);
    run(&["--network", "bridge"]).expect_error(&["bridge", "root", "passt", "none"]);
    run(&["--network", "mine"]).expect_error(&["mine", "root", "passt"]);
    run(&["--network", "host"]).expect_error(&["network stack of its own"]);
    run(&["--ip6", "fd00::9"]).expect_error(&["fd00::9", "passt"]);
    ann.caisson(["network", "create", "mine"])
        .expect_error(&["root", "passt"]);
    let run_by_root = host.caisson(["run", "--rm", "--network", "passt", BUSYBOX, "true"]);
    run_by_root.expect_error(&["without root", "bridge"]);
    ann.expect_nothing_left();
}

/// A file that is away until this is dropped.
struct Hidden(&'static str);

impl Hidden {
    fn new(path: &'static str) -> Self {
        fs::rename(path, format!("{path}.away")).unwrap();
        Self(path)
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        let _ = fs::rename(format!("{}.away", self.0), self.0);
    }
}

#[test]
fn what_the_host_lacks_is_told() {
    let host = Host::claim();
    let ann = User::add(&host, "ann");
    ann.load(&busybox());
    {
        let _passt = Hidden::new("/usr/bin/passt");
        let run = |network: &[&'static str]| {
            let words = ["run", "--rm"]
                .iter()
                .chain(network)
                .chain(&[BUSYBOX, "true"]);
            ann.caisson(words.copied().collect::<Vec<_>>())
        };
        run(&[]).expect_error(&["passt", "package", "--network none"]);
        ann.caisson(["check"]).expect_in_stdout("passt is missing");
        run(&["--network", "none"]).ok();
    }
    {
        let _uidmap = Hidden::new("/usr/bin/newuidmap");
        ann.caisson(["ps"])
            .expect_error(&["newuidmap", "package", "uidmap"]);
    }
    {
        let before = fs::read_to_string("/etc/subuid").unwrap();
        let others: String = before
            .lines()
            .filter(|line| !line.starts_with("ann:"))
            .map(|line| format!("{line}\n"))
            .collect();
        fs::write("/etc/subuid", others).unwrap();
        let told = ann.caisson(["ps"]);
        let checked = ann.caisson(["check"]);
        fs::write("/etc/subuid", before).unwrap();
        told.expect_error(&["ann", "/etc/subuid", "usermod --add-subuids"]);
        assert_ne!(checked.code(), 0, "{checked}");
        assert!(checked.stdout().contains("/etc/subuid"), "{checked}");
    }
    Command::new(["gpasswd", "--delete", "ann", "kvm"])
        .run()
        .ok();
    let refused = ann.sh([], "true");
    refused.expect_error(&["/dev/kvm", "permission denied", "group kvm", "usermod"]);
    ann.expect_nothing_left();
}
