//! PID 1 is everybody's last parent: whoever ends is reaped here, and only here.

use std::sync::Arc;

use rustix::process::{WaitOptions, wait};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    container::Manager,
    failure::{During, Result},
};

/// Reaps for ever.
///
/// # Errors
/// SIGCHLD cannot be watched.
pub async fn run(manager: Arc<Manager>) -> Result<()> {
    let mut children =
        signal(SignalKind::child()).during(|| "watch for ended processes".to_owned())?;
    loop {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let code = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => code.unsigned_abs() & 0xFF,
                (None, Some(signal)) => 128 + signal.unsigned_abs(),
                (None, None) => continue, // Stopped or continued, not ended.
            };
            manager.ended(pid.as_raw_pid().unsigned_abs(), code);
        }
        if children.recv().await.is_none() {
            return Ok(());
        }
    }
}
