//! `stop`, `kill`, `wait`, `rm`.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use caisson_sandbox::scaled;
use clap::ArgMatches;
use rustix::process::{Pid, Signal, kill_process};

use crate::{
    arguments::{one, values},
    container::{Container, Containers, Status},
    error::{Error, ShimCode},
    options,
    output::{for_each, say},
    shim::Shim,
    volumes,
};

/// SIGKILL.
const KILL: u32 = 9;

/// After a container's program has been killed, all of it is gone within this time.
const END: Duration = Duration::from_secs(20);

/// Does `work` for each container named; prints the name when it is done, the error when not.
fn each(
    matches: &ArgMatches,
    print: bool,
    mut work: impl FnMut(&Containers, &str) -> Result<(), Error>,
) -> Result<u8, Error> {
    let containers = Containers::open()?;
    Ok(for_each(values(matches, "container"), |name| {
        work(&containers, name)?;
        if print {
            say!("{name}");
        }
        Ok(())
    }))
}

/// Runs `stop`.
///
/// # Errors
/// A time that is none.
pub fn stop(matches: &ArgMatches) -> Result<u8, Error> {
    let patience = match one(matches, "time") {
        None => Some(scaled(Duration::from_secs(10))),
        Some("-1") => None,
        Some(text) => Some(
            text.parse()
                .map(Duration::from_secs)
                .map_err(|_| Error::Usage(format!("-t {text}: not a number of seconds")))?,
        ),
    };
    each(matches, true, |containers, name| {
        let container = containers.find(name)?;
        if !container.is_active() {
            return Ok(());
        }
        crate::event_loop()?.block_on(end(containers, &container, patience))
    })
}

async fn end(
    containers: &Containers,
    container: &Container,
    patience: Option<Duration>,
) -> Result<(), Error> {
    let id = &container.id;
    match Shim::of_bundle(&containers.bundle(id)).await {
        Ok(shim) => {
            let ask = patience.is_none_or(|patience| !patience.is_zero());
            if ask {
                ignore_ended(
                    shim.kill(id, "", container.request.stop_signal, false)
                        .await,
                )?;
            }
            let ended = match patience {
                Some(patience) => tokio::time::timeout(patience, shim.wait(id, ""))
                    .await
                    .is_ok(),
                None => shim.wait(id, "").await.is_ok(),
            };
            if !ended {
                ignore_ended(shim.kill(id, "", KILL, true).await)?;
            }
        }
        // Its end is under way.
        Err(Error::Shim {
            code: ShimCode::Gone,
            ..
        }) => {}
        Err(error) => return Err(error),
    }
    wait_for_end(containers, id)
}

/// A program that has ended in the meantime is what was wanted.
fn ignore_ended(result: Result<(), Error>) -> Result<(), Error> {
    match result {
        Err(Error::Shim {
            code: ShimCode::NotFound | ShimCode::Gone,
            ..
        }) => Ok(()),
        other => other,
    }
}

/// Waits until a container's monitor has written its end, or removed it.
fn wait_for_end(containers: &Containers, id: &str) -> Result<(), Error> {
    let limit = Instant::now() + scaled(END);
    while containers
        .find(id)
        .is_ok_and(|container| container.is_active())
    {
        if Instant::now() > limit {
            return Err(Error::State(format!(
                "container {id} has not ended in {} s",
                scaled(END).as_secs()
            )));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    wait_for_monitor(containers, id, limit);
    Ok(())
}

/// The monitor has little to do once the end is written; whoever comes next finds it gone.
fn wait_for_monitor(containers: &Containers, id: &str, limit: Instant) {
    while Instant::now() < limit
        && containers
            .read(id)
            .is_ok_and(|container| container.is_monitored())
    {
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs `kill`.
///
/// # Errors
/// An unknown signal.
pub fn kill(matches: &ArgMatches) -> Result<u8, Error> {
    let signal = one(matches, "signal").map_or(Ok(KILL), options::signal)?;
    each(matches, true, |containers, name| {
        let container = containers.find(name)?;
        let not_running = || Error::State(format!("container {name} is not running"));
        if container.state.status != Status::Running {
            return Err(not_running());
        }
        let bundle = containers.bundle(&container.id);
        let killed = crate::event_loop()?.block_on(async {
            let shim = Shim::of_bundle(&bundle).await?;
            shim.kill(&container.id, "", signal, false).await
        });
        match killed {
            Err(Error::Shim {
                code: ShimCode::NotFound | ShimCode::Gone,
                ..
            }) => Err(not_running()),
            other => other,
        }
    })
}

/// Runs `wait`.
///
/// # Errors
/// None but those printed.
pub fn wait(matches: &ArgMatches) -> Result<u8, Error> {
    each(matches, false, |containers, name| {
        let container = containers.find(name)?;
        let code = if container.is_active() {
            wait_one(containers, &container)?
        } else {
            container.state.exit_code
        };
        say!("{code}");
        Ok(())
    })
}

/// The shim knows first, and also of containers that are removed at their end.
fn wait_one(containers: &Containers, container: &Container) -> Result<i32, Error> {
    let id = &container.id;
    let bundle = containers.bundle(id);
    let told = crate::event_loop()?.block_on(ask_shim(id, &bundle));
    // Until the monitor has written the end, others see the container running.
    while containers
        .find(id)
        .is_ok_and(|container| container.is_active())
    {
        std::thread::sleep(Duration::from_millis(20));
    }
    match (containers.find(id), told) {
        (Ok(container), _) => Ok(container.state.exit_code),
        (Err(_), Ok(code)) => Ok(i32::try_from(code).unwrap_or(i32::MAX)),
        (Err(error), Err(_)) => Err(error),
    }
}

async fn ask_shim(id: &str, bundle: &Path) -> Result<u32, Error> {
    Shim::of_bundle(bundle).await?.wait(id, "").await
}

/// Runs `rm`.
///
/// # Errors
/// None but those printed.
pub fn remove(matches: &ArgMatches) -> Result<u8, Error> {
    let force = matches.get_flag("force");
    each(matches, false, |containers, name| {
        let container = match containers.find(name) {
            // As docker: -f is content when there is nothing.
            Err(error @ Error::NoSuchContainer(_)) if force => {
                eprintln!("caisson: {error}");
                return Ok(());
            }
            Err(Error::DamagedContainer { id, .. }) if force => {
                containers.remove_damaged(&id)?;
                say!("{name}");
                return Ok(());
            }
            other => other?,
        };
        if container.is_active() {
            if !force {
                return Err(Error::State(format!(
                    "cannot remove container \"{name}\": container is running: stop it first, or use -f"
                )));
            }
            end_by_force(containers, &container)?;
        } else {
            // Its monitor may still be at its last steps.
            wait_for_monitor(containers, &container.id, Instant::now() + scaled(END));
        }
        if matches.get_flag("volumes") {
            volumes::remove_container(containers, &container)?;
        } else {
            containers.remove(&container.id)?;
        }
        say!("{name}");
        Ok(())
    })
}

/// The monitor ends the container and cleans up; one that does not is killed itself, and
/// `Containers::find` cleans up after it.
fn end_by_force(containers: &Containers, container: &Container) -> Result<(), Error> {
    let signal = |signal| {
        if let Some(monitor) = container.monitor.filter(|_| container.is_monitored())
            && let Some(pid) = i32::try_from(monitor.pid).ok().and_then(Pid::from_raw)
        {
            let _ = kill_process(pid, signal);
        }
    };
    signal(Signal::TERM);
    match wait_for_end(containers, &container.id) {
        Ok(()) => Ok(()),
        Err(_) => {
            signal(Signal::KILL);
            wait_for_end(containers, &container.id)
        }
    }
}
