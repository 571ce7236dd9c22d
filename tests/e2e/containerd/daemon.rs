//! A containerd of the test's own, driven with `ctr`.

use std::{
    ffi::OsString,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Stdio},
};

use caisson_tests::{Command, Finished, Host, Image, Layer, Running, Terminal, seconds, until};
use rustix::process::{Pid, Signal, kill_process};

/// The image that containers are made of: two layers, `/etc/second` in the upper.
pub const IMAGE: &str = "docker.io/library/test:1";

/// The runtime's name, as a client of containerd gives it.
pub const RUNTIME: &str = "io.containerd.caisson.v2";

/// Which containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// 1.7, Debian trixie's.
    One,
    /// 2.x, Debian sid's.
    Two,
}

impl Version {
    fn programs(self) -> &'static Path {
        Path::new(match self {
            Self::One => "/usr/bin",
            Self::Two => "/opt/containerd-2/bin",
        })
    }
}

/// A running containerd; it ends with this value, and its containers when a test has failed.
pub struct Daemon<'a> {
    pub host: &'a Host,
    pub version: Version,
    directory: PathBuf,
    process: Option<Child>,
}

impl<'a> Daemon<'a> {
    /// Starts one without CRI and imports [`IMAGE`].
    pub fn start(host: &'a Host, version: Version) -> Self {
        let daemon = Self::with_config(host, version, "");
        daemon.import(&image(), &[]);
        daemon
    }

    /// Starts one without CRI whose configuration (version 2) has `more` at its end.
    pub fn with_config(host: &'a Host, version: Version, more: &str) -> Self {
        let config = format!(
            "version = 2\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.cri.v1.images\", \
             \"io.containerd.cri.v1.runtime\"]\n{}{more}",
            timeouts()
        );
        Self::with_whole_config(host, version, &config)
    }

    /// Starts one with a configuration of its own.
    pub fn with_whole_config(host: &'a Host, version: Version, config: &str) -> Self {
        let directory = host.scratch().join("containerd");
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("config.toml"), config).unwrap();
        let mut daemon = Self {
            host,
            version,
            directory,
            process: None,
        };
        daemon.run();
        daemon
    }

    /// Its directory; `root`, `state`, `log` and `s` (the socket) are in it.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Its socket.
    pub fn address(&self) -> PathBuf {
        self.directory.join("s")
    }

    /// Starts the program, which finds what an earlier one has left.
    pub fn run(&mut self) {
        assert!(self.process.is_none());
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.directory.join("log"))
            .unwrap();
        let mut path = OsString::from(self.host.prefix().join("bin"));
        for more in [
            self.version.programs(),
            Path::new("/usr/sbin:/usr/bin:/sbin:/bin"),
        ] {
            path.push(":");
            path.push(more);
        }
        let child = std::process::Command::new(self.version.programs().join("containerd"))
            .arg("--config")
            .arg(self.directory.join("config.toml"))
            .arg("--root")
            .arg(self.directory.join("root"))
            .arg("--state")
            .arg(self.directory.join("state"))
            .arg("--address")
            .arg(self.address())
            .env("PATH", path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("start containerd, which the testbed has");
        self.process = Some(child);
        let up = until(seconds(20.0), || {
            (self.ctr(["version"]).code() == 0).then_some(())
        });
        assert!(up.is_some(), "containerd does not answer\n{}", self.log());
    }

    /// Ends the program by a signal, and waits for its end.
    pub fn end(&mut self, signal: Signal) {
        if let Some(mut process) = self.process.take() {
            let _ = kill_process(Pid::from_child(&process), signal);
            if until(seconds(5.0), || process.try_wait().unwrap()).is_none() {
                let _ = process.kill();
                let _ = process.wait();
            }
        }
    }

    /// The words of a `ctr` command.
    pub fn words<'b>(&self, words: impl IntoIterator<Item = &'b str>) -> Vec<OsString> {
        let mut all: Vec<OsString> = vec![
            self.version.programs().join("ctr").into(),
            "--address".into(),
            self.address().into(),
        ];
        all.extend(words.into_iter().map(OsString::from));
        all
    }

    /// A `ctr` command, not yet started.
    pub fn command<'b>(&self, words: impl IntoIterator<Item = &'b str>) -> Command {
        Command::new(self.words(words))
    }

    /// Runs a `ctr` command to its end.
    pub fn ctr<'b>(&self, words: impl IntoIterator<Item = &'b str>) -> Finished {
        self.command(words).run()
    }

    /// A `ctr` command on a terminal.
    pub fn terminal<'b>(&self, words: impl IntoIterator<Item = &'b str>) -> Terminal {
        Terminal::start(self.words(words))
    }

    /// `ctr run --runtime ... FLAGS IMAGE ID PROGRAM`, to its end.
    pub fn run_with(&self, flags: &[&str], id: &str, program: &[&str]) -> Finished {
        self.ctr(run_words(flags, id, program))
    }

    /// A detached container.
    #[track_caller]
    pub fn detached(&self, flags: &[&str], id: &str, program: &[&str]) {
        // In a place of ours: what `ctr` does not see the end of, it leaves there.
        let fifos = self.fifos();
        let mut all = vec!["-d", "--fifo-dir", &fifos];
        all.extend(flags);
        self.run_with(&all, id, program).ok();
    }

    /// A directory for FIFOs.
    pub fn fifos(&self) -> String {
        self.host.scratch().join("fifos").display().to_string()
    }

    /// `ctr task kill -s KILL`, until it has ended, then `ctr task rm` and `ctr container rm`.
    #[track_caller]
    pub fn remove(&self, id: &str) {
        self.ctr(["task", "kill", "-s", "KILL", id]).ok();
        self.remove_ended(id);
    }

    /// Waits for a task's end, then removes it and its container.
    #[track_caller]
    pub fn remove_ended(&self, id: &str) {
        self.exit_status(id);
        self.ctr(["container", "rm", id]).ok();
    }

    /// Waits for a task's end, removes it and gives its exit status.
    #[track_caller]
    pub fn exit_status(&self, id: &str) -> i32 {
        self.wait_for_status(id, "STOPPED");
        let removed = self.ctr(["task", "rm", id]);
        assert!(self.status(id).is_none(), "task {id} is there\n{removed}");
        // 1.7 warns of a status that is not 0, 2.x ends with it.
        let warning = removed.stderr();
        let told = warning.split("exit code ").nth(1).map(|rest| {
            let number: String = rest.chars().take_while(char::is_ascii_digit).collect();
            number.parse().unwrap()
        });
        told.unwrap_or_else(|| removed.code())
    }

    /// A task's status as `ctr task ls` has it.
    pub fn status(&self, id: &str) -> Option<String> {
        let listed = self.ctr(["task", "ls"]).ok().stdout();
        listed.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            (words.next() == Some(id)).then(|| words.nth(1).unwrap_or_default().to_owned())
        })
    }

    /// Waits until a task has a status.
    #[track_caller]
    pub fn wait_for_status(&self, id: &str, wanted: &str) {
        let mut last = None;
        let seen = until(seconds(20.0), || {
            last = self.status(id);
            (last.as_deref() == Some(wanted)).then_some(())
        });
        assert!(seen.is_some(), "{id} is {last:?} and not {wanted}");
    }

    /// Imports an image, unpacked for a snapshotter if `flags` name one.
    #[track_caller]
    pub fn import(&self, image: &Image, flags: &[&str]) {
        let archive = self.directory.join("image.tar");
        image.write_oci_archive(&archive);
        let archive = archive.display().to_string();
        let mut words = vec!["image", "import"];
        words.extend(flags);
        words.push(&archive);
        self.ctr(words).ok();
        fs::remove_file(&archive).unwrap();
    }

    /// Listens to all events from now on.
    pub fn events(&self) -> Running {
        let events = self.command(["events"]).within(1000.0).start();
        // It says nothing when it has subscribed, so events are made until one arrives.
        let heard = until(seconds(10.0), || {
            self.ctr(["namespace", "label", "default", "heard=yes"])
                .ok();
            events
                .stdout_so_far()
                .contains("/namespaces/update")
                .then_some(())
        });
        assert!(heard.is_some(), "no event arrives\n{}", self.log());
        events
    }

    /// Process ids of the shims that were started for a pod.
    pub fn shims(&self, id: &str) -> Vec<i32> {
        let mut shims = self.host.processes_of("containerd-shim-caisson-v2");
        shims.retain(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words: Vec<&[u8]> = line.split(|byte| *byte == 0).collect();
            words
                .windows(2)
                .any(|pair| pair == [&b"-id"[..], id.as_bytes()])
        });
        shims
    }

    /// What it and its shims have complained of, at most 60 lines.
    pub fn log(&self) -> String {
        let log = fs::read_to_string(self.directory.join("log")).unwrap_or_default();
        let lines: Vec<&str> = log
            .lines()
            .filter(|line| !line.contains("level=info") && !line.contains("level=debug"))
            .collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- containerd's log:\n{}\n---", self.log());
            // A failed command in here must not end all tests.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                if self.process.is_none() {
                    self.run();
                }
                for namespace in ["default", "k8s.io"] {
                    let listed = self.ctr(["-n", namespace, "task", "ls", "-q"]).stdout();
                    for id in listed.lines() {
                        self.ctr(["-n", namespace, "task", "rm", "-f", id]);
                    }
                }
            }));
        }
        self.end(Signal::TERM);
    }
}

/// Kills a process.
#[track_caller]
pub fn kill(pid: i32) {
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
}

/// The words of `ctr run`.
pub fn run_words<'b>(flags: &[&'b str], id: &'b str, program: &[&'b str]) -> Vec<&'b str> {
    let mut words = vec!["run", "--runtime", RUNTIME];
    words.extend(flags);
    words.extend([IMAGE, id]);
    words.extend(program);
    words
}

/// containerd's own limits on shims, stretched like everything else.
pub fn timeouts() -> String {
    let limits = [
        ("shim.cleanup", 5.0),
        ("shim.load", 5.0),
        ("shim.shutdown", 3.0),
        ("task.state", 2.0),
    ];
    let mut text = "[timeouts]\n".to_owned();
    for (name, limit) in limits {
        let limit = seconds(limit).as_secs();
        text += &format!("\"io.containerd.timeout.{name}\" = \"{limit}s\"\n");
    }
    text
}

fn image() -> Image {
    Image::busybox(IMAGE).layer(Layer::new().dir("etc", 0o755).file(
        "etc/second",
        0o644,
        "second layer\n",
    ))
}
