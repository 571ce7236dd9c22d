//! What happens in a sandbox, for its owner.

use std::sync::Arc;

use caisson_protocol::agent::event::Kind;
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
            let event = match event.kind {
                Some(Kind::Exited(exited)) => Event::Exited {
                    container: exited.container_id,
                    exec: exited.exec_id,
                    exit: exit_of(exited.exit.as_ref().unwrap_or_default()),
                },
                Some(Kind::Oom(oom)) => Event::OutOfMemory {
                    container: oom.container_id,
                },
                _ => continue,
            };
            if sender.send(event).await.is_err() {
                return;
            }
        }
    }
}
