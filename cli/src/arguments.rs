//! The command line.

mod images;
mod network;

use clap::{Arg, ArgAction, Command};

/// A flag with a value. As in docker, whatever follows is its value, a dash in front or not.
fn value(
    name: &'static str,
    short: Option<char>,
    placeholder: &'static str,
    help: &'static str,
) -> Arg {
    let arg = Arg::new(name)
        .long(name)
        .value_name(placeholder)
        .help(help)
        .allow_hyphen_values(true);
    short.map_or(arg.clone(), |short| arg.short(short))
}

/// A flag with values that can be repeated.
fn list(
    name: &'static str,
    short: Option<char>,
    placeholder: &'static str,
    help: &'static str,
) -> Arg {
    value(name, short, placeholder, help).action(ArgAction::Append)
}

fn switch(name: &'static str, short: Option<char>, help: &'static str) -> Arg {
    let arg = Arg::new(name)
        .long(name)
        .help(help)
        .action(ArgAction::SetTrue);
    short.map_or(arg.clone(), |short| arg.short(short))
}

fn containers() -> Arg {
    Arg::new("container")
        .value_name("CONTAINER")
        .required(true)
        .num_args(1..)
}

fn format() -> Arg {
    value("format", None, "FORMAT", "\"table\" or \"json\"")
}

/// Everything that follows the first word without a dash is that word's: the command inside the
/// container has flags of its own.
fn with_rest(command: Command) -> Command {
    command
        .allow_external_subcommands(true)
        .disable_help_subcommand(true)
        .subcommand_required(true)
}

fn run() -> Command {
    with_rest(
        Command::new("run")
            .about("Start an image in a microVM of its own")
            .override_usage("caisson run [OPTIONS] IMAGE [COMMAND] [ARG...]")
            .args([
                switch(
                    "interactive",
                    Some('i'),
                    "Pass standard input to the container",
                ),
                switch("tty", Some('t'), "Give the container a terminal"),
                switch(
                    "detach",
                    Some('d'),
                    "Run in the background and print the container's id",
                ),
                switch("rm", None, "Remove the container when it has ended"),
                value("name", None, "NAME", "Name of the container"),
                list(
                    "env",
                    Some('e'),
                    "NAME[=VALUE]",
                    "Set a variable, or pass one on",
                ),
                value(
                    "workdir",
                    Some('w'),
                    "DIR",
                    "Working directory inside the container",
                ),
                value(
                    "user",
                    Some('u'),
                    "USER[:GROUP]",
                    "Names of the image's files, or numbers",
                ),
                value(
                    "entrypoint",
                    None,
                    "PROGRAM",
                    "Replace the image's entrypoint",
                ),
                value(
                    "hostname",
                    Some('h'),
                    "NAME",
                    "Name of the host inside the container",
                ),
                switch("read-only", None, "Make the root file system read-only"),
                list(
                    "tmpfs",
                    None,
                    "DIR[:OPTIONS]",
                    "Mount a file system in memory",
                ),
                value(
                    "shm-size",
                    None,
                    "SIZE",
                    "Size of /dev/shm, such as 256m [default: 64m]",
                ),
                list(
                    "volume",
                    Some('v'),
                    "[SOURCE:]TARGET[:ro]",
                    "Share a path of the host, a volume, or a new volume",
                ),
                list(
                    "mount",
                    None,
                    "KEY=VALUE,...",
                    "The same in words: type=bind|volume|tmpfs,source=,target=,readonly",
                ),
                list("cap-add", None, "CAPABILITY", "Add a capability, or ALL"),
                list("cap-drop", None, "CAPABILITY", "Drop a capability, or ALL"),
                list("ulimit", None, "NAME=SOFT[:HARD]", "Set a resource limit"),
                value("cpus", None, "NUMBER", "Processors, in parts if need be"),
                value(
                    "memory",
                    Some('m'),
                    "SIZE",
                    "Most memory, such as 64m or 1g",
                ),
                value(
                    "pids-limit",
                    None,
                    "NUMBER",
                    "Most processes; -1 = no limit",
                ),
                value(
                    "pull",
                    None,
                    "POLICY",
                    "\"always\", \"missing\" or \"never\" pull the image [default: missing]",
                ),
                switch("quiet", Some('q'), "Pull without telling how far it is"),
                Arg::new("help")
                    .long("help")
                    .help("Print help")
                    .action(ArgAction::Help),
            ])
            .args(network::flags())
            .disable_help_flag(true),
    )
}

fn copy() -> Command {
    Command::new("cp")
        .about("Copy files between a running container and the host")
        .override_usage(
            "caisson cp [OPTIONS] CONTAINER:SOURCE TARGET|-\n       \
             caisson cp [OPTIONS] SOURCE|- CONTAINER:TARGET",
        )
        .after_help(
            "With \"-\" a tar stream is written to standard output, or read from standard input.",
        )
        .args([
            switch(
                "archive",
                Some('a'),
                "Keep owners, and on the host set-id bits",
            ),
            switch(
                "follow-link",
                Some('L'),
                "Copy what SOURCE leads to when it is a symbolic link",
            ),
            switch("quiet", Some('q'), "Nothing: there is no progress to show"),
            Arg::new("source").value_name("SOURCE").required(true),
            Arg::new("target").value_name("TARGET").required(true),
        ])
}

fn exec() -> Command {
    with_rest(
        Command::new("exec")
            .about("Run a program in a running container")
            .override_usage("caisson exec [OPTIONS] CONTAINER COMMAND [ARG...]")
            .args([
                switch(
                    "interactive",
                    Some('i'),
                    "Pass standard input to the program",
                ),
                switch("tty", Some('t'), "Give the program a terminal"),
                switch("detach", Some('d'), "Do not wait for the program"),
                list(
                    "env",
                    Some('e'),
                    "NAME[=VALUE]",
                    "Set a variable, or pass one on",
                ),
                value("workdir", Some('w'), "DIR", "Working directory"),
                value(
                    "user",
                    Some('u'),
                    "USER[:GROUP]",
                    "Names of the image's files, or numbers",
                ),
            ]),
    )
}

/// The whole command line.
pub fn command() -> Command {
    containers_and_host()
        .subcommands(images::commands())
        .subcommand(volume())
        .subcommands(network::commands())
}

fn volume() -> Command {
    let volumes = || {
        Arg::new("volume")
            .value_name("VOLUME")
            .required(true)
            .num_args(1..)
    };
    Command::new("volume")
        .about("Directories that outlive containers")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommands([
            Command::new("create").about("Make a volume").args([
                list("label", None, "KEY=VALUE", "A label"),
                Arg::new("name").value_name("VOLUME"),
            ]),
            Command::new("ls")
                .visible_alias("list")
                .about("List volumes")
                .args([switch("quiet", Some('q'), "Only names"), format()]),
            Command::new("inspect")
                .about("Tell all about volumes, as JSON")
                .args([format(), volumes()]),
            Command::new("rm")
                .visible_alias("remove")
                .about("Remove volumes that no container has")
                .args([
                    switch("force", Some('f'), "Be content when there is none"),
                    volumes(),
                ]),
            Command::new("prune")
                .about("Remove volumes that no container has")
                .args([
                    switch("all", Some('a'), "Those with names too"),
                    switch("force", Some('f'), "Do not ask"),
                ]),
        ])
}

fn containers_and_host() -> Command {
    Command::new("caisson")
        .about("Runs OCI containers in microVMs")
        .version(env!("CARGO_PKG_VERSION"))
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommands([
            run(),
            exec(),
            copy(),
            Command::new("ps").about("List containers").args([
                switch("all", Some('a'), "Those that have ended too"),
                switch("quiet", Some('q'), "Only ids"),
                switch("no-trunc", None, "Do not shorten"),
                switch(
                    "sandboxes",
                    None,
                    "List the microVMs of this host instead, containerd's and others' too",
                )
                .conflicts_with_all(["all", "quiet", "no-trunc"]),
                format(),
            ]),
            Command::new("metrics")
                .about("Print figures of all microVMs of this host for Prometheus")
                .arg(value(
                    "listen",
                    None,
                    "ADDRESS:PORT",
                    "Serve them by HTTP at /metrics until ended",
                )),
            Command::new("logs")
                .about("Print what a container has written")
                .args([
                    switch("follow", Some('f'), "Wait for more until it ends"),
                    switch("timestamps", Some('t'), "Say when each line was written"),
                    value("tail", Some('n'), "LINES", "Only so many lines of the end"),
                    Arg::new("container").value_name("CONTAINER").required(true),
                ]),
            Command::new("stop")
                .about("Ask containers to end, then end them")
                .args([
                    value(
                        "time",
                        Some('t'),
                        "SECONDS",
                        "How long to wait in between [default: 10]",
                    ),
                    containers(),
                ]),
            Command::new("kill")
                .about("Send a signal to containers")
                .args([
                    value(
                        "signal",
                        Some('s'),
                        "SIGNAL",
                        "Name or number [default: KILL]",
                    ),
                    containers(),
                ]),
            Command::new("wait")
                .about("Wait for containers to end, print their exit codes")
                .arg(containers()),
            Command::new("rm").about("Remove containers").args([
                switch("force", Some('f'), "End them first if need be"),
                switch("volumes", Some('v'), "Their volumes without a name, too"),
                containers(),
            ]),
            Command::new("inspect")
                .about("Tell all about containers or images, as JSON")
                .args([
                    format(),
                    Arg::new("name")
                        .value_name("NAME")
                        .required(true)
                        .num_args(1..),
                ]),
            Command::new("check")
                .about("Tell whether this host can run microVMs, and what to do if not")
                .arg(format()),
            Command::new("config")
                .about("Check the host's configuration and list the files it was read from")
                .arg(switch(
                    "effective",
                    None,
                    "Print every setting as it counts, and where it comes from",
                )),
            Command::new("version")
                .about("Print versions")
                .arg(format()),
            Command::new("monitor")
                .hide(true)
                .arg(Arg::new("id").required(true)),
        ])
}

/// The first word and what follows it, of a command made by [`with_rest`].
pub fn rest(matches: &clap::ArgMatches) -> (String, Vec<String>) {
    let Some((first, rest)) = matches.subcommand() else {
        return (String::new(), Vec::new());
    };
    let words = rest
        .get_many::<std::ffi::OsString>("")
        .into_iter()
        .flatten();
    (
        first.to_owned(),
        words
            .map(|word| word.to_string_lossy().into_owned())
            .collect(),
    )
}

/// Values of a repeated flag.
pub fn values<'a>(matches: &'a clap::ArgMatches, name: &str) -> Vec<&'a str> {
    matches
        .get_many::<String>(name)
        .into_iter()
        .flatten()
        .map(String::as_str)
        .collect()
}

/// Value of a flag.
pub fn one<'a>(matches: &'a clap::ArgMatches, name: &str) -> Option<&'a str> {
    matches.get_one::<String>(name).map(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn flags_after_the_image_are_the_commands() {
        let matches = command()
            .try_get_matches_from([
                "caisson", "run", "-it", "-e", "-x", "--rm", "img", "--rm", "-x", "",
            ])
            .unwrap();
        let (_, matches) = matches.subcommand().unwrap();
        assert!(matches.get_flag("tty") && matches.get_flag("rm"));
        assert_eq!(values(matches, "env"), ["-x"]);
        assert_eq!(
            rest(matches),
            (
                "img".to_owned(),
                vec!["--rm".to_owned(), "-x".to_owned(), String::new()]
            )
        );
        assert!(
            command()
                .try_get_matches_from(["caisson", "run", "--no-such-flag", "img"])
                .is_err()
        );
        assert!(command().try_get_matches_from(["caisson", "run"]).is_err());
    }
}
