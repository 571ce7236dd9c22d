//! Processes: containers' first ones and execs.

use std::{
    sync::PoisonError,
    time::{Duration, UNIX_EPOCH},
};

use caisson_protocol::{
    agent::{
        CreateExecRequest, ProcessExit, ProcessId, ResizePtyRequest, SignalRequest, StatsRequest,
        StatsResponse, StdioRequest,
    },
    stdio::{Stream, TOKEN_LEN},
};

use super::{Created, Exit, ProcessInfo, Sandbox, State, Status, Stdio, Streams, lie};
use crate::{error::Error, spec};

impl Sandbox {
    /// Creates another process in a running container.
    ///
    /// # Errors
    /// No such container, it does not run, the exec exists.
    pub async fn create_exec(
        &self,
        container: &str,
        exec: &str,
        process_json: Vec<u8>,
        stdio: &Stdio,
    ) -> Result<Created, Error> {
        let message = CreateExecRequest {
            container_id: container.to_owned(),
            exec_id: exec.to_owned(),
            process_json: spec::translate_process(&process_json)?,
            stdio: Some(stdio_message(stdio)).into(),
            ..Default::default()
        };
        let response = self
            .agent
            .call("create the process", |client, context| async move {
                client.create_exec(context, &message).await
            })
            .await?;
        match self.connect(&response.stdio_token, stdio).await {
            Ok(streams) => Ok(Created {
                pid: response.pid,
                streams,
            }),
            Err(error) => {
                let _ = self.delete_process(container, exec).await;
                Err(error)
            }
        }
    }

    pub(super) async fn connect(&self, token: &[u8], stdio: &Stdio) -> Result<Streams, Error> {
        let token: [u8; TOKEN_LEN] = token
            .try_into()
            .map_err(|_| lie("sent a malformed token"))?;
        let mut streams = Streams::default();
        let wanted = [
            (stdio.terminal, Stream::Terminal, &mut streams.terminal),
            (
                stdio.stdin && !stdio.terminal,
                Stream::Stdin,
                &mut streams.stdin,
            ),
            (
                stdio.stdout && !stdio.terminal,
                Stream::Stdout,
                &mut streams.stdout,
            ),
            (
                stdio.stderr && !stdio.terminal,
                Stream::Stderr,
                &mut streams.stderr,
            ),
        ];
        for (asked, stream, place) in wanted {
            if asked {
                let connected = tokio::select! {
                    gone = self.vmm.wait_gone() => Err(Error::Gone(gone)),
                    connected = crate::vsock::stdio(&self.vsock, token, stream) => connected,
                };
                *place = Some(connected?);
            }
        }
        Ok(streams)
    }

    /// Lets a created process run its program; `exec` is empty for a container's first. Returns
    /// its pid in the guest.
    ///
    /// # Errors
    /// The program cannot be run ([`crate::AgentErrorKind::NotFound`], [`crate::AgentErrorKind::PermissionDenied`]).
    pub async fn start_process(&self, container: &str, exec: &str) -> Result<u32, Error> {
        let request = process_id(container, exec);
        let response = if exec.is_empty() {
            // The pod's network may have been made since it was booted.
            self.sync_network().await?;
            self.agent
                .call("start the container", |client, context| async move {
                    client.start_container(context, &request).await
                })
                .await?
        } else {
            self.agent
                .call("start the process", |client, context| async move {
                    client.start_exec(context, &request).await
                })
                .await?
        };
        Ok(response.pid)
    }

    /// Deletes a process that does not run. A container's first takes the container along.
    ///
    /// # Errors
    /// It runs, or there is none.
    pub async fn delete_process(&self, container: &str, exec: &str) -> Result<Exit, Error> {
        if !exec.is_empty() {
            let request = process_id(container, exec);
            let exit = self
                .agent
                .call("delete the process", |client, context| async move {
                    client.delete_exec(context, &request).await
                })
                .await?;
            return Ok(exit_of(&exit));
        }
        let exit = self.delete_in_guest(container).await?;
        let holdings = {
            let mut containers = self
                .containers
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            containers.remove(container).unwrap_or_default()
        };
        self.release(holdings).await;
        self.take_room(container).await;
        Ok(exit)
    }

    /// Deletes a container in the guest alone.
    pub(super) async fn delete_in_guest(&self, container: &str) -> Result<Exit, Error> {
        let request = process_id(container, "");
        let exit = self
            .agent
            .call("delete the container", |client, context| async move {
                client.delete_container(context, &request).await
            })
            .await?;
        Ok(exit_of(&exit))
    }

    /// Sends a signal to a process, or to all of a container.
    ///
    /// # Errors
    /// It has ended ([`crate::AgentErrorKind::NotFound`]).
    pub async fn signal(
        &self,
        container: &str,
        exec: &str,
        signal: u32,
        all: bool,
    ) -> Result<(), Error> {
        let request = SignalRequest {
            container_id: container.to_owned(),
            exec_id: exec.to_owned(),
            signal,
            all,
            ..Default::default()
        };
        self.agent
            .call("send the signal", |client, context| async move {
                client.signal_process(context, &request).await
            })
            .await
            .map(drop)
    }

    /// Sets the size of a process's terminal.
    ///
    /// # Errors
    /// It has none.
    pub async fn resize(
        &self,
        container: &str,
        exec: &str,
        rows: u32,
        columns: u32,
    ) -> Result<(), Error> {
        let request = ResizePtyRequest {
            container_id: container.to_owned(),
            exec_id: exec.to_owned(),
            rows,
            columns,
            ..Default::default()
        };
        self.agent
            .call("resize the terminal", |client, context| async move {
                client.resize_pty(context, &request).await
            })
            .await
            .map(drop)
    }

    /// Ends a process's stdin once all that was sent is read.
    ///
    /// # Errors
    /// No such process.
    pub async fn close_stdin(&self, container: &str, exec: &str) -> Result<(), Error> {
        let request = process_id(container, exec);
        self.agent
            .call("close the standard input", |client, context| async move {
                client.close_stdin(context, &request).await
            })
            .await
            .map(drop)
    }

    /// Processes of a container.
    ///
    /// # Errors
    /// No such container.
    pub async fn processes(&self, container: &str) -> Result<Vec<ProcessInfo>, Error> {
        let request = process_id(container, "");
        let response = self
            .agent
            .call("list the processes", |client, context| async move {
                client.list_processes(context, &request).await
            })
            .await?;
        let processes = response.processes.into_iter().map(|process| ProcessInfo {
            pid: process.pid,
            guest_pid: process.guest_pid,
            exec: process.exec_id,
            command: process.command,
        });
        Ok(processes.collect())
    }

    /// State of a process.
    ///
    /// # Errors
    /// No such process.
    pub async fn state(&self, container: &str, exec: &str) -> Result<State, Error> {
        use caisson_protocol::agent::Status as Wire;
        let request = process_id(container, exec);
        let response = self
            .agent
            .call("tell the state", |client, context| async move {
                client.state(context, &request).await
            })
            .await?;
        let status = match response.status.enum_value() {
            Ok(Wire::STATUS_CREATED) => Status::Created,
            Ok(Wire::STATUS_RUNNING) => Status::Running,
            Ok(Wire::STATUS_STOPPED) => Status::Stopped,
            Ok(Wire::STATUS_PAUSED) => Status::Paused,
            _ => return Err(lie("sent an unknown state")),
        };
        Ok(State {
            status,
            pid: response.pid,
            exit: response.exit.as_ref().map(exit_of),
        })
    }

    /// Freezes or thaws a container.
    ///
    /// # Errors
    /// It does not run.
    pub async fn pause(&self, container: &str, paused: bool) -> Result<(), Error> {
        let request = process_id(container, "");
        self.agent
            .call(
                "pause or resume the container",
                |client, context| async move {
                    if paused {
                        client.pause_container(context, &request).await
                    } else {
                        client.resume_container(context, &request).await
                    }
                },
            )
            .await
            .map(drop)
    }

    /// Figures of a container; of the whole guest for an empty name.
    ///
    /// # Errors
    /// No such container.
    pub async fn stats(&self, container: &str) -> Result<StatsResponse, Error> {
        let request = StatsRequest {
            container_id: container.to_owned(),
            ..Default::default()
        };
        self.agent
            .call("tell the statistics", |client, context| async move {
                client.stats(context, &request).await
            })
            .await
    }
}

fn process_id(container: &str, exec: &str) -> ProcessId {
    ProcessId {
        container_id: container.to_owned(),
        exec_id: exec.to_owned(),
        ..Default::default()
    }
}

pub(super) fn exit_of(exit: &ProcessExit) -> Exit {
    let nanoseconds = u64::try_from(exit.exited_at_ns).unwrap_or(0);
    Exit {
        pid: exit.pid,
        status: exit.exit_status & 0xFF,
        at: UNIX_EPOCH + Duration::from_nanos(nanoseconds),
    }
}

pub(super) fn stdio_message(stdio: &Stdio) -> StdioRequest {
    StdioRequest {
        terminal: stdio.terminal,
        stdin: stdio.stdin,
        stdout: stdio.stdout,
        stderr: stdio.stderr,
        rows: stdio.size.0,
        columns: stdio.size.1,
        ..Default::default()
    }
}
