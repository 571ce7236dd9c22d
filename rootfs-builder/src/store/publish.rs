//! The last step of a load: everything is verified and synced, and appears in the store by renames under its lock.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::disk::{remove_file, sync_dir};
use super::images::{CONFIG, RECORD, Record};
use super::work::WorkDir;
use super::{LoadedImage, Store};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::reference::Reference;

/// An image whose layers are in the work directory, all verified.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) id: Digest,
    pub(super) config_json: Vec<u8>,
    pub(super) record: Record,
    pub(super) references: Vec<Reference>,
}

/// Where the work directory keeps a layer until it is published.
pub(super) fn staged_layer(work: &WorkDir, diff_id: &Digest) -> PathBuf {
    work.path().join(format!("{}.erofs", diff_id.hex()))
}

impl Store {
    /// Moves prepared images into the store and names them; on an error nothing of them stays.
    pub(super) fn publish(
        &self,
        work: &WorkDir,
        prepared: &[Prepared],
    ) -> Result<Vec<LoadedImage>> {
        for image in prepared {
            stage_image(work, image)?;
        }
        let _lock = self.lock()?;
        let mut created = Vec::new();
        let result = self.publish_locked(work, prepared, &mut created);
        if result.is_err() {
            self.withdraw(&created);
        }
        result
    }

    fn publish_locked(
        &self,
        work: &WorkDir,
        prepared: &[Prepared],
        created: &mut Vec<Digest>,
    ) -> Result<Vec<LoadedImage>> {
        let mut references = self.read_references()?;
        for layer in prepared.iter().flat_map(|image| &image.record.layers) {
            self.publish_layer(work, &layer.diff_id, layer.size)?;
            if let Some(blob) = &layer.blob {
                self.publish_blob(work, blob)?;
            }
        }
        sync_dir(&self.layers_dir())?;
        sync_dir(&self.blobs_dir())?;
        let mut loaded = Vec::new();
        for image in prepared {
            let new = self.publish_image(work, image)?;
            if new {
                created.push(image.id);
            }
            for reference in &image.references {
                references.insert(reference.clone(), image.id);
            }
            loaded.push(LoadedImage {
                id: image.id,
                references: image.references.clone(),
                new,
            });
        }
        sync_dir(&self.images_dir())?;
        self.write_references(&references)?;
        Ok(loaded)
    }

    fn publish_layer(&self, work: &WorkDir, diff_id: &Digest, size: u64) -> Result<()> {
        let path = self.layer_path(diff_id);
        match fs::metadata(&path) {
            // Another load was faster, or the store had it all along.
            Ok(metadata) if metadata.len() == size => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io("read", &path, error)),
        }
        fs::rename(staged_layer(work, diff_id), &path).map_err(Error::on("rename", &path))
    }

    /// Whether the image is new to the store.
    fn publish_image(&self, work: &WorkDir, image: &Prepared) -> Result<bool> {
        let dir = self.image_dir(&image.id);
        match self.read_record(&image.id) {
            Ok(Some(old)) => {
                let kept =
                    |record: &Record| record.layers.iter().filter_map(|l| l.blob.as_ref()).count();
                let manifest =
                    old.manifest_digest.is_none() && image.record.manifest_digest.is_some();
                if manifest || kept(&image.record) > kept(&old) {
                    self.replace(&dir.join(RECORD), &record_json(&image.record, &dir)?)?;
                }
                return Ok(false);
            }
            // What a removal that died has left, or a damaged record, is replaced.
            Ok(None) | Err(Error::Corrupt { .. }) => {}
            Err(error) => return Err(error),
        }
        match fs::remove_dir_all(&dir) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io("remove", &dir, error)),
        }
        fs::rename(staged_image(work, &image.id), &dir).map_err(Error::on("rename", &dir))?;
        Ok(true)
    }

    /// Takes back what a failed publication has created. What fails here is found again by `prune`.
    fn withdraw(&self, created: &[Digest]) {
        for id in created {
            if let Err(error) = self.delete_image(id) {
                log::warn!("cannot withdraw image {id}: {error}");
            }
        }
        if let Err(error) = self.delete_orphan_layers() {
            log::warn!("cannot remove unused layers: {error}");
        }
    }
}

fn staged_image(work: &WorkDir, id: &Digest) -> PathBuf {
    work.path().join(format!("image-{}", id.hex()))
}

fn stage_image(work: &WorkDir, image: &Prepared) -> Result<()> {
    let dir = staged_image(work, &image.id);
    match fs::create_dir(&dir) {
        Ok(()) => {}
        // The source lists the image twice.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => return Ok(()),
        Err(error) => return Err(Error::io("create", &dir, error)),
    }
    write_synced(&dir.join(CONFIG), &image.config_json)?;
    write_synced(&dir.join(RECORD), &record_json(&image.record, &dir)?)?;
    sync_dir(&dir)
}

fn record_json(record: &Record, dir: &Path) -> Result<Vec<u8>> {
    serde_json::to_vec_pretty(record).map_err(|error| Error::Corrupt {
        path: dir.join(RECORD),
        reason: error.to_string(),
    })
}

fn write_synced(path: &Path, content: &[u8]) -> Result<()> {
    let mut file = File::create(path).map_err(Error::on("create", path))?;
    file.write_all(content).map_err(Error::on("write", path))?;
    file.sync_all().map_err(Error::on("sync", path))
}

/// Finishes a staged layer: read-only and on disk. On an error it is removed.
pub(super) fn seal_layer(path: &Path, file: &File) -> Result<u64> {
    let sealed = file
        .set_permissions(fs::Permissions::from_mode(0o444))
        .and_then(|()| file.sync_all())
        .and_then(|()| file.metadata())
        .map_err(Error::on("sync", path));
    if sealed.is_err() {
        remove_file(path)?;
    }
    Ok(sealed?.len())
}
