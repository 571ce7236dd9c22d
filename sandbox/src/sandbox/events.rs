//! What happens in a sandbox, for its owner.

use std::sync::Arc;

use caisson_protocol::{agent::event::Kind, limits::MAX_ID};
use caisson_vmm_api::Request;
use tokio::sync::mpsc;

use super::{Event, process::exit_of};
use crate::{agent::Agent, error::Error, vmm::Vmm};

/// Hands the agent's events on, and in the end the VM's own.
pub(super) async fn forward_events(agent: Agent, vmm: Arc<Vmm>, sender: mpsc::Sender<Event>) {
    let mut sequence = 0;
    loop {
        let events = match agent.events(sequence).await {
            Ok(events) => events,
            Err(Error::Gone(gone)) => {
                let _ = sender.send(Event::Gone(gone)).await;
                return;
            }
            Err(error) => {
                log::error!("cannot hear of the guest's events: {error}; stopping the VM");
                // A guest whose events cannot be heard cannot be supervised.
                let _ = vmm.call("stop", Request::Stop, &[]).await;
                let _ = sender.send(Event::Gone(vmm.wait_gone().await)).await;
                return;
            }
        };
        for event in events {
            // A guest that counts backwards or skips gets no event handled twice.
            if event.sequence <= sequence {
                continue;
            }
            sequence = event.sequence;
            let Some(event) = event.kind.and_then(told_by) else {
                continue;
            };
            if sender.send(event).await.is_err() {
                return;
            }
        }
    }
}

/// What the agent tells; nothing if that is unknown here or of ids that no process can have.
fn told_by(kind: Kind) -> Option<Event> {
    match kind {
        Kind::Exited(exited) => {
            let exit = exit_of(exited.exit.as_ref().unwrap_or_default());
            let (container, exec) = (exited.container_id, exited.exec_id);
            (container.len() <= MAX_ID && exec.len() <= MAX_ID).then_some(Event::Exited {
                container,
                exec,
                exit,
            })
        }
        Kind::Oom(oom) => {
            let container = oom.container_id;
            (container.len() <= MAX_ID).then_some(Event::OutOfMemory { container })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use caisson_protocol::agent::{Exited, OutOfMemory};

    use super::*;

    #[test]
    fn events_of_ids_that_nobody_has_are_dropped() {
        let exited = |container: &str, exec: &str| {
            told_by(Kind::Exited(Exited {
                container_id: container.to_owned(),
                exec_id: exec.to_owned(),
                ..Default::default()
            }))
        };
        let oom = |container: &str| {
            told_by(Kind::Oom(OutOfMemory {
                container_id: container.to_owned(),
                ..Default::default()
            }))
        };
        let (longest, longer) = ("c".repeat(MAX_ID), "c".repeat(MAX_ID + 1));
        assert!(exited(&longest, &longest).is_some());
        assert!(oom(&longest).is_some());
        assert_eq!(exited(&longer, ""), None);
        assert_eq!(exited("c", &longer), None);
        assert_eq!(oom(&longer), None);
    }
}
