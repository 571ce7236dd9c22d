//! `start`, `kill`, `delete`, `pause`, `resume`.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use caisson_sandbox::{hooks, scaled};
use clap::ArgMatches;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::{
    create::explained,
    state::{Container, Root, Status, live_process},
};
use crate::{
    arguments::one,
    error::{Error, ShimCode},
    options,
    shim::{self, Shim},
};

/// SIGKILL.
const KILL: u32 = 9;

/// After its container was killed, a process has cleaned up within this time.
const END: Duration = Duration::from_secs(20);

fn container(root: &Root, matches: &ArgMatches) -> Result<Container, Error> {
    root.find(one(matches, "id").unwrap_or_default())
}

fn wrong_state(container: &Container, what: &str, status: Status) -> Error {
    Error::State(format!(
        "cannot {what} container {}: it is {}",
        container.record.id,
        status.word()
    ))
}

/// Runs `start`.
///
/// # Errors
/// It was started already, or its program cannot be run.
pub fn start(root: &Root, matches: &ArgMatches) -> Result<u8, Error> {
    let container = container(root, matches)?;
    crate::event_loop()?.block_on(async {
        match container.status().await {
            (Status::Created, Some(shim)) => shim
                .start(&container.record.id, "")
                .await
                .map_err(explained),
            (status, _) => Err(wrong_state(&container, "start", status)),
        }
    })?;
    let state = container.state(Status::Running);
    let hooks = &container.record.hooks;
    warn(&hooks::run_all("poststart", &hooks.poststart, &state));
    Ok(0)
}

/// Runs `kill`.
///
/// # Errors
/// An unknown signal; the container does not run.
pub fn kill(root: &Root, matches: &ArgMatches) -> Result<u8, Error> {
    let container = container(root, matches)?;
    let signal = options::signal(one(matches, "signal").unwrap_or("TERM"))?;
    let all = matches.get_flag("all");
    // Words that containerd's runc shim looks for.
    let not_running = || Error::State(format!("container not running: {}", container.record.id));
    crate::event_loop()?.block_on(async {
        let (Status::Created | Status::Running | Status::Paused, Some(shim)) =
            container.status().await
        else {
            return Err(not_running());
        };
        match shim.kill(&container.record.id, "", signal, all).await {
            Err(Error::Shim {
                code: ShimCode::NotFound | ShimCode::Gone,
                ..
            }) => Err(not_running()),
            other => other,
        }
    })?;
    Ok(0)
}

/// Runs `pause` and `resume`.
///
/// # Errors
/// The container does not run, or is not paused.
pub fn pause(root: &Root, matches: &ArgMatches, paused: bool) -> Result<u8, Error> {
    let container = container(root, matches)?;
    let (from, what) = if paused {
        (Status::Running, "pause")
    } else {
        (Status::Paused, "resume")
    };
    crate::event_loop()?.block_on(async {
        match container.status().await {
            (status, Some(shim)) if status == from => {
                shim.pause(&container.record.id, paused).await
            }
            (status, _) => Err(wrong_state(&container, what, status)),
        }
    })?;
    Ok(0)
}

/// Runs `delete`.
///
/// # Errors
/// It runs and is not to be ended by force; something of it could not be removed.
pub fn delete(root: &Root, matches: &ArgMatches) -> Result<u8, Error> {
    let force = matches.get_flag("force");
    let id = one(matches, "id").unwrap_or_default();
    let container = match root.find(id) {
        Err(Error::State(text)) if force && text.contains("does not exist") => return Ok(0),
        other => other?,
    };
    let (status, _) = crate::event_loop()?.block_on(container.status());
    if !force && !matches!(status, Status::Stopped | Status::Created) {
        return Err(Error::State(format!(
            "cannot delete container {id} that is not stopped: {}",
            status.word()
        )));
    }
    remove(root, &container)?;
    let state = container.state(Status::Stopped);
    let hooks = &container.record.hooks;
    warn(&hooks::run_all("poststop", &hooks.poststop, &state));
    Ok(0)
}

fn warn(failures: &[hooks::HookError]) {
    for failure in failures {
        eprintln!("caisson: warning: {failure}");
    }
}

/// Ends a container and removes all of it. Can be repeated.
///
/// # Errors
/// Something of it could not be removed; its directory stays then.
pub fn remove(root: &Root, container: &Container) -> Result<(), Error> {
    let (record, directory) = (&container.record, &container.directory);
    if container.exit().is_none() {
        crate::event_loop()?.block_on(async {
            if let Ok(shim) = Shim::of_bundle(&container.shim_bundle()).await {
                // It may have ended at this moment.
                let _ = shim.kill(&record.id, "", KILL, true).await;
            }
        });
    }
    end_process(&directory.join("monitor.json"), scaled(END));
    end_process(
        &directory.join("process.json"),
        scaled(Duration::from_secs(2)),
    );
    end_execs(directory);
    let exit = container.exit();
    if exit.is_none_or(|exit| !exit.clean) && container.shim_bundle().join("config.json").exists() {
        let name = (root.namespace.as_str(), record.id.as_str());
        shim::delete(&root.config, name, &container.shim_bundle())?;
    }
    if exit.is_some_and(|exit| exit.oom) {
        let _ = fs::remove_file(record.bundle.join("oom"));
    }
    if let Some(cgroup) = &record.cgroup {
        cgroup.remove()?;
    }
    root.remove(directory)
}

/// Processes of execs end with their container.
fn end_execs(directory: &Path) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with("exec-") {
            end_process(
                &entry.path().join("process.json"),
                scaled(Duration::from_secs(2)),
            );
        }
    }
}

/// Waits for the end of the process that a file names; kills it when it takes longer than `limit`.
fn end_process(file: &Path, limit: Duration) {
    let alive = || live_process(file);
    let end = Instant::now() + limit;
    while alive().is_some() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
    let Some(identity) = alive() else { return };
    let Some(pid) = i32::try_from(identity.pid).ok().and_then(Pid::from_raw) else {
        return;
    };
    // Held before it is looked at again, so that the signal cannot go to a later process.
    if let Ok(process) = pidfd_open(pid, PidfdFlags::empty())
        && alive() == Some(identity)
    {
        let _ = pidfd_send_signal(&process, Signal::KILL);
        let end = Instant::now() + scaled(Duration::from_secs(2));
        while alive().is_some() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}
