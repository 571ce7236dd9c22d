//! Finding, listing, naming and removing images.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::SystemTime;

use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::blobs::RecordedBlob;
use super::disk::{names, read_text, remove_file, sync_dir};
use super::references::References;
use super::{Image, ImageSummary, LayerRef, Prune, Pruned, Removed, Store};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::reference::Reference;

pub(super) const CONFIG: &str = "config.json";
pub(super) const RECORD: &str = "record.json";

/// What the store knows of an image beside its configuration.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Record {
    /// The digest of the manifest it came with.
    pub(super) manifest_digest: Option<Digest>,
    /// Bottom to top.
    pub(super) layers: Vec<RecordedLayer>,
}

/// One layer of a [`Record`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct RecordedLayer {
    pub(super) diff_id: Digest,
    /// Length of the EROFS image in bytes.
    pub(super) size: u64,
    /// As it came; none for a layer that the store has made, or that was loaded before blobs were kept.
    #[serde(default)]
    pub(super) blob: Option<RecordedBlob>,
}

/// How a name led to an image; removing depends on it.
enum Found {
    ByName(Reference, Digest),
    ById(Digest),
}

impl Found {
    fn id(&self) -> Digest {
        match self {
            Found::ByName(_, id) | Found::ById(id) => *id,
        }
    }
}

impl Store {
    /// The image with this name, `repository@digest`, id or unambiguous start of an id.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::AmbiguousId`], or [`Error::Corrupt`] when the image is damaged.
    pub fn get(&self, name: &str) -> Result<Image> {
        let references = self.read_references()?;
        let id = self.find(name, &references)?.id();
        self.read_image(&id, &references)
    }

    /// All images, the most recently built first.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Corrupt`].
    pub fn images(&self) -> Result<Vec<ImageSummary>> {
        let references = self.read_references()?;
        let mut images = Vec::new();
        for id in self.image_ids()? {
            match self.read_image(&id, &references) {
                Ok(image) => images.push(ImageSummary {
                    id,
                    references: image.references,
                    created: image.created,
                    size: image.size,
                    layers: image.layers.len(),
                }),
                // Removed since the directory was read.
                Err(Error::NotFound { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        images.sort_by(|a, b| b.created.cmp(&a.created).then(a.id.cmp(&b.id)));
        Ok(images)
    }

    /// Gives the image a further name, taking it away from any image that has it.
    ///
    /// # Errors
    /// Those of [`Store::get`]; [`Error::DigestReference`] when `reference` has a digest.
    pub fn tag(&self, name: &str, reference: &Reference) -> Result<()> {
        if reference.digest().is_some() {
            return Err(Error::DigestReference {
                reference: Box::new(reference.clone()),
            });
        }
        self.name(name, std::slice::from_ref(reference))
    }

    /// Gives the image names with tags, and those with digests under which a registry has it.
    ///
    /// # Errors
    /// Those of [`Store::get`].
    pub fn name(&self, name: &str, names: &[Reference]) -> Result<()> {
        let _lock = self.lock()?;
        let mut references = self.read_references()?;
        let id = self.find(name, &references)?.id();
        for reference in names {
            references.insert(reference.clone(), id);
        }
        self.write_references(&references)
    }

    /// Removes a name, and the image with it when that was the last one; docker's `rmi`.
    ///
    /// Given by id, an image goes with all its names, which needs `force` when it has more than one.
    /// An image that a container uses is never deleted: its last name can be taken away by `force`.
    ///
    /// # Errors
    /// Those of [`Store::get`]; [`Error::InUse`], [`Error::SeveralReferences`].
    pub fn remove(&self, name: &str, force: bool) -> Result<Removed> {
        let _lock = self.lock()?;
        let mut references = self.read_references()?;
        let found = self.find(name, &references)?;
        let id = found.id();
        let all = references.of(&id);
        let (untagged, by_id) = match found {
            Found::ByName(reference, _) => (vec![reference], false),
            Found::ById(_) => (all.clone(), true),
        };
        let last = untagged.len() == all.len();
        let containers = self.containers_using(&id)?;
        let in_use = !containers.is_empty();
        if last && in_use && (by_id || !force) {
            return Err(Error::InUse { id, containers });
        }
        if by_id && all.len() > 1 && !force {
            return Err(Error::SeveralReferences {
                id,
                references: all,
            });
        }
        for reference in &untagged {
            references.remove(reference);
        }
        if last && !in_use {
            references.forget(&id);
        }
        self.write_references(&references)?;
        let mut removed = Removed {
            untagged,
            ..Removed::default()
        };
        if last && !in_use {
            self.delete_image(&id)?;
            removed.deleted.push(id);
            removed.deleted_layers = self.delete_orphan_layers()?.layers;
        }
        Ok(removed)
    }

    /// Removes images that no container uses, and all layers that no image has; docker's `image prune`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Busy`], [`Error::Corrupt`].
    pub fn prune(&self, which: Prune) -> Result<Pruned> {
        let _lock = self.lock()?;
        let mut references = self.read_references()?;
        let leased: BTreeSet<Digest> = self
            .leases()?
            .into_iter()
            .map(|lease| lease.image)
            .collect();
        let mut pruned = Pruned::default();
        for id in self.image_ids()? {
            let names = references.of(&id);
            if leased.contains(&id) || (which == Prune::Dangling && !names.is_empty()) {
                continue;
            }
            pruned.untagged.extend(names);
            pruned.untagged.extend(references.digests_of(&id));
            references.forget(&id);
            pruned.deleted.push(id);
        }
        // Names first: one of an image that is gone would be an error, an image without a name is none.
        if !pruned.untagged.is_empty() {
            self.write_references(&references)?;
        }
        for id in &pruned.deleted {
            self.delete_image(id)?;
        }
        let orphans = self.delete_orphan_layers()?;
        pruned.deleted_layers = orphans.layers;
        pruned.freed = orphans.freed;
        Ok(pruned)
    }

    fn find(&self, name: &str, references: &References) -> Result<Found> {
        let not_found = || Error::NotFound {
            name: name.chars().take(300).collect(),
        };
        if let Ok(reference) = name.parse::<Reference>()
            && let Some(found) = self.find_reference(reference, references)?
        {
            return Ok(found);
        }
        let prefix = name.strip_prefix("sha256:").unwrap_or(name);
        if prefix.is_empty()
            || prefix.len() > 64
            || !prefix.bytes().all(|byte| byte.is_ascii_hexdigit())
        {
            return Err(not_found());
        }
        let prefix = prefix.to_ascii_lowercase();
        let mut matches: Vec<Digest> = self
            .image_ids()?
            .into_iter()
            .filter(|id| id.hex().starts_with(&prefix))
            .collect();
        match (matches.len(), matches.pop()) {
            (_, None) => Err(not_found()),
            (1, Some(id)) => Ok(Found::ById(id)),
            (_, Some(last)) => {
                matches.push(last);
                Err(Error::AmbiguousId { prefix, matches })
            }
        }
    }

    fn find_reference(
        &self,
        reference: Reference,
        references: &References,
    ) -> Result<Option<Found>> {
        let known = references.get(&reference);
        let Some(digest) = reference.digest() else {
            return Ok(known.map(|id| Found::ByName(reference, id)));
        };
        if let Some(id) = known {
            return Ok(Some(Found::ById(id)));
        }
        // An image that was not pulled: the one of that repository that came with that manifest.
        for id in references.in_repository(&reference) {
            if self
                .read_record(&id)?
                .and_then(|record| record.manifest_digest)
                .as_ref()
                == Some(digest)
            {
                return Ok(Some(Found::ById(id)));
            }
        }
        Ok(None)
    }

    fn containers_using(&self, id: &Digest) -> Result<Vec<String>> {
        Ok(self
            .leases()?
            .into_iter()
            .filter(|lease| lease.image == *id)
            .map(|lease| lease.container)
            .collect())
    }

    pub(super) fn image_ids(&self) -> Result<Vec<Digest>> {
        let names = names(&self.images_dir())?;
        Ok(names
            .iter()
            .filter_map(|name| format!("sha256:{name}").parse().ok())
            .collect())
    }

    pub(super) fn read_record(&self, id: &Digest) -> Result<Option<Record>> {
        let path = self.image_dir(id).join(RECORD);
        match read_text(&path)? {
            None => Ok(None),
            Some(text) => match serde_json::from_str(&text) {
                Ok(record) => Ok(Some(record)),
                Err(error) => Err(Error::Corrupt {
                    path,
                    reason: error.to_string(),
                }),
            },
        }
    }

    fn read_image(&self, id: &Digest, references: &References) -> Result<Image> {
        let not_found = || Error::NotFound {
            name: id.to_string(),
        };
        let record = self.read_record(id)?.ok_or_else(not_found)?;
        let config_path = self.image_dir(id).join(CONFIG);
        let config_json = read_text(&config_path)?.ok_or_else(not_found)?.into_bytes();
        let config: ImageConfiguration =
            serde_json::from_slice(&config_json).map_err(|error| Error::Corrupt {
                path: config_path,
                reason: error.to_string(),
            })?;
        let mut size = 0;
        let mut layers = Vec::with_capacity(record.layers.len());
        for RecordedLayer {
            diff_id,
            size: length,
            ..
        } in record.layers
        {
            let path = self.layer_path(&diff_id);
            size += self.check_layer(&path, length)?;
            layers.push(LayerRef {
                diff_id,
                path,
                size: length,
            });
        }
        Ok(Image {
            id: *id,
            references: references.of(id),
            digests: references.digests_of(id),
            manifest_digest: record.manifest_digest,
            created: config.created().as_deref().and_then(parse_time),
            config,
            config_json,
            layers,
            size,
        })
    }

    /// Checks that a layer is there and of its recorded length; the bytes it takes on disk.
    fn check_layer(&self, path: &PathBuf, length: u64) -> Result<u64> {
        let corrupt = |reason| Error::Corrupt {
            path: path.clone(),
            reason,
        };
        match fs::metadata(path) {
            Ok(metadata) if metadata.len() == length => Ok(metadata.blocks() * 512),
            Ok(metadata) => Err(corrupt(format!(
                "it has {} bytes, expected {length}",
                metadata.len()
            ))),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                Err(corrupt("it is missing".to_owned()))
            }
            Err(error) => Err(Error::io("read", path, error)),
        }
    }

    /// Removes an image's directory; its layers stay. The caller holds the lock.
    pub(super) fn delete_image(&self, id: &Digest) -> Result<()> {
        let dir = self.image_dir(id);
        // The record goes first: without it there is no image, whatever else is left.
        remove_file(&dir.join(RECORD))?;
        fs::remove_dir_all(&dir).map_err(Error::on("remove", &dir))?;
        sync_dir(&self.images_dir())
    }

    /// Removes the layers and blobs that no image has. The caller holds the lock.
    pub(super) fn delete_orphan_layers(&self) -> Result<Orphans> {
        let (mut layers, mut blobs) = (BTreeSet::new(), BTreeSet::new());
        for id in self.image_ids()? {
            let record = self.read_record(&id)?;
            for layer in record.into_iter().flat_map(|record| record.layers) {
                layers.insert(layer.diff_id);
                blobs.extend(layer.blob.map(|blob| blob.digest));
            }
        }
        let mut orphans = Orphans::default();
        for name in names(&self.layers_dir())? {
            let diff_id = name.strip_suffix(".erofs").and_then(digest_of_hex);
            if let Some(diff_id) = diff_id.filter(|diff_id| !layers.contains(diff_id)) {
                orphans.freed += delete(&self.layer_path(&diff_id))?;
                orphans.layers.push(diff_id);
            }
        }
        for name in names(&self.blobs_dir())? {
            let digest = digest_of_hex(&name);
            if let Some(digest) = digest.filter(|digest| !blobs.contains(digest)) {
                orphans.freed += delete(&self.blob_path(&digest))?;
            }
        }
        Ok(orphans)
    }
}

/// What [`Store::delete_orphan_layers`] removed.
#[derive(Debug, Default)]
pub(super) struct Orphans {
    pub(super) layers: Vec<Digest>,
    /// Bytes of disk, those of blobs too.
    pub(super) freed: u64,
}

fn digest_of_hex(hex: &str) -> Option<Digest> {
    format!("sha256:{hex}").parse().ok()
}

/// Removes a file; the bytes of disk that it took.
fn delete(path: &std::path::Path) -> Result<u64> {
    let bytes = fs::metadata(path).map_or(0, |metadata| metadata.blocks() * 512);
    remove_file(path)?;
    Ok(bytes)
}

/// The time in an image configuration (RFC 3339); `None` when it is malformed, as nothing depends on it.
fn parse_time(text: &str) -> Option<SystemTime> {
    OffsetDateTime::parse(text, &Rfc3339)
        .ok()
        .map(SystemTime::from)
}
