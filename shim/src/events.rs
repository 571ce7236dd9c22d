//! Events for containerd, in the order they happened.
//!
//! `containerd publish` (the program containerd names by `-publish-binary`) takes
//! one event a call on its standard input; a queue keeps them in order.

use std::{path::PathBuf, process::Stdio, time::Duration};

use caisson_sandbox::scaled;
use containerd_shim_protos::protobuf::{
    Message, MessageDyn, MessageFull, well_known_types::any::Any,
};
use tokio::{io::AsyncWriteExt, process::Command, sync::mpsc};

/// Events that may wait; an event bus that takes none for so long is dead.
const QUEUE: usize = 4096;

/// Tries for one event.
const TRIES: u32 = 5;

/// The way to containerd's event bus; a dead end when nobody listens there.
#[derive(Clone)]
pub struct Events {
    queue: Option<mpsc::Sender<(&'static str, Any)>>,
}

/// Topics (containerd: core/runtime/events.go).
pub mod topic {
    /// A task was created.
    pub const CREATE: &str = "/tasks/create";
    /// A task was started.
    pub const START: &str = "/tasks/start";
    /// A process ended.
    pub const EXIT: &str = "/tasks/exit";
    /// A task was deleted.
    pub const DELETE: &str = "/tasks/delete";
    /// An exec was registered.
    pub const EXEC_ADDED: &str = "/tasks/exec-added";
    /// An exec was started.
    pub const EXEC_STARTED: &str = "/tasks/exec-started";
    /// The kernel killed for want of memory.
    pub const OOM: &str = "/tasks/oom";
    /// A task was frozen.
    pub const PAUSED: &str = "/tasks/paused";
    /// A task goes on.
    pub const RESUMED: &str = "/tasks/resumed";
}

impl Events {
    /// Publishes through `binary` to the containerd at `address`; nowhere when there is none.
    pub fn new(binary: Option<PathBuf>, address: &str, namespace: &str) -> Self {
        let queue = binary.filter(|_| !address.is_empty()).map(|binary| {
            let (sender, receiver) = mpsc::channel(QUEUE);
            tokio::spawn(publish_all(
                receiver,
                binary,
                address.to_owned(),
                namespace.to_owned(),
            ));
            sender
        });
        Self { queue }
    }

    /// Queues an event.
    pub fn send<M: MessageFull + MessageDyn>(&self, topic: &'static str, event: &M) {
        let Some(queue) = &self.queue else { return };
        let bytes = match event.write_to_bytes() {
            Ok(bytes) => bytes,
            Err(error) => {
                log::error!("cannot encode an event for {topic}: {error}");
                return;
            }
        };
        let any = Any {
            type_url: M::descriptor().full_name().to_owned(),
            value: bytes,
            ..Default::default()
        };
        if queue.try_send((topic, any)).is_err() {
            log::error!("an event for {topic} is lost: {QUEUE} wait already");
        }
    }
}

async fn publish_all(
    mut queue: mpsc::Receiver<(&'static str, Any)>,
    binary: PathBuf,
    address: String,
    namespace: String,
) {
    while let Some((topic, event)) = queue.recv().await {
        let Ok(bytes) = event.write_to_bytes() else {
            continue;
        };
        for attempt in 1..=TRIES {
            let limit = scaled(Duration::from_secs(5));
            match tokio::time::timeout(limit, publish(&binary, &address, &namespace, topic, &bytes))
                .await
            {
                Ok(Ok(())) => break,
                Ok(Err(error)) => {
                    log::warn!("cannot publish to {topic} (try {attempt} of {TRIES}): {error}")
                }
                Err(_) => log::warn!(
                    "cannot publish to {topic} (try {attempt} of {TRIES}): no end in {} s",
                    limit.as_secs()
                ),
            }
            tokio::time::sleep(scaled(Duration::from_millis(100)) * attempt).await;
        }
    }
}

async fn publish(
    binary: &PathBuf,
    address: &str,
    namespace: &str,
    topic: &str,
    bytes: &[u8],
) -> std::io::Result<()> {
    let mut child = Command::new(binary)
        .args([
            "--address",
            address,
            "publish",
            "--topic",
            topic,
            "--namespace",
            namespace,
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(bytes).await?;
    }
    let status = child.wait().await?;
    if status.success() {
        Ok(())
    } else {
        Err(std::io::Error::other(status.to_string()))
    }
}
