//! `exec`.

use std::{
    fs,
    io::{IsTerminal, stderr, stdin, stdout},
    os::fd::AsFd,
    path::Path,
    time::Duration,
};

use caisson_sandbox::scaled;
use clap::ArgMatches;
use serde_json::{Value, json};

use super::{
    bundle::read,
    console,
    create::{check_console, explained, refuse_descriptors, write_pid},
    handshake::{Link, Order},
    monitor::exec_directory,
    process,
    state::{self, Container, Root, Status},
};
use crate::{
    arguments::{one, values},
    container::Containers,
    error::Error,
};

/// Until the program runs; the shim has shorter limits of its own.
const START_LIMIT: Duration = Duration::from_secs(60);

/// Largest process object.
const MAX_PROCESS: u64 = 4 << 20;

/// Runs the verb.
///
/// # Errors
/// The container does not run, or the program cannot be run.
pub fn run(root: &Root, matches: &ArgMatches) -> Result<u8, Error> {
    process::keep_descriptors()?;
    refuse_descriptors(matches)?;
    let container = root.find(one(matches, "id").unwrap_or_default())?;
    let process = process_of(&container, matches)?;
    let terminal = process["terminal"] == true;
    let (detach, socket) = (matches.get_flag("detach"), one(matches, "console-socket"));
    if detach || socket.is_some() {
        check_console(terminal, socket)?;
    } else if terminal && !stdin().is_terminal() {
        return Err(Error::Usage(
            "a terminal is asked for, and standard input is none; there is --console-socket"
                .to_owned(),
        ));
    }
    let (status, _) = crate::event_loop()?.block_on(container.status());
    match status {
        Status::Running => {}
        Status::Paused if matches.get_flag("ignore-paused") => {}
        Status::Paused => {
            return Err(Error::State(
                "cannot exec in a paused container (use --ignore-paused to override)".to_owned(),
            ));
        }
        other => {
            return Err(Error::State(format!(
                "cannot exec in container {} that is not running: it is {}",
                container.record.id,
                other.word()
            )));
        }
    }
    let exec = Containers::new_id()?.split_off(48);
    let directory = exec_directory(&container.directory, &exec);
    fs::create_dir(&directory).map_err(Error::file("create", &directory))?;
    let ran = state::write(&directory.join("process-spec.json"), process.to_string())
        .and_then(|()| run_in(&container, &exec, &process, socket, matches));
    ran.map_err(|error| {
        let _ = fs::remove_dir_all(&directory);
        match explained(error) {
            // As runc: whether the program or the runtime failed is told by its words.
            Error::State(message) | Error::Shim { message, .. } => Error::Exit {
                code: 255,
                message: format!("exec failed: {message}"),
            },
            other => other,
        }
    })
}

fn run_in(
    container: &Container,
    exec: &str,
    process: &Value,
    socket: Option<&str>,
    matches: &ArgMatches,
) -> Result<u8, Error> {
    let terminal = process["terminal"] == true;
    let clip = |value: &Value| value.as_u64().and_then(|number| u16::try_from(number).ok());
    let size = clip(&process["consoleSize"]["height"]).zip(clip(&process["consoleSize"]["width"]));
    let order = Order {
        directory: container.directory.clone(),
        exec: Some(exec.to_owned()),
        terminal,
        debug: false,
        cgroup: container.record.cgroup.clone().filter(|place| {
            // systemd's scope is entered as any cgroup once it is there.
            place.systemd.is_none()
        }),
    };
    let foreground = (terminal && socket.is_none())
        .then(super::foreground::Terminal::open)
        .transpose()?;
    let slave = match (socket, &foreground) {
        (Some(socket), _) => Some(console::make(Path::new(socket), size)?),
        (None, Some(own)) => Some(own.slave()?),
        (None, None) => None,
    };
    let (stdin, stdout, stderr) = (stdin(), stdout(), stderr());
    let mut link = match &slave {
        Some(slave) => Link::start(&order, &[slave.as_fd()])?,
        None => Link::start(&order, &[stdin.as_fd(), stdout.as_fd(), stderr.as_fd()])?,
    };
    drop(slave);
    let started = link
        .next(scaled(START_LIMIT))
        .and_then(|_| link.go())
        .and_then(|()| link.next(scaled(START_LIMIT)))
        .and_then(|_| write_pid(matches, link.pid));
    if let Err(error) = started {
        link.give_up(scaled(Duration::from_secs(5)));
        return Err(error);
    }
    if matches.get_flag("detach") {
        return Ok(0);
    }
    super::foreground::wait(link, foreground)
}

/// The process object: given as a file, or the container's own with what the flags change.
fn process_of(container: &Container, matches: &ArgMatches) -> Result<Value, Error> {
    let words = values(matches, "command");
    let mut process = match one(matches, "process") {
        Some(path) => {
            let file = Path::new(path);
            serde_json::from_slice(&read(file, MAX_PROCESS)?)
                .map_err(|error| Error::State(format!("{path} is no OCI process: {error}")))?
        }
        None if words.is_empty() => {
            return Err(Error::Usage(
                "exec needs a command, or a file by --process".to_owned(),
            ));
        }
        None => by_flags(container, matches, &words)?,
    };
    serde_json::from_value::<oci_spec::runtime::Process>(process.clone())
        .map_err(|error| Error::State(format!("the process is no OCI process: {error}")))?;
    if matches.get_flag("tty") {
        process["terminal"] = json!(true);
    }
    Ok(process)
}

fn by_flags(container: &Container, matches: &ArgMatches, words: &[&str]) -> Result<Value, Error> {
    let path = container.shim_bundle().join("config.json");
    let text = fs::read(&path).map_err(Error::file("read", &path))?;
    let config: Value = serde_json::from_slice(&text)
        .map_err(|error| Error::file("read", &path)(std::io::Error::other(error)))?;
    let mut process = config["process"].clone();
    process["args"] = json!(words);
    process["terminal"] = json!(false);
    if let Some(object) = process.as_object_mut() {
        object.remove("consoleSize");
    }
    if let Some(directory) = one(matches, "cwd") {
        process["cwd"] = json!(directory);
    }
    if let Some(user) = one(matches, "user") {
        let (uid, gid) = user.split_once(':').unwrap_or((user, ""));
        let number = |text: &str| {
            text.parse::<u32>()
                .map_err(|_| Error::Usage(format!("--user {user}: not UID[:GID], in numbers")))
        };
        process["user"]["uid"] = json!(number(uid)?);
        if !gid.is_empty() {
            process["user"]["gid"] = json!(number(gid)?);
        }
    }
    let groups = values(matches, "additional-gids")
        .iter()
        .map(|text| {
            text.parse::<u32>()
                .map_err(|_| Error::Usage(format!("--additional-gids {text}: not a number")))
        })
        .collect::<Result<Vec<_>, _>>()?;
    append(
        &mut process["user"]["additionalGids"],
        groups.into_iter().map(Value::from),
    );
    let variables = values(matches, "env");
    if let Some(wrong) = variables.iter().find(|text| !text.contains('=')) {
        return Err(Error::Usage(format!("--env {wrong}: not NAME=VALUE")));
    }
    append(
        &mut process["env"],
        variables.iter().map(|text| json!(text)),
    );
    for capability in values(matches, "cap") {
        let name = capability.to_ascii_uppercase();
        let name = if name.starts_with("CAP_") {
            name
        } else {
            format!("CAP_{name}")
        };
        for set in ["bounding", "effective", "permitted"] {
            append(
                &mut process["capabilities"][set],
                std::iter::once(json!(name)),
            );
        }
    }
    if matches.get_flag("no-new-privs") {
        process["noNewPrivileges"] = json!(true);
    }
    Ok(process)
}

/// Adds to an array, which may not be there yet.
fn append(place: &mut Value, more: impl Iterator<Item = Value>) {
    let mut all = place.as_array().cloned().unwrap_or_default();
    all.extend(more);
    if !all.is_empty() {
        *place = Value::Array(all);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::state::Record;

    #[test]
    fn flags_change_the_containers_own_process() {
        let directory = tempfile::tempdir().unwrap();
        let container = Container {
            directory: directory.path().to_owned(),
            record: Record::new("x"),
        };
        fs::create_dir(container.shim_bundle()).unwrap();
        fs::write(
            container.shim_bundle().join("config.json"),
            r#"{"process":{"terminal":true,"consoleSize":{"height":1,"width":2},"cwd":"/","user":{"uid":0,"gid":0},"args":["sh"],"env":["A=b"]}}"#,
        )
        .unwrap();
        let process = |line: &str| {
            let matches = super::super::arguments::command()
                .try_get_matches_from(line.split(' '))
                .unwrap();
            process_of(&container, matches.subcommand().unwrap().1)
        };
        let made = process(
            "caisson exec -t -u 5:6 -g 7 -e C=d --cwd /tmp --cap net_admin --no-new-privs x ls -l",
        )
        .unwrap();
        assert_eq!(
            made,
            json!({
                "terminal": true, "cwd": "/tmp", "args": ["ls", "-l"], "env": ["A=b", "C=d"],
                "user": { "uid": 5, "gid": 6, "additionalGids": [7] },
                "capabilities": { "bounding": ["CAP_NET_ADMIN"], "effective": ["CAP_NET_ADMIN"], "permitted": ["CAP_NET_ADMIN"] },
                "noNewPrivileges": true,
            })
        );
        assert_eq!(process("caisson exec x ls").unwrap()["terminal"], false);
        for wrong in [
            "caisson exec x",
            "caisson exec -u root x ls",
            "caisson exec -e A x ls",
            "caisson exec -g a x ls",
            "caisson exec --process /no/such/file x",
        ] {
            assert!(process(wrong).is_err(), "{wrong}");
        }
    }
}
