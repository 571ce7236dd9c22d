//! `caisson` as an OCI runtime: runc's verbs on bundles, for podman's conmon, containerd's runc
//! shim and people.
//!
//! Each container has two processes on the host: one that stands for its first process in the eyes
//! of callers ([`stand_in`]), and one that carries the streams and looks after it ([`monitor`]). What is known of a container is in
//! `<root>/<id>` ([`state`]).

mod arguments;
mod bundle;
mod cgroup;
mod console;
mod create;
mod events;
mod exec;
mod features;
mod foreground;
mod handshake;
mod lifecycle;
mod log;
mod monitor;
mod process;
mod relay;
mod report;
mod stand_in;
mod state;
mod update;

use std::process::ExitCode;

use clap::ArgMatches;

use crate::{arguments::one, error::Error};
use state::Root;

/// Runs the command line if it is one of an OCI runtime.
pub fn run() -> Option<ExitCode> {
    let words: Vec<String> = std::env::args_os()
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    if !arguments::is_meant(&words, state::is_known) {
        return None;
    }
    if let [_, verb, rest @ ..] = words.as_slice()
        && verb == arguments::STAY
    {
        return Some(monitor::run(rest));
    }
    if let [_, verb, rest @ ..] = words.as_slice()
        && verb == stand_in::VERB
    {
        return Some(stand_in::run(rest));
    }
    let matches = match arguments::command().try_get_matches_from(words) {
        Ok(matches) => matches,
        Err(error) => {
            // A stdout that is closed is nobody's concern.
            let _ = error.print();
            return Some(ExitCode::from(u8::from(error.use_stderr())));
        }
    };
    Some(match dispatch(&matches) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let text = error.to_string();
            eprintln!("caisson: {text}");
            if let Err(error) = log::append(&matches, &text) {
                eprintln!("caisson: {error}");
            }
            ExitCode::from(match error {
                Error::Exit { code, .. } => code,
                _ => 1,
            })
        }
    })
}

fn dispatch(matches: &ArgMatches) -> Result<u8, Error> {
    log::check(matches)?;
    if let Some(rootless) = one(matches, "rootless")
        && !["auto", "false"].contains(&rootless)
    {
        return Err(Error::Usage(format!(
            "--rootless {rootless}: microVMs need root; there are auto and false"
        )));
    }
    let Some((verb, rest)) = matches.subcommand() else {
        return Err(Error::Usage("a command is missing".to_owned()));
    };
    match verb {
        "features" => return features::run(),
        "spec" => return report::spec(rest),
        _ => {}
    }
    let root = Root::open(one(matches, "root"))?;
    match verb {
        "create" => {
            let flags = create::Flags {
                systemd_cgroup: matches.get_flag("systemd-cgroup"),
                debug: matches.get_flag("debug"),
            };
            create::run(&root, flags, rest)
        }
        "start" => lifecycle::start(&root, rest),
        "state" => report::state(&root, rest),
        "kill" => lifecycle::kill(&root, rest),
        "delete" => lifecycle::delete(&root, rest),
        "exec" => exec::run(&root, rest),
        "ps" => report::ps(&root, rest),
        "pause" => lifecycle::pause(&root, rest, true),
        "resume" => lifecycle::pause(&root, rest, false),
        "update" => update::run(&root, rest),
        "events" => events::run(&root, rest),
        "list" => report::list(&root, rest),
        other => Err(Error::Usage(format!("unknown command \"{other}\""))),
    }
}
