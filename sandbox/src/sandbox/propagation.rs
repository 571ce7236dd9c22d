//! Mounts that the host makes and removes below a shared directory while it is shared (propagation
//! `rslave`, mount_namespaces(7)).
//!
//! The file server's mounts are no slaves of the host's in the kernel's sense: then the host could
//! not unmount its own as long as the guest remembers a name there (EBUSY). They are copies, made
//! and removed a moment later.

use std::{
    collections::BTreeMap,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use caisson_fs::{MountBelow, ReadOnly, Share};
use tokio::task::JoinHandle;

use super::{Holdings, Sandbox, blocking, devices::forget, trouble::Trouble};
use crate::{
    agent::Agent,
    error::Error,
    mount_table::{self, Changes},
    shares::Shares,
};

/// The task that follows the host's mounts below an entry of the share.
#[derive(Debug)]
pub(super) struct Follower(JoinHandle<()>);

impl Drop for Follower {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Sandbox {
    /// Has the entry that was just shared, without what is mounted below it, get what the host has
    /// there, now and later.
    pub(super) async fn follow_mounts(
        &self,
        source: PathBuf,
        share: Share,
        holdings: &mut Holdings,
    ) -> Result<(), Error> {
        let place = self.shares.lock().await.clone();
        let (Some(shares), Some(entry)) = (place, holdings.shares.last().copied()) else {
            return Ok(());
        };
        let shown = source.display().to_string();
        let changes =
            Changes::watch().map_err(Error::io(format!("watch the mounts below {shown}")))?;
        let below = Arc::new(Mutex::new(Below {
            shares,
            entry,
            source,
            share: Share {
                // Of the first mount only: each has its own.
                read_only: match share.read_only {
                    ReadOnly::Mount => ReadOnly::Nothing,
                    other => other,
                },
                ..share
            },
            mounted: BTreeMap::new(),
        }));
        bring(&below).await?;
        let task = tokio::spawn(follow(below, changes, self.agent.clone()));
        holdings.followers.push(Follower(task));
        Ok(())
    }
}

/// What is mounted below an entry.
struct Below {
    shares: Arc<Shares>,
    entry: u32,
    source: PathBuf,
    share: Share,
    /// By path, with the host's id of it. None: it cannot be shared, which was told.
    mounted: BTreeMap<PathBuf, (u64, Option<MountBelow>)>,
}

impl Below {
    /// Brings it to what the host has. True: some have gone. Blocks.
    fn bring(&mut self) -> std::io::Result<bool> {
        let now = mount_table::below(&self.source)?;
        let has_gone = |path: &PathBuf, id: &u64| now.get(path) != Some(id);
        let gone: Vec<PathBuf> = self
            .mounted
            .iter()
            .filter(|(path, (id, _))| has_gone(path, id))
            .map(|(path, _)| path.clone())
            .collect();
        // A path sorts before those below it.
        for path in gone.iter().rev() {
            let mount = self.mounted.remove(path).and_then(|(_, mount)| mount);
            if let Some(Err(error)) = mount.map(|mount| self.shares.unmount_below(mount)) {
                log::warn!("{}: {error}", self.source.join(path).display());
            }
        }
        for (path, id) in now {
            if self.mounted.contains_key(&path) {
                continue;
            }
            let mount = match self.mount(&path, id) {
                Ok(None) => continue,
                Ok(mount) => mount,
                Err(error) => {
                    let shown = self.source.join(&path);
                    log::warn!(
                        "the guest does not see the mount {}: {error}",
                        shown.display()
                    );
                    None
                }
            };
            self.mounted.insert(path, (id, mount));
        }
        Ok(!gone.is_empty())
    }

    /// None: it is below another one and cannot be seen.
    fn mount(&self, path: &Path, id: u64) -> Result<Option<MountBelow>, Error> {
        let point = self.source.join(path);
        let shown = point.display().to_string();
        let Some(mount) =
            mount_table::open(&point, id).map_err(Error::io(format!("open {shown}")))?
        else {
            return Ok(None);
        };
        let mounted = self
            .shares
            .mount_below(self.entry, path, mount.as_fd(), self.share)?;
        Ok(Some(mounted))
    }
}

/// True: some have gone.
async fn bring(below: &Arc<Mutex<Below>>) -> Result<bool, Error> {
    let below = below.clone();
    blocking(move || {
        let mut below = below.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = below.source.display().to_string();
        below
            .bring()
            .map_err(Error::io(format!("find the mounts below {shown}")))
    })
    .await
}

async fn follow(below: Arc<Mutex<Below>>, mut changes: Changes, agent: Agent) {
    let mut trouble = Trouble::default();
    while trouble.wait(changes.next()).await.unwrap_or(Ok(())).is_ok() {
        let gone = bring(&below).await;
        // What the guest remembers of them keeps their file systems in use.
        if let Ok(true) = gone
            && let Err(error) = forget(&agent, Vec::new()).await
        {
            log::warn!("{error}");
        }
        trouble.note(gone.map(drop), |error| {
            format!("later mounts are not seen in the guest for now: {error}")
        });
    }
}
