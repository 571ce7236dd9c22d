//! From a reference to an image in the store.

use std::cell::RefCell;
use std::collections::VecDeque;

use caisson_rootfs_builder::{
    BlobRef, Digest, ImageConfiguration, MAX_INDEX_DEPTH, Manifest, Reference, Staging, Store,
};

use crate::Client;
use crate::credentials::DockerConfig;
use crate::error::{Error, Result};
use crate::place::Place;
use crate::session::Session;

/// What we can read, the best first (distribution specification, "Pulling manifests").
const MANIFEST_TYPES: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.docker.distribution.manifest.v2+json";

/// How far a layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerState {
    /// The store has it.
    Exists,
    /// It has to be fetched; its size in bytes.
    Waiting(u64),
    /// So many bytes of it are here.
    Downloading(u64),
    /// All of it is here and verified.
    Downloaded,
}

/// Who wants to know how far a pull is.
pub trait Progress {
    /// A layer's state has changed.
    fn layer(&self, layer: &Digest, state: LayerState);
    /// All layers are here and become part of the store.
    fn loading(&self);
}

/// A pulled image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pulled {
    /// What the reference means at the registry: the digest of a manifest or an index.
    pub digest: Digest,
    /// The image's id.
    pub id: Digest,
    /// Whether the name meant another image before, or none.
    pub newer: bool,
}

impl Client {
    /// Pulls an image under its name. What the store has already is not transferred.
    ///
    /// # Errors
    /// [`Error`]; nothing of the image is in the store then.
    pub fn pull(
        &self,
        store: &Store,
        reference: &Reference,
        progress: &dyn Progress,
    ) -> Result<Pulled> {
        let credentials = DockerConfig::read(&self.options.credentials)?;
        self.event_loop()?.block_on(async {
            let mut failures = Vec::new();
            for place in Place::of(reference.registry(), &self.options) {
                let result = self
                    .pull_from(&place, store, reference, &credentials, progress)
                    .await;
                match result {
                    Err(error) if error.is_of_place() => failures.push(error),
                    result => return result,
                }
            }
            let last = failures.pop().ok_or_else(|| Error::Connect {
                registry: reference.registry().to_owned(),
                reason: "there is no way to it".to_owned(),
            })?;
            Err(if failures.is_empty() {
                last
            } else {
                Error::Everywhere {
                    last: Box::new(last),
                    mirrors: failures,
                }
            })
        })
    }

    /// Whether a registry takes a user's name and password.
    ///
    /// # Errors
    /// [`Error::BadCredentials`], or what keeps it from telling.
    pub fn log_in(&self, registry: &str, user: &str, password: &str) -> Result<()> {
        let place = Place::itself(registry, self.options.registries.get(registry));
        let credential = crate::Credential::Password {
            user: user.to_owned(),
            password: password.to_owned(),
        };
        self.event_loop()?.block_on(async {
            let session = self.connect(&place, None, Some(credential)).await?;
            session.check().await
        })
    }

    async fn pull_from(
        &self,
        place: &Place,
        store: &Store,
        reference: &Reference,
        credentials: &DockerConfig,
        progress: &dyn Progress,
    ) -> Result<Pulled> {
        let itself = Place::itself(
            reference.registry(),
            self.options.registries.get(reference.registry()),
        );
        let name = if *place == itself {
            reference.registry()
        } else {
            &place.host
        };
        let credential = credentials.credential(name)?;
        let repository = reference.repository();
        let session = self.connect(place, Some(repository), credential).await?;
        let puller = Puller {
            session: &session,
            store,
            repository,
            progress,
        };
        let found = puller.resolve(reference).await?;
        let name = match reference.digest() {
            Some(_) => reference.by_digest(found.digest),
            None => reference.clone(),
        };
        let before = store.get(&name.to_string()).ok().map(|image| image.id);
        let mut names = vec![reference.by_digest(found.digest)];
        names.extend(reference.digest().is_none().then(|| reference.clone()));
        let id = found.config.digest;
        // All of it may be here under another name.
        if store.get(&id.to_string()).is_ok() {
            store.name(&id.to_string(), &names)?;
        } else {
            puller.bring(&found, names).await?;
        }
        Ok(Pulled {
            digest: found.digest,
            id,
            newer: before != Some(id),
        })
    }
}

/// The manifest that a reference leads to.
struct Found {
    /// Of what the reference names.
    digest: Digest,
    /// Of the image's manifest.
    manifest: Digest,
    json: Vec<u8>,
    config: BlobRef,
    layers: Vec<BlobRef>,
}

struct Puller<'a> {
    session: &'a Session<'a>,
    store: &'a Store,
    repository: &'a str,
    progress: &'a dyn Progress,
}

impl Puller<'_> {
    /// Follows the reference to the manifest for our platform.
    async fn resolve(&self, reference: &Reference) -> Result<Found> {
        let what = format!("{}/{}", self.session.host, suffix(reference));
        let wanted = match reference.digest() {
            Some(digest) => digest.to_string(),
            None => reference.tag().unwrap_or("latest").to_owned(),
        };
        let mut json = self.manifest(&wanted, &what, reference.digest()).await?;
        let digest = Digest::of(&json);
        let mut current = digest;
        for _ in 0..=MAX_INDEX_DEPTH {
            match Manifest::read(&what, &json)? {
                Manifest::Image { config, layers } => {
                    return Ok(Found {
                        digest,
                        manifest: current,
                        json,
                        config,
                        layers,
                    });
                }
                Manifest::Index { next } => {
                    current = next.digest;
                    let name = next.digest.to_string();
                    json = self.manifest(&name, &name, Some(&next.digest)).await?;
                }
            }
        }
        Err(Error::Protocol {
            registry: self.session.host.clone(),
            what,
            reason: format!("indexes are nested more than {MAX_INDEX_DEPTH} deep"),
        })
    }

    async fn manifest(&self, name: &str, what: &str, expected: Option<&Digest>) -> Result<Vec<u8>> {
        let path = format!("{}/manifests/{name}", self.repository);
        let limit = self.store.limits().manifest_bytes;
        let json = self.small(&path, what, Some(MANIFEST_TYPES), limit).await?;
        self.verify(&json, expected)?;
        Ok(json)
    }

    /// A small answer, asked for again when the registry has a bad moment.
    async fn small(
        &self,
        path: &str,
        what: &str,
        accept: Option<&'static str>,
        limit: u64,
    ) -> Result<Vec<u8>> {
        const TRIES: u32 = 3;
        let mut wait = self.session.backoff();
        let mut tries = 0;
        loop {
            let answer = async {
                let response = self.session.get(path, what, accept, None).await?;
                self.session.body(response, what, limit).await
            };
            tries += 1;
            match answer.await {
                Err(error) if error.is_transient() && tries < TRIES => {
                    tokio::time::sleep(wait).await;
                    wait = wait.saturating_mul(2);
                }
                answer => return answer,
            }
        }
    }

    fn verify(&self, bytes: &[u8], expected: Option<&Digest>) -> Result<()> {
        let actual = Digest::of(bytes);
        match expected {
            Some(expected) if actual != *expected => Err(Error::Digest {
                registry: self.session.host.clone(),
                expected: *expected,
                actual,
            }),
            _ => Ok(()),
        }
    }

    /// Transfers what the store does not have, and loads the image.
    async fn bring(&self, found: &Found, names: Vec<Reference>) -> Result<()> {
        let mut staging = self.store.stage()?;
        put(&staging, &found.manifest, &found.json)?;
        let limits = self.store.limits();
        let what = format!("configuration {}", found.config.digest);
        let path = format!("{}/blobs/{}", self.repository, found.config.digest);
        let config = self.small(&path, &what, None, limits.config_bytes).await?;
        self.verify(&config, Some(&found.config.digest))?;
        put(&staging, &found.config.digest, &config)?;

        let missing = self.missing_layers(&mut staging, found, &config)?;
        let queue = RefCell::new(missing);
        let worker = || async {
            loop {
                let next = queue.borrow_mut().pop_front();
                let Some(layer) = next else {
                    return Ok::<(), Error>(());
                };
                self.layer(&staging, &layer).await?;
            }
        };
        tokio::try_join!(worker(), worker(), worker())?;
        self.progress.loading();
        staging.load(&found.manifest, names)?;
        Ok(())
    }

    async fn layer(&self, staging: &Staging, layer: &BlobRef) -> Result<()> {
        let progress = |bytes| {
            self.progress
                .layer(&layer.digest, LayerState::Downloading(bytes));
        };
        let target = staging.blob_path(&layer.digest);
        self.session
            .fetch(
                self.repository,
                layer,
                staging.directory(),
                &target,
                &progress,
            )
            .await?;
        self.progress.layer(&layer.digest, LayerState::Downloaded);
        Ok(())
    }

    /// The layers to be transferred, each once.
    fn missing_layers(
        &self,
        staging: &mut Staging,
        found: &Found,
        config: &[u8],
    ) -> Result<VecDeque<BlobRef>> {
        let protocol = |reason: String| Error::Protocol {
            registry: self.session.host.clone(),
            what: format!("manifest {}", found.manifest),
            reason,
        };
        let config: ImageConfiguration = serde_json::from_slice(config)
            .map_err(|error| protocol(format!("its configuration: {error}")))?;
        let diff_ids = config.rootfs().diff_ids();
        let limits = self.store.limits();
        if diff_ids.len() != found.layers.len() || diff_ids.len() > limits.layers {
            return Err(protocol(format!(
                "it has {} layers, its configuration {}, and {} are allowed",
                found.layers.len(),
                diff_ids.len(),
                limits.layers
            )));
        }
        let mut total = 0_u64;
        let mut missing: VecDeque<BlobRef> = VecDeque::new();
        for (layer, diff_id) in found.layers.iter().zip(diff_ids) {
            let diff_id = diff_id
                .parse()
                .map_err(caisson_rootfs_builder::Error::from)?;
            if staging.hold_layer(&diff_id)? {
                self.progress.layer(&layer.digest, LayerState::Exists);
                continue;
            }
            if missing.iter().any(|other| other.digest == layer.digest) {
                continue;
            }
            total = total.saturating_add(layer.size);
            if layer.size > limits.layer_bytes || total > limits.image_bytes {
                return Err(Error::TooLarge {
                    registry: self.session.host.clone(),
                    what: format!("manifest {} with its layers", found.manifest),
                    found: total,
                    limit: limits.image_bytes.min(limits.layer_bytes),
                });
            }
            self.progress
                .layer(&layer.digest, LayerState::Waiting(layer.size));
            missing.push_back(layer.clone());
        }
        Ok(missing)
    }
}

/// Repository with tag or digest.
fn suffix(reference: &Reference) -> String {
    let repository = reference.repository();
    match (reference.digest(), reference.tag()) {
        (Some(digest), _) => format!("{repository}@{digest}"),
        (None, tag) => format!("{repository}:{}", tag.unwrap_or("latest")),
    }
}

fn put(staging: &Staging, digest: &Digest, bytes: &[u8]) -> Result<()> {
    let path = staging.blob_path(digest);
    std::fs::write(&path, bytes).map_err(|source| Error::Io {
        action: "write",
        path,
        source,
    })
}
