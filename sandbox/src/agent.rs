//! The host's side of the agent's protocol. What comes from there was written
//! by an attacker: it is checked, and never waited for without end.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use caisson_protocol::{
    VERSION,
    agent::{Event, HelloRequest, HelloResponse, NextEventsRequest},
    agent_ttrpc::AgentClient,
    ports,
};
use ttrpc::{
    Code,
    r#async::{Client, transport::Socket},
};

use crate::{
    deadline::scaled,
    error::{AgentErrorKind, Error},
    figures::Latencies,
    vmm::Vmm,
    vsock,
};

/// Longest from the start of the VMM to the agent's first answer.
const BOOT_LIMIT: Duration = Duration::from_secs(30);

/// Longest that an ordinary request may take.
const REQUEST_LIMIT: Duration = Duration::from_secs(30);

/// How much later than this side the agent gives a request up.
const AGENT_EXTRA: Duration = Duration::from_secs(2);

/// How long the agent may hold a poll for events.
const POLL: Duration = Duration::from_secs(60);

/// Most text of the agent that gets into an error.
const MAX_MESSAGE: usize = 2048;

/// A connection to the agent of a VM.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
    vmm: Arc<Vmm>,
    latencies: Arc<Latencies>,
}

impl Agent {
    /// Waits for the guest to boot and its agent to answer.
    ///
    /// # Errors
    /// The VM ends, or the agent does not answer in time, or is of another version.
    pub async fn connect(socket: &Path, vmm: Arc<Vmm>) -> Result<(Self, HelloResponse), Error> {
        let limit = scaled(BOOT_LIMIT);
        let found = async {
            loop {
                if let Ok(stream) = vsock::connect(socket, ports::AGENT).await {
                    let client = AgentClient::new(Client::new(Socket::new(stream)));
                    let agent = Self {
                        client,
                        vmm: vmm.clone(),
                        latencies: Arc::default(),
                    };
                    match agent.hello().await {
                        Ok(hello) => return Ok((agent, hello)),
                        Err(
                            error @ Error::Agent {
                                kind: AgentErrorKind::InvalidArgument,
                                ..
                            },
                        ) => return Err(error),
                        Err(_) => {}
                    }
                }
                tokio::time::sleep(scaled(Duration::from_millis(1))).await;
            }
        };
        tokio::select! {
            gone = vmm.wait_gone() => Err(Error::Gone(gone)),
            found = tokio::time::timeout(limit, found) => found.unwrap_or(Err(Error::Late {
                what: "answer after boot".to_owned(),
                seconds: limit.as_secs(),
            })),
        }
    }

    async fn hello(&self) -> Result<HelloResponse, Error> {
        let request = HelloRequest {
            protocol_version: VERSION,
            ..Default::default()
        };
        self.call("say hello", |client, context| async move {
            client.hello(context, &request).await
        })
        .await
    }

    /// Calls a method with the usual deadline; the VM's end ends the call.
    ///
    /// # Errors
    /// The agent's refusal, [`Error::Gone`], [`Error::Late`].
    pub async fn call<T, F, R>(&self, what: &'static str, method: F) -> Result<T, Error>
    where
        F: FnOnce(AgentClient, ttrpc::context::Context) -> R,
        R: Future<Output = ttrpc::Result<T>>,
    {
        let begin = Instant::now();
        let result = self.call_within(REQUEST_LIMIT, what, method).await;
        self.latencies.add(what, begin.elapsed(), result.is_err());
        result
    }

    /// How long requests took.
    pub fn latencies(&self) -> &Latencies {
        &self.latencies
    }

    /// As [`Agent::call`] with another deadline (scaled here), for requests that wait for something:
    /// how long they take says nothing.
    ///
    /// # Errors
    /// As there.
    pub async fn call_within<T, F, R>(
        &self,
        limit: Duration,
        what: &str,
        method: F,
    ) -> Result<T, Error>
    where
        F: FnOnce(AgentClient, ttrpc::context::Context) -> R,
        R: Future<Output = ttrpc::Result<T>>,
    {
        let limit = scaled(limit);
        // The agent gives up later than this side, so that the answer to a call that took too long
        // is the same whoever looks at the clock first.
        let context = ttrpc::context::with_duration(limit + scaled(AGENT_EXTRA));
        let call = tokio::time::timeout(limit, method(self.client.clone(), context));
        let late = || Error::Late {
            what: what.to_owned(),
            seconds: limit.as_secs(),
        };
        tokio::select! {
            biased;
            result = call => match result {
                Ok(Ok(value)) => Ok(value),
                Ok(Err(ttrpc::Error::RpcStatus(status))) => Err(refusal(&status)),
                // The connection broke: if the VM is ending, that is the reason to tell.
                Ok(Err(error)) => {
                    match tokio::time::timeout(scaled(Duration::from_secs(2)), self.vmm.wait_gone()).await {
                        Ok(gone) => Err(Error::Gone(gone)),
                        Err(_) => Err(Error::Agent { kind: AgentErrorKind::Other, message: format!("cannot {what}: {error}") }),
                    }
                }
                Err(_) => Err(late()),
            },
            gone = self.vmm.wait_gone() => Err(Error::Gone(gone)),
        }
    }

    /// Events after `sequence`; empty when there was none for a while.
    ///
    /// # Errors
    /// As [`Agent::call`].
    pub async fn events(&self, sequence: u64) -> Result<Vec<Event>, Error> {
        let request = NextEventsRequest {
            after_sequence: sequence,
            wait_ms: u32::try_from(POLL.as_millis()).unwrap_or(u32::MAX),
            ..Default::default()
        };
        let limit = POLL + REQUEST_LIMIT;
        let response = self
            .call_within(limit, "tell events", |client, context| async move {
                client.next_events(context, &request).await
            })
            .await?;
        Ok(response.events)
    }
}

fn refusal(status: &ttrpc::Status) -> Error {
    let kind = match status.code() {
        Code::NOT_FOUND => AgentErrorKind::NotFound,
        Code::ALREADY_EXISTS => AgentErrorKind::AlreadyExists,
        Code::FAILED_PRECONDITION => AgentErrorKind::FailedPrecondition,
        Code::INVALID_ARGUMENT => AgentErrorKind::InvalidArgument,
        Code::PERMISSION_DENIED => AgentErrorKind::PermissionDenied,
        Code::UNIMPLEMENTED => AgentErrorKind::Unimplemented,
        _ => AgentErrorKind::Other,
    };
    let message: String = status
        .message()
        .chars()
        .filter(|c| !c.is_control())
        .take(MAX_MESSAGE)
        .collect();
    Error::Agent { kind, message }
}
