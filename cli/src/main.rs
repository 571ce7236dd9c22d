//! `caisson`: containers in microVMs, by docker's verbs and, for other programs, as an OCI runtime.
#![deny(unsafe_code)]
// Panics when it cannot: see `output`.
#![deny(clippy::print_stdout)]

mod arguments;
mod attach;
mod check;
mod config;
mod container;
mod copy;
mod document;
mod drain;
mod error;
mod exec;
mod images;
mod inspect;
mod lifecycle;
mod lock;
mod log_file;
mod login;
mod logs;
mod metrics;
mod monitor;
mod mounts;
mod network;
mod oci;
mod options;
mod output;
mod ps;
mod pull;
mod rootless;
mod run;
mod sandboxes;
mod save;
mod seccomp;
mod shim;
mod spec;
mod terminal;
mod version;
mod volumes;

use std::process::ExitCode;

use error::Error;

fn main() -> ExitCode {
    if let Some(code) = oci::run() {
        return code;
    }
    let matches = match arguments::command().try_get_matches() {
        Ok(matches) => matches,
        Err(error) => {
            // Help is no error; a stdout that is closed is nobody's concern.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 125 } else { 0 });
        }
    };
    let Some((verb, matches)) = matches.subcommand() else {
        return ExitCode::from(125);
    };
    let of_run = verb == "run";
    let done = rootless::enter(verb)
        .map_err(Error::from)
        .and_then(|()| dispatch(verb, matches))
        .and_then(|code| output::result().map(|()| code));
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("caisson: {error}");
            ExitCode::from(if of_run {
                error.run_code()
            } else {
                error.code()
            })
        }
    }
}

fn dispatch(verb: &str, matches: &clap::ArgMatches) -> Result<u8, Error> {
    match verb {
        "run" => run::run(matches),
        "monitor" => monitor::run(matches),
        "exec" => exec::run(matches),
        "cp" => copy::run(matches),
        "ps" => ps::run(matches),
        "metrics" => metrics::run(matches),
        "logs" => logs::run(matches),
        "stop" => lifecycle::stop(matches),
        "kill" => lifecycle::kill(matches),
        "wait" => lifecycle::wait(matches),
        "rm" => lifecycle::remove(matches),
        "inspect" => inspect::run(matches),
        "images" => images::list(matches),
        "load" => images::load(matches),
        "rmi" => images::remove(matches),
        "save" => save::run(matches),
        "tag" => images::tag(matches),
        "image" => images::noun(matches),
        "pull" => pull::run(matches),
        "login" => login::log_in(matches),
        "logout" => login::log_out(matches),
        "volume" => volumes::noun(matches),
        "network" => network::noun(matches),
        "port" => network::port(matches),
        "check" => check::run(matches),
        "config" => config::run(matches),
        "version" => version::run(matches),
        other => Err(Error::Usage(format!("unknown command \"{other}\""))),
    }
}

/// An event loop for what speaks to a shim.
fn event_loop() -> Result<tokio::runtime::Runtime, Error> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::io("start the event loop"))
}

/// What a user asks for by `--format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Table,
    Json,
}

impl Format {
    fn of(matches: &clap::ArgMatches) -> Result<Self, Error> {
        match matches.get_one::<String>("format").map(String::as_str) {
            None | Some("table") => Ok(Self::Table),
            Some("json" | "{{json .}}") => Ok(Self::Json),
            Some(other) => Err(Error::Usage(format!(
                "--format {other}: there are table and json"
            ))),
        }
    }
}
