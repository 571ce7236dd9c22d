//! Published volumes ([`crate::published`]) of containers, kept as they are on the host.

use std::{
    path::{Path, PathBuf},
    sync::atomic::Ordering,
};

use caisson_protocol::{
    agent::{PublishedVolume, WithdrawVolumeRequest},
    limits::MAX_PUBLISHED,
};
use tokio::task::JoinHandle;

use super::{Holdings, Sandbox, blocking, trouble::Trouble};
use crate::{
    agent::Agent,
    error::Error,
    published::{self, Changes, Contents},
};

/// A volume in the guest and the task that follows the host's. Dropped, the copy stays as it is.
#[derive(Debug)]
pub(super) struct Publication {
    number: u32,
    follower: JoinHandle<()>,
}

impl Drop for Publication {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

impl Sandbox {
    /// Puts a copy of the directory into the guest, if it is one that is published by a swap, and
    /// returns its number there.
    pub(super) async fn publish(
        &self,
        directory: &Path,
        holdings: &mut Holdings,
    ) -> Result<Option<u32>, Error> {
        // First, so that no change is between.
        let changes = Changes::of(directory, &self.watches);
        let Some(contents) = read(directory.to_owned()).await? else {
            return Ok(None);
        };
        let number = self.publications.fetch_add(1, Ordering::Relaxed);
        let volume = Volume {
            agent: self.agent.clone(),
            number,
            directory: directory.to_owned(),
            contents,
        };
        // Before it is made, so that a half is removed too.
        let publication = |follower| Publication { number, follower };
        if let Err(error) = volume.send().await {
            holdings.published.push(publication(tokio::spawn(async {})));
            return Err(error);
        }
        let follower = tokio::spawn(volume.follow(changes));
        holdings.published.push(publication(follower));
        Ok(Some(number))
    }

    /// Removes the copies.
    pub(super) async fn withdraw(&self, publications: Vec<Publication>) {
        for publication in publications {
            let request = WithdrawVolumeRequest {
                number: publication.number,
                ..Default::default()
            };
            drop(publication);
            let withdrawn = self
                .agent
                .call("withdraw a volume", |client, context| async move {
                    client.withdraw_volume(context, &request).await
                });
            if let Err(error) = withdrawn.await {
                log::warn!("{error}");
            }
        }
    }
}

async fn read(directory: PathBuf) -> Result<Option<Contents>, Error> {
    blocking(move || {
        published::read(&directory).map_err(Error::io(format!("read {}", directory.display())))
    })
    .await
}

/// One, and what the guest has of it.
struct Volume {
    agent: Agent,
    number: u32,
    directory: PathBuf,
    contents: Contents,
}

impl Volume {
    async fn send(&self) -> Result<(), Error> {
        let message = PublishedVolume {
            number: self.number,
            entries: self.contents.clone(),
            ..Default::default()
        };
        self.agent
            .call("publish a volume", |client, context| async move {
                client.publish_volume(context, &message).await
            })
            .await
            .map(drop)
    }

    /// Until the directory has gone.
    async fn follow(mut self, mut changes: Changes) {
        let mut trouble = Trouble::default();
        while trouble.wait(changes.next()).await.unwrap_or(true) {
            let brought = self.bring().await;
            let shown = self.directory.display();
            trouble.note(brought, |error| {
                format!("the guest's copy of {shown} stays as it is for now: {error}")
            });
        }
    }

    /// Brings the guest's copy to what the host has.
    async fn bring(&mut self) -> Result<(), Error> {
        let contents = read(self.directory.clone()).await?.ok_or_else(|| {
            Error::Invalid(format!(
                "it is not published by a link any more, or holds more than {MAX_PUBLISHED} bytes"
            ))
        })?;
        if contents == self.contents {
            return Ok(());
        }
        self.contents = contents;
        let sent = self.send().await;
        if sent.is_err() {
            // Nobody knows what it has: the next time it is to be sent, whatever it is.
            self.contents.clear();
        }
        sent
    }
}
