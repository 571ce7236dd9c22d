//! podman with `--runtime caisson`: its own conmon, its own storage.

use std::{
    fs,
    path::{Path, PathBuf},
};

use caisson_tests::{Command, Finished, Host, Image, Terminal, seconds, until};

/// Cgroups that podman keeps once it has made them.
const KEPT_CGROUPS: [&str; 2] = [
    "/sys/fs/cgroup/libpod_parent/conmon",
    "/sys/fs/cgroup/podman_probe",
];

struct Podman {
    root: PathBuf,
    host: Host,
}

impl Podman {
    /// With an image `busybox` in a storage of its own.
    fn claim() -> Self {
        for cgroup in KEPT_CGROUPS {
            fs::create_dir_all(cgroup).unwrap();
        }
        // Makes its locks, which it keeps too.
        Command::new(["podman", "ps"]).run().ok();
        let host = Host::claim();
        let podman = Self {
            root: host.scratch().join("podman"),
            host,
        };
        fs::create_dir(&podman.root).unwrap();
        let archive = podman.root.join("busybox.tar");
        fs::write(&archive, Image::busybox("x").layers[0].tar()).unwrap();
        podman
            .run(&[
                "import",
                "--change",
                "CMD=sh",
                &archive.display().to_string(),
                "busybox",
            ])
            .ok();
        podman
    }

    fn words(&self, words: &[&str]) -> Vec<String> {
        let path = |name: &str| self.root.join(name).display().to_string();
        let mut all: Vec<String> = [
            "podman",
            "--cgroup-manager",
            "cgroupfs",
            "--events-backend",
            "file",
        ]
        .map(str::to_owned)
        .to_vec();
        all.extend([
            "--root".to_owned(),
            path("root"),
            "--runroot".to_owned(),
            path("run"),
            "--tmpdir".to_owned(),
            path("tmp"),
            "--runtime".to_owned(),
            self.host.program().display().to_string(),
        ]);
        all.extend(words.iter().map(|word| (*word).to_owned()));
        all
    }

    fn run(&self, words: &[&str]) -> Finished {
        Command::new(self.words(words)).within(60.0).run()
    }

    fn start(&self, name: &str, flags: &[&str], script: &str) {
        let mut words = vec!["run", "-d", "--name", name, "--network", "none"];
        words.extend(flags);
        words.extend(["busybox", "sh", "-c", script]);
        self.run(&words).ok();
    }

    fn inspect(&self, name: &str, format: &str) -> String {
        self.run(&["inspect", name, "--format", format]).ok().line()
    }

    fn wait_for_log(&self, name: &str, text: &str) {
        let seen = until(seconds(20.0), || {
            let log = self.run(&["logs", name]);
            log.stdout().contains(text).then_some(())
        });
        assert!(seen.is_some(), "{}", self.run(&["logs", name]));
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        self.run(&["rm", "-f", "-a", "-t", "0"]);
        // podman's storage stays mounted.
        let _ = rustix::mount::unmount(
            self.root.join("root/overlay"),
            rustix::mount::UnmountFlags::DETACH,
        );
    }
}

#[test]
fn run_gives_output_and_exit_codes() {
    let podman = Podman::claim();
    let run = |words: &[&str]| {
        let all: Vec<&str> = ["run", "--rm", "--network", "none", "busybox"]
            .into_iter()
            .chain(words.iter().copied())
            .collect();
        podman.run(&all)
    };
    let finished = run(&["sh", "-c", "uname -r; echo err >&2; exit 7"]).expect_code(7);
    assert!(finished.stdout().contains("caisson"), "{finished}");
    assert_eq!(finished.stderr(), "err\n");
    run(&["no-such-program"]).expect_code(127);
    run(&["/etc"]).expect_code(126);
    podman
        .run(&["run", "--rm", "--no-such-flag", "busybox"])
        .expect_code(125);
    podman.run(&["ps", "-a", "-q"]).expect_stdout("");
}

#[test]
fn a_container_in_the_background_is_managed() {
    let podman = Podman::claim();
    podman.start(
        "one",
        &["-m", "200m"],
        "trap 'echo term; exit 3' TERM; echo started; while :; do sleep 0.2; done",
    );
    podman.wait_for_log("one", "started");
    podman
        .run(&["ps", "--format", "{{.Names}} {{.State}}"])
        .expect_stdout("one running\n");
    let ran = podman
        .run(&[
            "exec",
            "-e",
            "A=b",
            "-w",
            "/tmp",
            "one",
            "sh",
            "-c",
            "echo $A $(pwd); exit 5",
        ])
        .expect_code(5);
    assert_eq!(ran.stdout(), "b /tmp\n");
    Command::new(podman.words(&["exec", "-i", "one", "cat"]))
        .stdin("typed")
        .within(60.0)
        .run()
        .expect_stdout("typed");
    podman.run(&["exec", "one", "no-such"]).expect_code(127);
    podman.run(&["pause", "one"]).ok();
    assert_eq!(podman.inspect("one", "{{.State.Status}}"), "paused");
    podman.run(&["unpause", "one"]).ok();
    let stats = podman
        .run(&["stats", "--no-stream", "--format", "json", "one"])
        .ok()
        .json();
    assert_ne!(stats[0]["cpu_percent"], "--", "{stats}");
    podman.run(&["update", "--memory", "150m", "one"]).ok();
    podman
        .run(&["exec", "one", "cat", "/sys/fs/cgroup/memory.max"])
        .expect_stdout("157286400\n");
    podman.run(&["stop", "-t", "20", "one"]).ok();
    assert_eq!(
        podman.inspect("one", "{{.State.Status}} {{.State.ExitCode}}"),
        "exited 3"
    );
    podman
        .run(&["logs", "one"])
        .expect_stdout("started\nterm\n");
    podman.run(&["start", "one"]).ok();
    podman.run(&["kill", "one"]).ok();
    podman.run(&["wait", "one"]).expect_stdout("137\n");
    podman.run(&["rm", "one"]).ok();
}

/// podman enters the namespaces of the container's process for these: they must not be the host's.
#[test]
fn cp_and_top_see_the_container_and_not_the_host() {
    let podman = Podman::claim();
    let shared = podman.host.scratch().join("shared");
    fs::create_dir(&shared).unwrap();
    let volume = format!("{}:/data", shared.display());
    podman.start(
        "one",
        &["-v", &volume],
        "echo inside > /tmp/made; sleep 1000",
    );
    let scratch = podman.host.scratch().display().to_string();
    fs::write(format!("{scratch}/file"), "from the host").unwrap();
    let from = format!("{scratch}/file");
    podman.run(&["cp", &from, "one:/tmp/copied-in"]).ok();
    assert!(!Path::new("/tmp/copied-in").exists());
    podman
        .run(&["exec", "one", "cat", "/tmp/copied-in"])
        .expect_stdout("from the host");
    let to = format!("{scratch}/passwd");
    podman.run(&["cp", "one:/etc/passwd", &to]).ok();
    assert!(fs::read_to_string(&to).unwrap().contains("app:x:1000"));
    podman.run(&["cp", &from, "one:/data/there"]).ok();
    assert_eq!(
        fs::read_to_string(shared.join("there")).unwrap(),
        "from the host"
    );
    let top = podman.run(&["top", "one"]).ok().stdout();
    assert_eq!(top.lines().count(), 2, "{top}");
    podman.run(&["rm", "-f", "-t", "0", "one"]).ok();
}

#[test]
fn terminals_have_sizes_and_exit_codes() {
    let podman = Podman::claim();
    let words = podman.words(&[
        "run",
        "--rm",
        "-it",
        "--network",
        "none",
        "busybox",
        "sh",
        "-c",
        "tty; read x; stty size; echo got $x; exit 4",
    ]);
    let mut terminal = Terminal::start(words);
    terminal.expect("/dev/pts/");
    terminal.resize(31, 99);
    std::thread::sleep(seconds(0.2));
    terminal.send("word\r");
    terminal.expect("31 99");
    terminal.expect("got word");
    assert_eq!(terminal.finish(), 4);
}

#[test]
fn volumes_files_and_health_checks() {
    let podman = Podman::claim();
    let shared = podman.host.scratch().join("shared");
    fs::create_dir(&shared).unwrap();
    let volume = format!("{}:/data:ro", shared.display());
    fs::write(shared.join("file"), "shared\n").unwrap();
    podman.start(
        "one",
        &[
            "-v",
            &volume,
            "-v",
            "named:/named",
            "--tmpfs",
            "/scratch",
            // Its programs are there because what the image has is copied (`tmpcopyup`).
            "--tmpfs",
            "/bin:exec",
            "--add-host",
            "far:10.1.2.3",
            "--health-cmd",
            "test -f /named/healthy",
            "--health-interval",
            "disable",
        ],
        "sleep 1000",
    );
    podman
        .run(&["exec", "one", "cat", "/data/file"])
        .expect_stdout("shared\n");
    let refused = podman.run(&["exec", "one", "touch", "/data/new"]);
    assert_ne!(refused.code(), 0, "{refused}");
    podman
        .run(&["exec", "one", "cat", "/etc/hosts", "/etc/hostname"])
        .expect_in_stdout("10.1.2.3");
    assert_ne!(podman.run(&["healthcheck", "run", "one"]).code(), 0);
    podman.run(&["exec", "one", "touch", "/named/healthy"]).ok();
    podman.run(&["healthcheck", "run", "one"]).ok();
    podman.run(&["rm", "-f", "-t", "0", "-v", "one"]).ok();
    podman.run(&["volume", "rm", "-f", "named"]).ok();
}

#[test]
fn deaths_are_told() {
    let podman = Podman::claim();
    let finished = podman.run(&[
        "run",
        "--rm",
        "--network",
        "none",
        "-m",
        "64m",
        "busybox",
        "tail",
        "/dev/zero",
    ]);
    finished.expect_code(137);
    for program in ["caisson-vmm", "containerd-shim-caisson-v2"] {
        podman.start("one", &[], "sleep 1000");
        for pid in podman.host.processes_of(program) {
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        }
        podman.run(&["wait", "one"]).expect_stdout("137\n");
        podman.run(&["rm", "one"]).ok();
    }
}
