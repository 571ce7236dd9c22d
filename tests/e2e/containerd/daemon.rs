//! A containerd of the test's own, driven with `ctr`.

use std::{
    ffi::OsString,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    sync::{Mutex, PoisonError},
};

use caisson_tests::{Command, Finished, Host, Image, Layer, Running, Terminal, seconds, until};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::json;

use super::{config, keeper};

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

/// A running containerd. A test that succeeds hands it on to the next one, as it takes long to
/// start; the last ends with the test program.
pub struct Daemon<'a> {
    pub host: &'a Host,
    pub version: Version,
    process: Option<Child>,
    /// Where in the log the test begins.
    log_start: usize,
}

/// Daemons that run and that no test has.
static IDLE: Mutex<Vec<(Version, Child)>> = Mutex::new(Vec::new());

impl<'a> Daemon<'a> {
    /// Takes one with CRI and all snapshotters that has [`IMAGE`] and CRI's images.
    pub fn start(host: &'a Host, version: Version) -> Self {
        let idle = {
            let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
            let found = idle.iter().position(|(of, _)| *of == version);
            found.map(|index| idle.swap_remove(index).1)
        };
        let mut daemon = Self {
            host,
            version,
            process: idle,
            log_start: 0,
        };
        if daemon.process.is_none() {
            config::write(&daemon.directory(), version);
            daemon.run();
            daemon.import(&image(), &[]);
            for image in cri_images() {
                daemon.import_into("k8s.io", &image, &[]);
            }
        }
        daemon.log_start = fs::read(daemon.directory().join("log")).map_or(0, |log| log.len());
        daemon
    }

    /// Its directory; `root`, `state`, `log` and `s` (the socket) are in it. One for each version,
    /// that the next program of tests finds and empties: nobody hears of a program's last test.
    fn directory(&self) -> PathBuf {
        std::env::temp_dir().join(match self.version {
            Version::One => "tests-containerd-1",
            Version::Two => "tests-containerd-2",
        })
    }

    /// Its socket.
    pub fn address(&self) -> PathBuf {
        self.directory().join("s")
    }

    /// Starts the program, which finds what an earlier one has left.
    pub fn run(&mut self) {
        assert!(self.process.is_none());
        let directory = self.directory();
        let log = File::options()
            .create(true)
            .append(true)
            .open(directory.join("log"))
            .unwrap();
        let mut path = OsString::from(self.host.prefix().join("bin"));
        for more in [
            self.version.programs(),
            Path::new("/usr/sbin:/usr/bin:/sbin:/bin"),
        ] {
            path.push(":");
            path.push(more);
        }
        // It ends with the thread that starts it: that of the program, not of the test.
        let mut command = std::process::Command::new("setpriv");
        command
            .args(["--pdeathsig", "KILL"])
            .arg(self.version.programs().join("containerd"))
            .arg("--config")
            .arg(directory.join("config.toml"))
            .arg("--root")
            .arg(directory.join("root"))
            .arg("--state")
            .arg(directory.join("state"))
            .arg("--address")
            .arg(self.address())
            .env("PATH", path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        self.process = Some(keeper::spawn(command).expect("start containerd by setpriv"));
        let up = until(seconds(20.0), || {
            (self.ctr(["version"]).code() == 0).then_some(())
        });
        assert!(up.is_some(), "containerd does not answer\n{}", self.log());
    }

    /// How many descriptors it has open.
    pub fn descriptors(&self) -> usize {
        let process = self.process.as_ref().expect("containerd runs");
        let open = fs::read_dir(format!("/proc/{}/fd", process.id()));
        open.unwrap().count()
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
        self.import_into("default", image, flags);
    }

    /// Imports an image for CRI unless it is there.
    #[track_caller]
    pub fn import_for_cri(&self, image: &Image) {
        let listed = self.ctr(["-n", "k8s.io", "image", "ls", "-q"]).stdout();
        if !listed.lines().any(|name| name == image.name) {
            self.import_into("k8s.io", image, &[]);
        }
    }

    #[track_caller]
    fn import_into(&self, namespace: &str, image: &Image, flags: &[&str]) {
        let archive = self.host.scratch().join("image.tar");
        image.write_oci_archive(&archive);
        let archive = archive.display().to_string();
        let mut words = vec!["-n", namespace, "image", "import"];
        // 2.x would leave it to the daemon, which unpacks for its default snapshotter alone.
        if self.version == Version::Two && !flags.is_empty() {
            words.push("--local");
        }
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

    /// What it and its shims have complained of during this test, at most 60 lines.
    pub fn log(&self) -> String {
        let log = fs::read(self.directory().join("log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log[self.log_start.min(log.len())..]).into_owned();
        let lines: Vec<&str> = log
            .lines()
            .filter(|line| !line.contains("level=info") && !line.contains("level=debug"))
            .collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// Names of the containers that it knows, with their namespaces.
    fn containers(&self) -> Vec<(&'static str, String)> {
        let mut all = Vec::new();
        for namespace in ["default", "k8s.io"] {
            let listed = self.ctr(["-n", namespace, "container", "ls", "-q"]);
            let ids = listed.stdout();
            all.extend(ids.lines().map(|id| (namespace, id.to_owned())));
        }
        all
    }

    /// After a failure: removes what is there.
    fn clean(&mut self) {
        if self.process.is_none() {
            self.run();
        }
        for (namespace, id) in self.containers() {
            self.ctr(["-n", namespace, "task", "rm", "-f", &id]);
            self.ctr(["-n", namespace, "container", "rm", &id]);
        }
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- containerd's log:\n{}\n---", self.log());
            // A failed command in here must not end all tests.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.clean()));
            self.end(Signal::TERM);
            return;
        }
        let left = self.containers();
        if left.is_empty()
            && let Some(process) = self.process.take()
        {
            let mut idle = IDLE.lock().unwrap_or_else(PoisonError::into_inner);
            idle.push((self.version, process));
            return;
        }
        self.clean();
        self.end(Signal::TERM);
        assert!(left.is_empty(), "containerd still has {left:?}");
    }
}

/// Kills a process.
#[track_caller]
pub fn kill(pid: i32) {
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
}

/// The words of `ctr run` on [`IMAGE`].
pub fn run_words<'b>(flags: &[&'b str], id: &'b str, program: &[&'b str]) -> Vec<&'b str> {
    run_words_on(IMAGE, flags, id, program)
}

/// The words of `ctr run`.
pub fn run_words_on<'b>(
    image: &'b str,
    flags: &[&'b str],
    id: &'b str,
    program: &[&'b str],
) -> Vec<&'b str> {
    let mut words = vec!["run", "--runtime", RUNTIME];
    words.extend(flags);
    words.extend([image, id]);
    words.extend(program);
    words
}

/// What holds a pod of CRI, and what its containers are made of.
fn cri_images() -> [Image; 2] {
    let pause = Image::busybox(config::PAUSE)
        .config("Entrypoint", json!(["sleep", "1000000"]))
        .config("Cmd", json!([]));
    [pause, Image::busybox(IMAGE).layer(Layer::new())]
}

fn image() -> Image {
    Image::busybox(IMAGE).layer(Layer::new().dir("etc", 0o755).file(
        "etc/second",
        0o644,
        "second layer\n",
    ))
}
