//! The command line of an OCI runtime, with runc's names.

use clap::{Arg, ArgAction, Command};

fn value(name: &'static str, short: Option<char>, help: &'static str) -> Arg {
    let arg = Arg::new(name)
        .long(name)
        .help(help)
        .allow_hyphen_values(true);
    short.map_or(arg.clone(), |short| arg.short(short))
}

fn list(name: &'static str, short: Option<char>, help: &'static str) -> Arg {
    value(name, short, help).action(ArgAction::Append)
}

/// As Go's flag package has it: `--name` and `--name=false`.
fn switch(name: &'static str, short: Option<char>, help: &'static str) -> Arg {
    let arg = Arg::new(name)
        .long(name)
        .help(help)
        .num_args(0..=1)
        .require_equals(true)
        .default_missing_value("true")
        .default_value("false")
        .hide_default_value(true)
        .value_parser(clap::builder::BoolishValueParser::new())
        .hide_possible_values(true);
    short.map_or(arg.clone(), |short| arg.short(short))
}

fn id() -> Arg {
    Arg::new("id").value_name("CONTAINER-ID").required(true)
}

fn rest(name: &'static str) -> Arg {
    Arg::new(name)
        .num_args(0..)
        .trailing_var_arg(true)
        .allow_hyphen_values(true)
}

/// Flags before the verb; docker's command line has none of them here.
pub const GLOBAL: [&str; 6] = [
    "root",
    "log",
    "log-format",
    "debug",
    "systemd-cgroup",
    "rootless",
];

fn create() -> Command {
    Command::new("create")
        .about("Create a container from a bundle; its program waits for `start`")
        .args([
            value(
                "bundle",
                Some('b'),
                "Directory with config.json [default: .]",
            ),
            value(
                "console-socket",
                None,
                "Socket that receives the terminal's descriptor",
            ),
            value(
                "pid-file",
                None,
                "File for the id of the container's process on the host",
            ),
            switch(
                "no-pivot",
                None,
                "Accepted: the root is entered in the guest in any case",
            ),
            switch(
                "no-new-keyring",
                None,
                "Accepted: the guest's keyrings are its own",
            ),
            value(
                "preserve-fds",
                None,
                "0: descriptors do not cross into a microVM",
            ),
            id(),
        ])
}

fn exec() -> Command {
    Command::new("exec")
        .about("Run a program in a container")
        .args([
            value("process", Some('p'), "File with the OCI process object"),
            switch("detach", Some('d'), "Do not wait for the program"),
            switch("tty", Some('t'), "Give the program a terminal"),
            value("user", Some('u'), "UID[:GID]"),
            list("additional-gids", Some('g'), "Further groups"),
            list("env", Some('e'), "NAME=VALUE"),
            value("cwd", None, "Working directory"),
            list("cap", Some('c'), "Add a capability"),
            switch("no-new-privs", None, "Set no_new_privs"),
            value(
                "console-socket",
                None,
                "Socket that receives the terminal's descriptor",
            ),
            value(
                "pid-file",
                None,
                "File for the id of the program's process on the host",
            ),
            value(
                "preserve-fds",
                None,
                "0: descriptors do not cross into a microVM",
            ),
            switch(
                "ignore-paused",
                None,
                "Do not refuse a container that is paused",
            ),
            id(),
            rest("command"),
        ])
}

fn update() -> Command {
    let numbers = [
        ("blkio-weight", "Weight of block I/O, 10 to 1000"),
        ("cpu-period", "CPU period, microseconds"),
        ("cpu-quota", "CPU time in a period, microseconds; -1 = all"),
        ("cpu-burst", "CPU time saved up, microseconds"),
        ("cpu-share", "CPU shares"),
        ("cpu-idle", "1: scheduled only when others are idle"),
        ("memory", "Most memory, bytes; -1 = no limit"),
        ("memory-reservation", "Memory that is kept, bytes"),
        ("memory-swap", "Most memory and swap, bytes; -1 = no limit"),
        ("pids-limit", "Most processes; -1 = no limit"),
    ];
    Command::new("update")
        .about("Change a container's limits")
        .arg(value(
            "resources",
            Some('r'),
            "File with an OCI resources object, or - for standard input",
        ))
        .args(numbers.map(|(name, help)| value(name, None, help)))
        .args([
            value("cpuset-cpus", None, "CPUs of the guest"),
            value("cpuset-mems", None, "Memory nodes of the guest"),
            id(),
        ])
}

fn with_id(name: &'static str, about: &'static str) -> Command {
    Command::new(name).about(about).arg(id())
}

/// The whole command line.
pub fn command() -> Command {
    Command::new("caisson")
        .about("OCI runtime: containers of bundles, each in a microVM")
        .version(env!("CARGO_PKG_VERSION"))
        .arg(
            Arg::new("version")
                .short('v')
                .long("version")
                .action(ArgAction::Version)
                .help("Print the version"),
        )
        .disable_version_flag(true)
        .subcommand_required(true)
        .arg_required_else_help(true)
        .args([
            value("root", None, "Directory of the containers' state"),
            value("log", None, "File that errors are added to"),
            value("log-format", None, "text or json"),
            switch("debug", None, "Say more"),
            switch("systemd-cgroup", None, "cgroupsPath is SLICE:PREFIX:NAME"),
            value("rootless", None, "auto or false: root is needed"),
        ])
        .subcommands([
            create(),
            with_id("start", "Start a created container's program"),
            with_id("state", "Print a container's state as JSON"),
            Command::new("kill")
                .about("Send a signal to a container")
                .args([
                    switch("all", Some('a'), "To all its processes"),
                    id(),
                    Arg::new("signal")
                        .value_name("SIGNAL")
                        .allow_hyphen_values(true),
                ]),
            with_id("delete", "Remove a container").arg(switch(
                "force",
                Some('f'),
                "End it first if need be; no error when there is none",
            )),
            exec(),
            with_id(
                "ps",
                "List a container's processes, by their ids in the guest",
            )
            .arg(value("format", Some('f'), "table or json"))
            .arg(rest("options")),
            with_id("pause", "Freeze a container"),
            with_id("resume", "Let a frozen container go on"),
            update(),
            with_id(
                "events",
                "Print a container's figures and events, a JSON object a line",
            )
            .args([
                switch("stats", None, "Print the figures once and end"),
                value("interval", None, "Time between figures [default: 5s]"),
            ]),
            Command::new("features").about("Print what is supported, as JSON"),
            Command::new("list").about("List containers").args([
                value("format", Some('f'), "table or json"),
                switch("quiet", Some('q'), "Only ids"),
            ]),
            Command::new("spec")
                .about("Write a config.json to start from")
                .args([
                    value("bundle", Some('b'), "Directory to write it to [default: .]"),
                    value("rootless", None, "false: root is needed"),
                ]),
        ])
}

/// Name of the verb that stays with a container (or an exec) as its process on the host.
pub const STAY: &str = "oci-monitor";

/// Verbs that docker's command line does not have here.
const ONLY: [&str; 13] = [
    "create",
    "start",
    "state",
    "delete",
    "pause",
    "resume",
    "update",
    "events",
    "features",
    "list",
    "spec",
    STAY,
    super::stand_in::VERB,
];

/// Names under which the program is always an OCI runtime.
const NAMES: [&str; 2] = ["caisson-oci", "runc"];

/// Whether a command line is meant for an OCI runtime and not for docker's verbs.
///
/// `exec`, `kill` and `ps` are words of both. They are the runtime's after a flag of the runtime
/// (`--root …`), with a flag that only it has, or for a container that it has made; `known` tells
/// the latter.
pub fn is_meant(words: &[String], known: impl Fn(&str) -> bool) -> bool {
    let name = words.first().map_or("", String::as_str);
    if NAMES.contains(&name.rsplit('/').next().unwrap_or_default()) {
        return true;
    }
    let Some(first) = words.get(1) else {
        return false;
    };
    if let Some(flag) = first.strip_prefix("--") {
        return GLOBAL.contains(&flag.split('=').next().unwrap_or_default());
    }
    if ONLY.contains(&first.as_str()) {
        return true;
    }
    if !["exec", "kill", "ps"].contains(&first.as_str()) {
        return false;
    }
    let Ok(matches) = command().try_get_matches_from(words) else {
        return false;
    };
    let Some((verb, matches)) = matches.subcommand() else {
        return false;
    };
    let given =
        |flag: &str| matches.value_source(flag) == Some(clap::parser::ValueSource::CommandLine);
    let only_here: &[&str] = match verb {
        "exec" => &[
            "process",
            "pid-file",
            "console-socket",
            "preserve-fds",
            "cwd",
            "cap",
            "additional-gids",
            "no-new-privs",
            "ignore-paused",
        ],
        "kill" => &["all"],
        // Docker's lists all containers and takes none.
        _ => return true,
    };
    only_here.iter().any(|flag| given(flag))
        || matches.get_one::<String>("id").is_some_and(|id| known(id))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meant(line: &str) -> bool {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        is_meant(&words, |id| id == "mine")
    }

    #[test]
    fn the_definition_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn verbs_of_both_are_told_apart() {
        for line in [
            "caisson --root /r exec x ls",
            "caisson --systemd-cgroup kill x 9",
            "caisson --log=/l ps x",
            "caisson create --bundle /b x",
            "caisson state x",
            "caisson kill mine 15",
            "caisson kill -a x KILL",
            "caisson exec --process /p --pid-file /q x",
            "caisson exec -t mine sh",
            "caisson ps mine",
            "caisson ps --format json mine",
            "/usr/bin/caisson-oci ps",
            "runc kill x",
        ] {
            assert!(meant(line), "{line}");
        }
        for line in [
            "caisson exec -it box sh",
            "caisson exec box ls -l",
            "caisson kill box",
            "caisson kill -s TERM mine",
            "caisson kill box mine",
            "caisson ps",
            "caisson ps -a",
            "caisson ps -q --format json",
            "caisson run x",
            "caisson --version",
            "caisson",
        ] {
            assert!(!meant(line), "{line}");
        }
    }

    #[test]
    fn callers_lines_are_understood() {
        let parse = |line: &str| {
            command()
                .try_get_matches_from(line.split(' '))
                .unwrap_or_else(|error| panic!("{line}: {error}"))
        };
        // conmon for podman, containerd-shim-runc for docker.
        parse(
            "caisson --log-format=json --log /l create --bundle /b --pid-file /p --console-socket /s abc",
        );
        parse(
            "caisson --root /r --log /l --log-format json --systemd-cgroup create --bundle /b --pid-file /p abc",
        );
        parse("caisson exec --pid-file /p --process /q --detach --console-socket /s abc");
        parse("caisson --root /r kill --all abc 9");
        parse("caisson delete --force abc");
        let update = parse("caisson update --memory -1 --cpu-quota=-1 abc");
        let (_, update) = update.subcommand().unwrap();
        assert_eq!(update.get_one::<String>("memory").unwrap(), "-1");
        let exec = parse("caisson exec -e A=b abc ls -l --x");
        let (_, exec) = exec.subcommand().unwrap();
        let command: Vec<_> = exec.get_many::<String>("command").unwrap().collect();
        assert_eq!(command, ["ls", "-l", "--x"]);
        assert!(
            super::command()
                .try_get_matches_from(["caisson", "create", "--no-such", "x"])
                .is_err()
        );
    }
}
