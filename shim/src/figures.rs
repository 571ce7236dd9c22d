//! Tells the pod's figures to whoever asks (`caisson metrics`, `caisson ps --sandboxes`): a JSON
//! document to each connection, then its end.

use std::{
    fs::Permissions,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::{Arc, Weak},
    time::Duration,
};

use caisson_sandbox::{scaled, socket};
use tokio::{
    io::AsyncWriteExt,
    net::{UnixListener, UnixStream},
};

use crate::{error::Error, pod::Pod};

/// For a reader to take the document.
const WRITE_LIMIT: Duration = Duration::from_secs(5);

/// Serves the figures of `pod`, whose sandbox `name` belongs to `manager`, on the socket `path`
/// until the pod is let go of. The socket goes with the sandbox's directory.
///
/// # Errors
/// The socket cannot be made.
pub fn serve(
    pod: &Arc<dyn Pod>,
    path: &Path,
    (name, manager): (String, String),
) -> Result<(), Error> {
    let listener = socket::listen(path)
        .and_then(|listener| {
            listener.set_nonblocking(true)?;
            UnixListener::from_std(listener)
        })
        .map_err(Error::file("listen on", path))?;
    std::fs::set_permissions(path, Permissions::from_mode(0o600))
        .map_err(Error::file("protect", path))?;
    let pod = Arc::downgrade(pod);
    tokio::spawn(async move {
        // One after the other: they are few, and each makes the kernel walk the guest's memory.
        while let Ok((stream, _)) = listener.accept().await {
            let Some(text) = document(&pod, &name, &manager).await else {
                return;
            };
            let _ = tokio::time::timeout(scaled(WRITE_LIMIT), write(stream, &text)).await;
        }
    });
    Ok(())
}

async fn document(pod: &Weak<dyn Pod>, name: &str, manager: &str) -> Option<Vec<u8>> {
    let figures = pod.upgrade()?.figures(name, manager).await.ok()?;
    serde_json::to_vec(&figures).ok()
}

async fn write(mut stream: UnixStream, text: &[u8]) -> std::io::Result<()> {
    stream.write_all(text).await?;
    stream.shutdown().await
}
