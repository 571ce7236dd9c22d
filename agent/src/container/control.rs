//! What is done to processes that are there, and what is told of them.

use std::collections::HashMap;

use caisson_protocol::agent::{self, ProcessInfo, StateResponse, Status};
use oci_spec::runtime::LinuxResources;
use rustix::{
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
    termios::{Winsize, tcsetwinsize},
};

use super::{Manager, table::State};
use crate::failure::{During, Failure, Kind, Result};

impl Manager {
    /// Sends a signal to a process, or to all of a container.
    ///
    /// # Errors
    /// No such signal or process, or it has ended (`NotFound`, as containerd expects).
    pub fn signal(&self, request: &agent::SignalRequest) -> Result<()> {
        let number = i32::try_from(request.signal).unwrap_or(0);
        if !(1..=64).contains(&number) {
            return Err(Failure::invalid(format!("{} is no signal", request.signal)));
        }
        let mut table = self.table();
        let container = table.container(&request.container_id)?;
        if request.all {
            if number == libc::SIGKILL {
                return container.cgroup.kill();
            }
            for pid in container.cgroup.processes() {
                // One that has just ended needs no signal.
                let _ = send_signal(pid, number);
            }
            return Ok(());
        }
        let process = container.process(&request.exec_id)?;
        let pid = process.pid();
        if pid == 0 || matches!(process.state, State::Stopped(_)) {
            return Err(Failure::new(Kind::NotFound, "process already finished"));
        }
        send_signal(pid, number)
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// It has none.
    pub fn resize(&self, request: &agent::ResizePtyRequest) -> Result<()> {
        let mut table = self.table();
        let process = table.process(&request.container_id, &request.exec_id)?;
        let clip = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
        let size = (clip(request.rows), clip(request.columns));
        process.size = size;
        match &process.terminal {
            Some(terminal) => {
                let size = Winsize {
                    ws_row: size.0,
                    ws_col: size.1,
                    ws_xpixel: 0,
                    ws_ypixel: 0,
                };
                tcsetwinsize(terminal, size).during(|| "resize the terminal".to_owned())
            }
            None if process
                .pending
                .as_ref()
                .is_some_and(|pending| pending.terminal) =>
            {
                Ok(())
            }
            None => Err(Failure::new(
                Kind::FailedPrecondition,
                "the process has no terminal",
            )),
        }
    }

    /// Ends a process's stdin once what was sent is read.
    ///
    /// # Errors
    /// No such process.
    pub fn close_stdin(&self, container_id: &str, exec_id: &str) -> Result<()> {
        self.table()
            .process(container_id, exec_id)?
            .close_stdin
            .notify_one();
        Ok(())
    }

    /// Processes of a container.
    ///
    /// # Errors
    /// No such container.
    pub fn processes(&self, id: &str) -> Result<Vec<ProcessInfo>> {
        let mut table = self.table();
        let container = table.container(id)?;
        let named: HashMap<u32, &String> = container
            .execs
            .iter()
            .map(|(id, exec)| (exec.pid(), id))
            .collect();
        Ok(container
            .cgroup
            .processes()
            .into_iter()
            .map(|pid| {
                let (inner, command) = describe(pid);
                ProcessInfo {
                    pid: inner,
                    guest_pid: pid,
                    exec_id: named.get(&pid).map(|id| (*id).clone()).unwrap_or_default(),
                    command,
                    ..Default::default()
                }
            })
            .collect())
    }

    /// State of a process.
    ///
    /// # Errors
    /// No such process.
    pub fn state(&self, container_id: &str, exec_id: &str) -> Result<StateResponse> {
        let mut table = self.table();
        let paused = table.container(container_id)?.paused;
        let process = table.process(container_id, exec_id)?;
        let (status, exit) = match &process.state {
            State::Created(_) => (Status::STATUS_CREATED, None),
            State::Starting { .. } | State::Running { .. } if paused => {
                (Status::STATUS_PAUSED, None)
            }
            State::Starting { .. } | State::Running { .. } => (Status::STATUS_RUNNING, None),
            State::Stopped(exit) => (Status::STATUS_STOPPED, Some(exit.clone())),
        };
        Ok(StateResponse {
            status: status.into(),
            exit: exit.into(),
            pid: process.pid(),
            ..Default::default()
        })
    }

    /// Stops or continues all of a container's processes.
    ///
    /// # Errors
    /// It does not run, or will not stop.
    pub async fn pause(&self, id: &str, paused: bool) -> Result<()> {
        let cgroup = {
            let mut table = self.table();
            let container = table.container(id)?;
            container.running(id)?;
            container.cgroup.clone()
        };
        cgroup.freeze(paused).await?;
        self.table().container(id)?.paused = paused;
        Ok(())
    }

    /// Changes limits of a container.
    ///
    /// # Errors
    /// A limit that cannot be set.
    pub fn update(&self, id: &str, resources_json: &[u8]) -> Result<()> {
        let resources: LinuxResources = serde_json::from_slice(resources_json)
            .map_err(|error| Failure::invalid(format!("malformed resources: {error}")))?;
        self.table().container(id)?.cgroup.update(&resources)
    }

    /// Figures of a container.
    ///
    /// # Errors
    /// No such container.
    pub fn stats(&self, id: &str) -> Result<agent::StatsResponse> {
        Ok(crate::resources::stats(
            self.table().container(id)?.cgroup.path(),
        ))
    }
}

fn send_signal(pid: u32, number: i32) -> Result<()> {
    let gone = || Failure::new(Kind::NotFound, "process already finished");
    let pid = i32::try_from(pid)
        .ok()
        .and_then(Pid::from_raw)
        .ok_or_else(gone)?;
    let signal = Signal::from_named_raw(number);
    match signal {
        Some(signal) => pidfd_open(pid, PidfdFlags::empty())
            .and_then(|pidfd| pidfd_send_signal(pidfd, signal))
            .map_err(|_| gone()),
        None => {
            // SAFETY: kill(2) takes any two integers; this one names a process that is ours to reap.
            match unsafe { libc::kill(pid.as_raw_pid(), number) } {
                0 => Ok(()),
                _ => Err(gone()),
            }
        }
    }
}

/// PID in the innermost namespace, and the command.
fn describe(pid: u32) -> (u32, String) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let inner = status
        .lines()
        .find_map(|line| line.strip_prefix("NSpid:"))
        .and_then(|list| list.split_whitespace().last()?.parse().ok())
        .unwrap_or(pid);
    let command = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let words: Vec<_> = command
        .split(|byte| *byte == 0)
        .filter(|word| !word.is_empty())
        .collect();
    (
        inner,
        String::from_utf8_lossy(&words.join(&b' ')).into_owned(),
    )
}
