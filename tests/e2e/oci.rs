//! `caisson` as an OCI runtime, on bundles: what runc's callers expect of it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use caisson_tests::{Command, Finished, Host, Image, Running, seconds, until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// Runs `create` and becomes the parent of the container's process, as conmon and containerd's runc
/// shim do; ends with its exit code.
const REAPER: &str = r#"
import ctypes, os, subprocess, sys
PR_SET_CHILD_SUBREAPER = 36
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
create = subprocess.run(sys.argv[2:])
if create.returncode:
    sys.exit(create.returncode)
_, status = os.waitpid(int(open(sys.argv[1]).read()), 0)
sys.exit(os.waitstatus_to_exitcode(status) % 256)
"#;

pub struct Oci<'a> {
    host: &'a Host,
    root: PathBuf,
}

impl<'a> Oci<'a> {
    pub fn new(host: &'a Host) -> Self {
        Self {
            host,
            root: host.scratch().join("root"),
        }
    }

    fn words(&self, words: &[&str]) -> Vec<String> {
        let mut all = vec![
            self.host.program().display().to_string(),
            "--root".to_owned(),
            self.root.display().to_string(),
        ];
        all.extend(words.iter().map(|word| (*word).to_owned()));
        all
    }

    pub fn run(&self, words: &[&str]) -> Finished {
        Command::new(self.words(words)).run()
    }

    /// A bundle with busybox that runs `script`, its config.json changed by `change`.
    pub fn bundle(&self, script: &str, change: impl FnOnce(&mut Value)) -> PathBuf {
        let path = self.host.scratch().join("bundle");
        let rootfs = path.join("rootfs");
        fs::create_dir_all(&rootfs).unwrap();
        for layer in Image::busybox("x").layers {
            Command::new(["tar", "-x", "-C", &rootfs.display().to_string()])
                .stdin(layer.tar())
                .run()
                .ok();
        }
        for directory in ["proc", "sys", "dev"] {
            fs::create_dir(rootfs.join(directory)).unwrap();
        }
        self.run(&["spec", "--bundle", &path.display().to_string()])
            .ok();
        let file = path.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(["sh", "-c", script]);
        config["root"]["readonly"] = json!(false);
        change(&mut config);
        fs::write(&file, config.to_string()).unwrap();
        path
    }

    /// Creates a container and waits until it is there. What is returned ends with it.
    pub fn create(&self, id: &str, bundle: &Path, stdin: &str) -> Running {
        let pid_file = self.pid_file(id);
        let bundle = bundle.display().to_string();
        let mut words = ["python3", "-c", REAPER].map(str::to_owned).to_vec();
        words.push(pid_file.display().to_string());
        words.extend(self.words(&[
            "create",
            "--bundle",
            &bundle,
            "--pid-file",
            &pid_file.display().to_string(),
            id,
        ]));
        let mut running = Command::new(words).stdin(stdin).within(60.0).start();
        let there = until(seconds(30.0), || {
            (pid_file.exists() || !running.is_running()).then(|| pid_file.exists())
        });
        if there != Some(true) {
            panic!("not created: {}", running.finish());
        }
        running
    }

    fn pid_file(&self, id: &str) -> PathBuf {
        self.host.scratch().join(format!("{id}.pid"))
    }

    fn pid(&self, id: &str) -> Pid {
        let text = fs::read_to_string(self.pid_file(id)).unwrap();
        Pid::from_raw(text.parse().unwrap()).unwrap()
    }

    fn status(&self, id: &str) -> String {
        let state = self.run(&["state", id]).ok().json();
        state["status"].as_str().unwrap().to_owned()
    }

    fn wait_for(&self, id: &str, status: &str) {
        let seen = until(seconds(10.0), || (self.status(id) == status).then_some(()));
        assert!(seen.is_some(), "{id} is {}, not {status}", self.status(id));
    }
}

fn keys(value: &Value) -> Vec<&str> {
    let object = value.as_object().unwrap();
    object.keys().map(String::as_str).collect()
}

#[test]
fn a_container_lives_from_create_to_delete() {
    let host = Host::claim();
    let oci = Oci::new(&host);
    let script = "cat; echo out $(hostname) $X; echo err >&2; exit 7";
    let bundle = oci.bundle(script, |config| {
        config["process"]["env"]
            .as_array_mut()
            .unwrap()
            .push(json!("X=y"));
        config["annotations"] = json!({ "a": "b" });
        config["linux"]["cgroupsPath"] = json!("/test-parent/one");
    });
    let running = oci.create("one", &bundle, "typed\n");
    let state = oci.run(&["state", "one"]).ok().json();
    assert_eq!(state["status"], "created");
    assert_eq!(state["id"], "one");
    assert_eq!(state["bundle"], json!(bundle));
    assert_eq!(state["annotations"], json!({ "a": "b" }));
    assert_eq!(state["pid"], oci.pid("one").as_raw_nonzero().get());
    let listed = oci.run(&["list", "--format", "json"]).ok().json();
    assert_eq!(listed[0], state);
    oci.run(&["list", "-q"]).expect_stdout("one\n");
    let pid = oci.pid("one").as_raw_nonzero();
    let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert_eq!(cgroup, "0::/test-parent/one\n");
    // What callers enter is not the host's.
    for namespace in ["mnt", "pid", "net"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{namespace}");
    }
    let passwd = fs::read_to_string(format!("/proc/{pid}/root/etc/passwd")).unwrap();
    assert!(passwd.contains("app:x:1000"), "{passwd}");
    assert!(!running.stdout_so_far().contains("out"));
    oci.run(&["start", "one"]).ok();
    let finished = running.finish().expect_code(7);
    assert_eq!(finished.stdout(), "typed\nout caisson y\n");
    assert_eq!(finished.stderr(), "err\n");
    let state = oci.run(&["state", "one"]).ok().json();
    assert_eq!(
        (&state["status"], &state["pid"]),
        (&json!("stopped"), &json!(0))
    );
    oci.run(&["start", "one"]).expect_error(&["one", "stopped"]);
    oci.run(&["kill", "one"]).expect_error(&["not running"]);
    oci.run(&["delete", "one"]).ok();
    oci.run(&["state", "one"]).expect_error(&["does not exist"]);
    oci.run(&["delete", "one"])
        .expect_error(&["does not exist"]);
    oci.run(&["delete", "--force", "one"]).ok();
}

#[test]
fn answers_have_runcs_form() {
    let host = Host::claim();
    let oci = Oci::new(&host);
    let bundle = oci.bundle("sleep 1000", |_| {});
    let running = oci.create("one", &bundle, "");
    let ours = oci.run(&["state", "one"]).ok().json();
    // The same bundle by runc.
    let runc_root = host.scratch().join("runc").display().to_string();
    let runc = |words: &[&str]| {
        let all: Vec<&str> = ["runc", "--root", &runc_root]
            .into_iter()
            .chain(words.iter().copied())
            .collect();
        Command::new(all).run()
    };
    let bundle = bundle.display().to_string();
    runc(&["create", "--bundle", &bundle, "two"]).ok();
    let theirs = runc(&["state", "two"]).ok().json();
    for key in keys(&theirs) {
        assert!(ours.get(key).is_some(), "{key} is missing: {ours}");
        let (mine, other) = (&ours[key], &theirs[key]);
        assert_eq!(
            std::mem::discriminant(mine),
            std::mem::discriminant(other),
            "{key}: {mine} {other}"
        );
    }
    for key in ["status", "bundle", "rootfs", "owner"] {
        assert_eq!(ours[key], theirs[key], "{key}");
    }
    for verb in ["state", "start", "kill", "delete"] {
        let (mine, other) = (oci.run(&[verb, "none"]), runc(&[verb, "none"]));
        assert_eq!(mine.code(), other.code(), "{verb}: {mine}\n{other}");
        for finished in [mine, other] {
            finished.expect_error(&["does not exist"]);
        }
    }
    oci.run(&["start", "one"]).ok();
    runc(&["start", "two"]).ok();
    let events = |finished: Finished| finished.ok().json();
    let mine = events(oci.run(&["events", "--stats", "one"]));
    let other = events(runc(&["events", "--stats", "two"]));
    assert_eq!(keys(&mine), keys(&other));
    for part in ["cpu", "memory", "pids"] {
        assert!(mine["data"].get(part).is_some(), "{part}: {mine}");
    }
    assert!(mine["data"]["memory"]["usage"]["usage"].as_u64() > Some(0));
    let pids = oci.run(&["ps", "--format", "json", "one"]).ok().json();
    assert_eq!(pids.as_array().unwrap().len(), 1);
    runc(&["delete", "--force", "two"]).ok();
    oci.run(&["delete", "one"])
        .expect_error(&["not stopped", "running"]);
    oci.run(&["delete", "--force", "one"]).ok();
    assert_eq!(running.finish().code(), 137);
}

#[test]
fn programs_run_in_a_container() {
    let host = Host::claim();
    let oci = Oci::new(&host);
    let bundle = oci.bundle("sleep 1000", |config| {
        config["process"]["apparmorProfile"] = json!("of-the-host");
        config["process"]["selinuxLabel"] = json!("system_u:system_r:container_t:s0");
    });
    let running = oci.create("one", &bundle, "");
    oci.run(&["exec", "one", "true"])
        .expect_error(&["not running", "created"]);
    oci.run(&["start", "one"]).ok();
    let ran = oci
        .run(&[
            "exec",
            "-e",
            "A=b",
            "--cwd",
            "/tmp",
            "-u",
            "1000:1000",
            "one",
            "sh",
            "-c",
            "echo $A $(pwd) $(id -u); echo err >&2; exit 5",
        ])
        .expect_code(5);
    assert_eq!(ran.stdout(), "b /tmp 1000\n");
    Command::new(oci.words(&["exec", "one", "cat"]))
        .stdin("typed")
        .run()
        .ok()
        .expect_stdout("typed");
    oci.run(&["exec", "one", "no-such-program"])
        .expect_code(255)
        .expect_error(&["executable file not found in $PATH"]);
    oci.run(&["exec", "one", "/etc"])
        .expect_code(255)
        .expect_error(&["permission denied"]);
    // As conmon does it.
    let process = host.scratch().join("process.json");
    let file = process.display().to_string();
    fs::write(
        &process,
        json!({ "cwd": "/", "user": { "uid": 0, "gid": 0 }, "args": ["sleep", "500"], "env": ["PATH=/bin"],
            "apparmorProfile": "of-the-host" })
        .to_string(),
    )
    .unwrap();
    let pid_file = host.scratch().join("exec.pid");
    let pid_path = pid_file.display().to_string();
    oci.run(&[
        "exec",
        "--detach",
        "--process",
        &file,
        "--pid-file",
        &pid_path,
        "one",
    ])
    .ok();
    let pids = || {
        let pids = oci.run(&["ps", "-f", "json", "one"]).ok().json();
        pids.as_array().unwrap().len()
    };
    assert_eq!(pids(), 2);
    let pid: i32 = fs::read_to_string(&pid_file).unwrap().parse().unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::TERM).unwrap();
    assert!(until(seconds(5.0), || (pids() == 1).then_some(())).is_some());
    // A reader that leaves ends who writes to it.
    let yes = oci.words(&["exec", "one", "yes"]).join(" ");
    Command::new(["sh", "-c", &format!("{yes} | head -1")])
        .run()
        .ok()
        .expect_stdout("y\n");
    assert!(until(seconds(5.0), || (pids() == 1).then_some(())).is_some());
    fs::write(&process, "{").unwrap();
    oci.run(&["exec", "--process", &file, "one"])
        .expect_error(&["process.json"]);
    let mut terminal = caisson_tests::Terminal::start(oci.words(&[
        "exec",
        "-t",
        "one",
        "sh",
        "-c",
        "tty; read x; echo got $x; exit 3",
    ]));
    terminal.expect("/dev/pts/");
    terminal.send("word\r");
    terminal.expect("got word");
    assert_eq!(terminal.finish(), 3);
    oci.run(&["delete", "-f", "one"]).ok();
    running.finish().expect_code(137);
}

#[test]
fn it_is_signalled_paused_and_given_limits() {
    let host = Host::claim();
    let oci = Oci::new(&host);
    let bundle = oci.bundle(
        "trap 'echo usr1' USR1; trap 'echo term; exit 9' TERM; echo ready; while :; do sleep 0.1; done",
        |_| {},
    );
    let mut running = oci.create("one", &bundle, "");
    oci.run(&["pause", "one"]).expect_error(&["created"]);
    oci.run(&["start", "one"]).ok();
    running.wait_for_stdout("ready");
    oci.run(&["pause", "one"]).ok();
    assert_eq!(oci.status("one"), "paused");
    oci.run(&["exec", "one", "true"]).expect_error(&["paused"]);
    oci.run(&["pause", "one"]).expect_error(&["paused"]);
    oci.run(&["resume", "one"]).ok();
    assert_eq!(oci.status("one"), "running");
    oci.run(&["kill", "one", "USR1"]).ok();
    running.wait_for_stdout("usr1");
    oci.run(&["kill", "one", "NOSUCH"])
        .expect_error(&["NOSUCH"]);
    oci.run(&["update", "--pids-limit", "17", "one"]).ok();
    Command::new(oci.words(&["update", "-r", "-", "one"]))
        .stdin(r#"{"memory":{"limit":104857600}}"#)
        .run()
        .ok();
    oci.run(&[
        "exec",
        "one",
        "cat",
        "/sys/fs/cgroup/pids.max",
        "/sys/fs/cgroup/memory.max",
    ])
    .expect_stdout("17\n104857600\n");
    oci.run(&["update", "--memory", "many", "one"])
        .expect_error(&["--memory many"]);
    // A signal to the process on the host is one to that in the guest.
    kill_process(oci.pid("one"), Signal::TERM).unwrap();
    let finished = running.finish().expect_code(9);
    assert!(finished.stdout().ends_with("term\n"), "{finished}");
    oci.run(&["delete", "one"]).ok();
}

#[test]
fn a_terminal_goes_to_the_console_socket() {
    let host = Host::claim();
    let oci = Oci::new(&host);
    let bundle = oci.bundle("stty size; tty; read x; echo got $x; exit 4", |config| {
        config["process"]["terminal"] = json!(true);
        config["process"]["consoleSize"] = json!({ "height": 33, "width": 77 });
    });
    let path = bundle.display().to_string();
    oci.run(&["create", "-b", &path, "one"])
        .expect_error(&["--console-socket"]);
    let socket = host.scratch().join("console");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let socket = socket.display().to_string();
    oci.run(&["create", "-b", &path, "--console-socket", &socket, "one"])
        .ok();
    let (stream, _) = listener.accept().unwrap();
    let mut master = received_file(&stream);
    oci.run(&["start", "one"]).ok();
    use std::io::{Read, Write};
    master.write_all(b"word\r").unwrap();
    let mut screen = Vec::new();
    let mut chunk = [0; 512];
    // Ends with EIO once the container has.
    while let Ok(length @ 1..) = master.read(&mut chunk) {
        screen.extend_from_slice(&chunk[..length]);
    }
    let screen = String::from_utf8_lossy(&screen);
    for text in ["33 77", "/dev/pts/", "got word"] {
        assert!(screen.contains(text), "{text}: {screen}");
    }
    oci.wait_for("one", "stopped");
    oci.run(&["delete", "one"]).ok();
}

/// The descriptor that comes over a socket.
fn received_file(stream: &std::os::unix::net::UnixStream) -> fs::File {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0; 64];
    recvmsg(
        stream,
        &mut [std::io::IoSliceMut::new(&mut name)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    )
    .unwrap();
    let found = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    found.expect("a descriptor").into()
}

#[test]
fn hooks_of_the_host_run_on_the_host() {
    let host = Host::claim();
    let oci = Oci::new(&host);
    let out = host.scratch().join("hooks");
    let hook = |name: &str| {
        let script = format!("echo {name} $(cat) >> {}", out.display());
        json!([{ "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin:/usr/bin"] }])
    };
    let bundle = oci.bundle("true", |config| {
        config["hooks"] = json!({
            "prestart": hook("prestart"), "createRuntime": hook("createRuntime"),
            "poststart": hook("poststart"), "poststop": hook("poststop"),
        });
    });
    let running = oci.create("one", &bundle, "");
    oci.run(&["start", "one"]).ok();
    running.finish().expect_code(0);
    oci.run(&["delete", "one"]).ok();
    let told = fs::read_to_string(&out).unwrap();
    let lines: Vec<(&str, Value)> = told
        .lines()
        .map(|line| {
            let (name, state) = line.split_once(' ').unwrap();
            (name, serde_json::from_str(state).unwrap())
        })
        .collect();
    let names: Vec<&str> = lines.iter().map(|(name, _)| *name).collect();
    assert_eq!(
        names,
        ["prestart", "createRuntime", "poststart", "poststop"]
    );
    let pid = oci.pid("one").as_raw_nonzero().get();
    assert_eq!(lines[0].1["pid"], pid);
    assert_eq!(lines[0].1["id"], "one");
    // One that fails.
    let path = bundle.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["hooks"] = json!({ "prestart": [{ "path": "/bin/sh", "args": ["sh", "-c", "echo why >&2; exit 3"] }] });
    fs::write(&path, config.to_string()).unwrap();
    oci.run(&["create", "-b", &bundle.display().to_string(), "two"])
        .expect_error(&["hook #0", "why"]);
    oci.run(&["state", "two"]).expect_error(&["does not exist"]);
}

#[test]
fn what_cannot_be_is_refused_and_leaves_nothing() {
    let host = Host::claim();
    let oci = Oci::new(&host);
    let bundle = oci.bundle("true", |_| {});
    let path = bundle.display().to_string();
    let log = host.scratch().join("log");
    let log_path = log.display().to_string();
    Command::new(oci.words(&[
        "--log",
        &log_path,
        "--log-format",
        "json",
        "create",
        "-b",
        "/no/such",
        "one",
    ]))
    .run()
    .expect_error(&["/no/such"]);
    let line: Value = serde_json::from_slice(&fs::read(&log).unwrap()).unwrap();
    assert_eq!(line["level"], "error");
    assert!(line["msg"].as_str().unwrap().contains("/no/such"), "{line}");
    oci.run(&["create", "-b", &path, "a/b"])
        .expect_error(&["a/b"]);
    oci.run(&["create", "-b", &path, "--preserve-fds", "2", "one"])
        .expect_error(&["--preserve-fds 2"]);
    oci.run(&["create", "-b", &path]).expect_error(&["ID"]);
    oci.run(&["--rootless", "true", "list"])
        .expect_error(&["root"]);
    oci.run(&["state", "../x"]).expect_error(&["../x"]);
    oci.run(&["state", "one"]).expect_error(&["does not exist"]);
    let config = bundle.join("config.json");
    let good = fs::read_to_string(&config).unwrap();
    for (bad, words) in [
        ("{".to_owned(), "config.json"),
        ("{}".to_owned(), "config.json"),
        (good.replace("\"rootfs\"", "\"nowhere\""), "nowhere"),
        (
            good.replace("[\"sh\",", "[\"no-such-program\","),
            "executable file not found in $PATH",
        ),
        (
            good.replace(
                "\"type\":\"pid\"",
                "\"type\":\"pid\",\"path\":\"/proc/1/ns/pid\"",
            ),
            "/proc/1/ns/pid",
        ),
    ] {
        assert_ne!(bad, good, "nothing was changed");
        fs::write(&config, bad).unwrap();
        oci.run(&["create", "-b", &path, "one"])
            .expect_error(&[words]);
        oci.run(&["list", "-q"]).expect_stdout("");
    }
}

#[test]
fn an_id_is_taken_once() {
    let host = Host::claim();
    let oci = Oci::new(&host);
    let bundle = oci.bundle("sleep 1000", |_| {});
    let running = oci.create("one", &bundle, "");
    oci.run(&["create", "-b", &bundle.display().to_string(), "one"])
        .expect_error(&["already exists", "one"]);
    assert_eq!(oci.status("one"), "created");
    // Created, never started.
    oci.run(&["delete", "one"]).ok();
    running.finish().expect_code(137);
}

#[test]
fn whoever_is_killed_nothing_is_left() {
    let host = Host::claim();
    let oci = Oci::new(&host);
    let bundle = oci.bundle("echo ready; sleep 1000", |_| {});
    let kill = |pid: i32| kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    for victim in [
        "process",
        "monitor",
        "containerd-shim-caisson-v2",
        "caisson-vmm",
    ] {
        let _ = fs::remove_file(oci.pid_file("one"));
        let mut running = oci.create("one", &bundle, "");
        oci.run(&["start", "one"]).ok();
        running.wait_for_stdout("ready");
        match victim {
            "process" => kill(oci.pid("one").as_raw_nonzero().get()),
            "monitor" => {
                let file = oci.root.join("one/monitor.json");
                let who: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
                kill(i32::try_from(who["pid"].as_i64().unwrap()).unwrap());
            }
            program => host.processes_of(program).into_iter().for_each(kill),
        }
        let code = running.finish().code();
        // Python tells a signal by 256 less its number.
        assert!([137, 256 - 9].contains(&code), "{victim}: {code}");
        oci.wait_for("one", "stopped");
        oci.run(&["delete", "one"]).ok();
        for program in ["caisson-vmm", "caisson-fs", "containerd-shim-caisson-v2"] {
            assert!(host.processes_of(program).is_empty(), "{victim}: {program}");
        }
    }
}

#[test]
fn a_create_that_is_killed_leaves_what_delete_removes() {
    let host = Host::claim();
    let oci = Oci::new(&host);
    let bundle = oci.bundle("sleep 1000", |_| {});
    for pause in [0.05, 0.15, 0.4] {
        let running =
            Command::new(oci.words(&["create", "-b", &bundle.display().to_string(), "one"]))
                .within(30.0)
                .start();
        std::thread::sleep(seconds(pause));
        running.signal(Signal::KILL);
        running.finish();
        oci.run(&["delete", "--force", "one"]).ok();
        oci.run(&["list", "-q"]).expect_stdout("");
        assert!(host.processes_of("caisson-vmm").is_empty(), "{pause}");
    }
}

#[test]
fn dockers_verbs_and_runcs_are_told_apart() {
    let host = Host::claim();
    let oci = Oci::new(&host);
    let bundle = oci.bundle("sleep 1000", |_| {});
    host.caisson(["create", "--bundle", &bundle.display().to_string(), "one"])
        .ok();
    host.caisson(["start", "one"]).ok();
    host.caisson(["exec", "one", "echo", "in", "the", "bundle"])
        .expect_stdout("in the bundle\n");
    host.caisson(["ps", "-q"]).expect_stdout("");
    host.caisson(["kill", "none", "9"])
        .expect_error(&["No such container"]);
    host.caisson(["kill", "one", "9"]).ok();
    oci.run(&["state", "one"]).expect_error(&["does not exist"]);
    host.caisson(["delete", "--force", "one"]).ok();
    let features = host.caisson(["features"]).ok().json();
    assert_eq!(features["linux"]["cgroup"]["v2"], true);
}
