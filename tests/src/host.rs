//! The machine under test: where Caisson is installed, the images tests share, and the leak check.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::fs::{FlockOperation, flock};
use serde_json::Value;

use crate::command::Command;
use crate::deadline::{seconds, until};
use crate::image::Image;
use crate::leaks::Traces;
use crate::terminal::Terminal;

/// The image that most tests use: static busybox, see [`Image::busybox`].
const BUSYBOX: &str = "caisson.test/busybox:latest";
/// How long the host may take to be clean after a test, in bare-metal seconds.
const SETTLE: f64 = 3.0;
/// Most leaks that are listed, and most lines of each of a container's logs.
const MOST_LEAKS: usize = 40;
const LAST_LINES: usize = 12;

/// One test's hold on the machine: no other test runs while it lives, and when it is dropped
/// nothing that the test started may be left.
pub struct Host {
    prefix: PathBuf,
    scratch: tempfile::TempDir,
    before: Option<Traces>,
    /// Processes of others, which no test may touch.
    foreign: Vec<i32>,
    _machine: File,
    _process: MutexGuard<'static, ()>,
}

impl Host {
    /// Waits for its turn and looks at the machine.
    ///
    /// Caisson is expected in `$CAISSON_PREFIX`, by default `out/` of the checkout.
    ///
    /// # Panics
    /// If Caisson is not there: a test that needs it must not pass without it.
    pub fn claim() -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let machine = File::create("/run/lock/tests-of-c.lock").expect("/run/lock is writable");
        flock(&machine, FlockOperation::LockExclusive).expect("lock the machine");
        let prefix = std::env::var_os("CAISSON_PREFIX").map_or_else(
            || Path::new(env!("CARGO_MANIFEST_DIR")).join("../out"),
            PathBuf::from,
        );
        let program = prefix.join("bin/caisson");
        assert!(
            program.is_file(),
            "{}: not there; run 'make build' or set CAISSON_PREFIX",
            program.display()
        );
        Self {
            prefix,
            // Not named after Caisson: the leak check looks for such names.
            scratch: tempfile::Builder::new()
                .prefix("test-scratch-")
                .tempdir()
                .expect("a scratch directory"),
            before: Some(Traces::now()),
            foreign: processes(|_| true),
            _machine: machine,
            _process: turn,
        }
    }

    /// Where Caisson is installed.
    pub fn prefix(&self) -> &Path {
        &self.prefix
    }

    /// A directory for the test's own files.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// The path of the `caisson` program.
    pub fn program(&self) -> PathBuf {
        self.prefix.join("bin/caisson")
    }

    /// The words of a `caisson` command.
    pub fn words<I, S>(&self, arguments: I) -> Vec<OsString>
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        std::iter::once(self.program().into_os_string())
            .chain(arguments.into_iter().map(|a| a.as_ref().to_owned()))
            .collect()
    }

    /// A `caisson` command, not yet started.
    pub fn command<I, S>(&self, arguments: I) -> Command
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        Command::new(self.words(arguments))
    }

    /// Runs a `caisson` command to its end.
    pub fn caisson<I, S>(&self, arguments: I) -> crate::Finished
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        self.command(arguments).run()
    }

    /// A `caisson` command on a terminal.
    pub fn terminal<I, S>(&self, arguments: I) -> Terminal
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        Terminal::start(self.words(arguments))
    }

    /// `caisson run --rm busybox sh -c SCRIPT`, after the flags given. Without a network if they
    /// name none: it takes longer to make than most scripts to run.
    pub fn sh<'a>(
        &self,
        flags: impl IntoIterator<Item = &'a str>,
        script: &'a str,
    ) -> crate::Finished {
        let mut words = vec!["run", "--rm"];
        words.extend(flags);
        if !words.contains(&"--network") {
            words.extend(["--network", "none"]);
        }
        words.extend([self.busybox(), "sh", "-c", script]);
        self.caisson(words)
    }

    /// Loads an image from an OCI layout and gives its name.
    pub fn load<'a>(&self, image: &'a Image) -> &'a str {
        let layout = tempfile::tempdir_in(self.scratch()).expect("a scratch directory");
        image.write_layout(layout.path());
        self.caisson([
            OsStr::new("load"),
            OsStr::new("-i"),
            layout.path().as_os_str(),
        ])
        .ok();
        &image.name
    }

    /// The shared busybox image, loaded on first use.
    pub fn busybox(&self) -> &'static str {
        static LOADED: OnceLock<()> = OnceLock::new();
        LOADED.get_or_init(|| {
            self.load(&Image::busybox(BUSYBOX));
        });
        BUSYBOX
    }

    /// `caisson inspect NAME`: the first object of its answer.
    pub fn inspect(&self, name: &str) -> Value {
        self.caisson(["inspect", name]).ok().json()[0].take()
    }

    /// Waits until a container is there and its state (`inspect`: `.State.Status`) is `status`.
    ///
    /// # Panics
    /// If it is not in time.
    #[track_caller]
    pub fn wait_for_status(&self, name: &str, status: &str) {
        let mut last = String::new();
        let seen = until(seconds(20.0), || {
            let answer = self.caisson(["inspect", name]);
            last = answer.to_string();
            (answer.code() == 0 && answer.json()[0]["State"]["Status"] == status).then_some(())
        });
        assert!(seen.is_some(), "{name} is not {status}\n{last}");
    }

    /// A copy of the installation in the scratch directory, whose files a test may damage.
    /// Programs find their parts relative to themselves.
    pub fn copy_of_prefix(&self) -> PathBuf {
        let copy = self.scratch().join("prefix");
        Command::new([
            OsStr::new("cp"),
            OsStr::new("-a"),
            self.prefix.as_os_str(),
            copy.as_os_str(),
        ])
        .run()
        .ok();
        copy
    }

    /// The process ids of a program of Caisson that the test started, by its file name.
    pub fn processes_of(&self, program: &str) -> Vec<i32> {
        let mut pids = processes(|exe| exe.file_name() == Some(OsStr::new(program)));
        pids.retain(|pid| !self.foreign.contains(pid));
        pids
    }

    /// What is left of the test on the machine, after giving it time to go.
    fn leaks(&self, before: &Traces) -> Vec<String> {
        let mut left = Vec::new();
        until(seconds(SETTLE), || {
            left = Traces::now().since(before);
            left.is_empty().then_some(())
        });
        left
    }

    /// Removes the test's containers and networks, so that one test's failure is not every later test's.
    fn clean(&self, left: &[String]) {
        for id in containers_in(left) {
            self.command(["rm", "-f", id]).within(20.0).run();
        }
        let of_networks = |line: &String| line.contains(" /var/lib/caisson/networks/");
        if left.iter().any(of_networks) {
            self.command(["network", "prune", "-f"]).run();
        }
    }
}

/// Ids of the containers that are among what is left.
fn containers_in(left: &[String]) -> impl Iterator<Item = &str> {
    left.iter().filter_map(|line| {
        let path = line.strip_prefix("directory /var/lib/caisson/containers/")?;
        (!path.contains('/')).then_some(path)
    })
}

/// What a container's files say of its life.
fn last_words(id: &str) -> String {
    let directory = Path::new("/var/lib/caisson/containers").join(id);
    let mut words = String::new();
    for file in [
        "container.json",
        "monitor.log",
        "bundle/log",
        "bundle/vm-exit.json",
    ] {
        let Ok(text) = fs::read_to_string(directory.join(file)) else {
            continue;
        };
        let lines: Vec<&str> = text.lines().collect();
        words.push_str(&format!("{id} {file}:\n"));
        for line in &lines[lines.len().saturating_sub(LAST_LINES)..] {
            let end = line.floor_char_boundary(1000);
            words.push_str(&format!("  {}\n", &line[..end]));
        }
    }
    words
}

/// The processes whose program's path satisfies `wanted`.
fn processes(wanted: impl Fn(&Path) -> bool) -> Vec<i32> {
    let mut pids = Vec::new();
    for entry in fs::read_dir("/proc").expect("/proc").flatten() {
        let name = entry.file_name();
        if let Some(pid) = name.to_str().and_then(|n| n.parse::<i32>().ok())
            && let Ok(exe) = fs::read_link(entry.path().join("exe"))
            && wanted(&exe)
        {
            pids.push(pid);
        }
    }
    pids
}

impl Drop for Host {
    fn drop(&mut self) {
        let Some(before) = self.before.take() else {
            return;
        };
        let left = self.leaks(&before);
        if left.is_empty() {
            return;
        }
        let mut report = format!(
            "{} things left behind by this test:\n  {}\n",
            left.len(),
            left[..left.len().min(MOST_LEAKS)].join("\n  ")
        );
        for id in containers_in(&left) {
            report.push_str(&last_words(id));
        }
        // A command that hangs panics, and a second panic would end all tests.
        let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.clean(&left)));
        if std::thread::panicking() {
            eprintln!("{report}");
        } else {
            panic!("{report}");
        }
    }
}
