//! What comes from the guest, and what it means for the tasks.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use caisson_sandbox::{Event, Gone, scaled};
use containerd_shim_protos::events::task::TaskOOM;
use tokio::{sync::mpsc, time::Instant};

use super::{KILLED, Name, Tasks};
use crate::{
    events::topic,
    process::{Exit, Stage},
};

/// A container's want of memory is told once in so long.
const OOM_PAUSE: Duration = Duration::from_secs(1);

impl Tasks {
    /// Hears of what happens in the guest.
    pub(super) async fn follow(self: Arc<Self>, mut events: mpsc::Receiver<Event>) {
        while let Some(event) = events.recv().await {
            match event {
                Event::Exited {
                    container,
                    exec,
                    exit,
                } => {
                    let exit = Exit {
                        status: exit.status,
                        at: exit.at,
                    };
                    self.ended_in_guest(&(container, exec), exit);
                }
                Event::OutOfMemory { container } => self.memory_ran_out(container),
                Event::Gone(gone) => self.machine_gone(&gone),
            }
        }
    }

    /// The guest may say so as often as it likes, of whom it likes.
    fn memory_ran_out(&self, container: String) {
        let name = (container, String::new());
        let bundle = self.with(&name, |process| {
            let now = Instant::now();
            let pause = scaled(OOM_PAUSE);
            let again = process.oom_told.is_none_or(|told| now >= told + pause);
            if again {
                process.oom_told = Some(now);
            }
            Ok(again.then(|| process.bundle.clone()))
        });
        let Ok(Some(bundle)) = bundle else { return };
        self.events.send_if_room(
            topic::OOM,
            &TaskOOM {
                container_id: name.0,
                ..Default::default()
            },
        );
        // For `caisson inspect`, which has no event bus.
        let _ = std::fs::write(bundle.join("oom"), "");
    }

    fn ended_in_guest(&self, name: &Name, exit: Exit) {
        // The guest may name what it likes; only what is here counts.
        let _ = self.with(name, |process| {
            match process.stage {
                Stage::Creating | Stage::Starting => process.early_exit = Some(exit),
                Stage::Running => process.end(exit),
                // Killed before it was started. An exec has not been anything until then.
                Stage::Created => {
                    if process.set_exit(exit) && name.1.is_empty() {
                        self.tell_exit(name, process.pid, exit);
                    }
                }
                Stage::Stopped => {}
            }
            Ok(())
        });
    }

    fn machine_gone(&self, gone: &Gone) {
        if *self.stopping.borrow() {
            log::debug!("{gone}");
            self.set_machine_end(0);
        } else {
            log::error!("{gone}");
            self.set_machine_end(KILLED);
        }
        let exit = Exit {
            status: KILLED,
            at: SystemTime::now(),
        };
        for (name, process) in self.table().iter_mut() {
            if name.1.is_empty() && process.exit().is_none() {
                write_vm_exit(&process.bundle, gone);
            }
            match process.stage {
                Stage::Starting => process.early_exit = Some(exit),
                Stage::Running => process.end(exit),
                // What creates it finds out by itself.
                Stage::Creating | Stage::Stopped => {}
                Stage::Created => {
                    if process.set_exit(exit) && name.1.is_empty() {
                        self.tell_exit(name, process.pid, exit);
                    }
                }
            }
        }
    }
}

/// Why the machine ended, for whoever looks into the bundle.
pub fn write_vm_exit(bundle: &Path, gone: &Gone) {
    let document = serde_json::json!({
        "reason": gone.reason,
        "message": gone.to_string(),
        "console_tail": gone.console_tail,
    });
    let path = bundle.join("vm-exit.json");
    if let Err(error) = std::fs::write(&path, document.to_string()) {
        log::warn!("cannot write {}: {error}", path.display());
    }
}
