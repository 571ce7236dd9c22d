//! The parts of one image that come one by one, from a registry: gathered in a work directory, then loaded.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::blobs::KeptBlobs;
use super::publish::staged_layer;
use super::select::{Manifest, staged_candidate};
use super::source::{Members, Source};
use super::work::WorkDir;
use super::{LoadedImage, Store};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::reference::Reference;

/// A directory in the store where the blobs of one image are put, in any order. It goes with everything in it when
/// this value is dropped or its process dies.
#[derive(Debug)]
pub struct Staging {
    store: Store,
    work: WorkDir,
    /// Blobs of the layers that are held: their images may have gone when the rest has come.
    held: KeptBlobs,
}

impl Store {
    /// Makes a place to gather the blobs of an image.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Busy`].
    pub fn stage(&self) -> Result<Staging> {
        let work = self.work_dir()?;
        let blobs = work.path().join("blobs/sha256");
        fs::create_dir_all(&blobs).map_err(Error::on("create", &blobs))?;
        Ok(Staging {
            store: self.clone(),
            work,
            held: KeptBlobs::new(),
        })
    }

    /// The bounds on what is loaded.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }
}

impl Staging {
    /// Where the blob with this digest has to be put. Nothing may be there that is not whole.
    pub fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.work.path().join("blobs/sha256").join(digest.hex())
    }

    /// A directory for what is not whole yet, on the same file system.
    pub fn directory(&self) -> &Path {
        self.work.path()
    }

    /// Whether the store has the layer already, with its blob; if so it cannot go any more, and its blob is not needed.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Corrupt`].
    pub fn hold_layer(&mut self, diff_id: &Digest) -> Result<bool> {
        let Some(blob) = self.store.hold_blob(&self.work, diff_id)? else {
            return Ok(false);
        };
        let path = staged_layer(&self.work, diff_id);
        match fs::hard_link(self.store.layer_path(diff_id), &path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::io("link", &path, error));
            }
            _ => {}
        }
        self.held.insert(*diff_id, blob);
        Ok(true)
    }

    /// Loads the image of the manifest with that digest, verified as by [`Store::load`]. Each of `names` has either a
    /// tag, which the image gets, or a digest, under which it can be found from now on.
    ///
    /// # Errors
    /// Those of [`Store::load`]; [`Error::MissingBlob`] when a blob was not put here.
    pub fn load(self, manifest: &Digest, names: Vec<Reference>) -> Result<LoadedImage> {
        let limits = &self.store.limits;
        let members = Members::open(Source::Path(self.work.path()), &self.work, limits)?;
        let candidate = staged_candidate(&members, manifest, names, limits)?;
        let mut kept = self.held;
        let prepared = self
            .store
            .prepare(&members, &self.work, candidate, &mut kept)?;
        let mut loaded = self.store.publish(&self.work, &[prepared])?;
        loaded.pop().ok_or_else(|| Error::MissingBlob {
            what: "image",
            name: manifest.to_string(),
        })
    }
}

impl Manifest {
    /// Reads a manifest or an index as a registry gives it; `name` is for messages.
    ///
    /// # Errors
    /// [`Error::InvalidImage`], [`Error::UnknownMediaType`]; [`Error::WrongPlatform`] for an index that has no image
    /// for our platform; [`Error::ForeignLayer`].
    pub fn read(name: &str, json: &[u8]) -> Result<Manifest> {
        super::select::read_manifest(name, json)
    }
}
