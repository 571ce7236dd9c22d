//! The content-addressed image store.
//!
//! # On disk
//! | path under the root | what it is |
//! |---|---|
//! | `version` | the format of this table |
//! | `layers/<diff id>.erofs` | one layer, read-only, named by its [`LayerRef::diff_id`] |
//! | `blobs/<digest>` | one layer as it came, compressed: what [`Store::save`] writes |
//! | `images/<id>/` | one image: `config.json` as it came, `record.json` (what we know of it) |
//! | `references.json` | names to image ids, by tag and by digest |
//! | `leases/<container>` | the id of the image that the container uses |
//! | `tmp/<random>/` | one running load; its owner holds an flock on it |
//! | `lock` | flock: held exclusively by whoever changes any of the above |
//!
//! # Concurrency
//! A load works in a directory of its own under `tmp/` and takes the lock only to publish by rename, so loads run
//! side by side and a second load of the same image changes nothing. A layer that the store already has is
//! hard-linked into that directory first, so removing images at the same time cannot take it away. Readers take no
//! lock: every file is complete when it appears and never changes.
//!
//! # Durability
//! A layer's data and an image's files are synced before they are renamed into place, and each directory after it, in
//! the order layers, image, names: a name that survives a power cut has everything beneath it.
//! A load that dies leaves only its directory in `tmp/`, or layers that no image has; the next
//! [`Store::open`] finds the directory without an owner and removes both.

mod attributes;
mod blobs;
mod disk;
mod images;
mod leases;
mod load;
mod publish;
mod references;
mod save;
mod select;
mod source;
mod staging;
#[cfg(test)]
mod tests;
mod work;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use oci_spec::image::ImageConfiguration;

use crate::digest::Digest;
use crate::error::Result;
use crate::limits::Limits;
use crate::reference::Reference;

pub use select::{BlobRef, MAX_INDEX_DEPTH, Manifest, PLATFORM};
pub use source::Source;
pub use staging::Staging;

/// A handle on an image store; cheap, and safe to use from several threads and processes at once.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
    limits: Limits,
    lock_timeout: Duration,
}

/// An image in the store.
#[derive(Debug, Clone)]
pub struct Image {
    /// The digest of the configuration, which is what docker calls the image's id.
    pub id: Digest,
    /// The names of the image, sorted. A dangling image has none.
    pub references: Vec<Reference>,
    /// The names with digests under which it was pulled, sorted.
    pub digests: Vec<Reference>,
    /// The digest of the manifest it was loaded with; docker archives of old have none.
    pub manifest_digest: Option<Digest>,
    /// The image configuration: entrypoint, environment, user and so on.
    pub config: ImageConfiguration,
    /// The configuration exactly as it came; [`Image::id`] is its digest. It may have fields that
    /// `config` does not know (docker's `Healthcheck`, `Shell`, `OnBuild`).
    pub config_json: Vec<u8>,
    /// The layers, bottom to top. They can be one more than the configuration's diff ids: a small one on top that
    /// gives directories the attributes that a layer without an entry for them would hide.
    pub layers: Vec<LayerRef>,
    /// Bytes that the layers take on disk, without their blobs.
    pub size: u64,
    /// When the image was built, if it says so.
    pub created: Option<SystemTime>,
}

/// One layer of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerRef {
    /// SHA-256 of the uncompressed layer tar; for a layer that the store has made, of its EROFS image.
    pub diff_id: Digest,
    /// The EROFS image, absolute when the store's root is. Never written to once it exists; may be sparse.
    pub path: PathBuf,
    /// Length of the EROFS image in bytes, a multiple of 4096.
    pub size: u64,
}

/// One line of `caisson images`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageSummary {
    /// The digest of the configuration.
    pub id: Digest,
    /// The names of the image, sorted. A dangling image has none.
    pub references: Vec<Reference>,
    /// When the image was built, if it says so.
    pub created: Option<SystemTime>,
    /// Bytes that the layers take on disk, those shared with other images included.
    pub size: u64,
    /// How many layers it has.
    pub layers: usize,
}

/// One image that [`Store::load`] brought in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadedImage {
    /// The digest of the configuration.
    pub id: Digest,
    /// The names it was given by this load.
    pub references: Vec<Reference>,
    /// Whether the store did not have the image before.
    pub new: bool,
}

impl LoadedImage {
    /// Its first name in docker's short form, or its id when it has no name.
    pub fn display_name(&self) -> String {
        self.references
            .first()
            .map_or_else(|| self.id.to_string(), Reference::familiar)
    }
}

/// A container's claim on an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// The container.
    pub container: String,
    /// The image it uses.
    pub image: Digest,
}

/// What [`Store::remove`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Removed {
    /// Names that are gone.
    pub untagged: Vec<Reference>,
    /// Images that are gone.
    pub deleted: Vec<Digest>,
    /// Layers that are gone, with their blobs, because no other image has them.
    pub deleted_layers: Vec<Digest>,
}

/// Which images [`Store::prune`] removes, of those that no container uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prune {
    /// Those without a tag.
    Dangling,
    /// All.
    Unused,
}

/// What [`Store::prune`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Names that are gone.
    pub untagged: Vec<Reference>,
    /// Images that are gone.
    pub deleted: Vec<Digest>,
    /// Layers that no image has any more.
    pub deleted_layers: Vec<Digest>,
    /// Bytes of disk that became free.
    pub freed: u64,
}

impl Store {
    /// Where the node's store is.
    pub const DEFAULT_ROOT: &str = "/var/lib/caisson/images";

    /// Opens the store at `root`, creating it if there is none, and clears what loads that died have left.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io) when the directories cannot be made;
    /// [`Error::StoreVersion`](crate::Error::StoreVersion) when a newer Caisson wrote it.
    pub fn open(root: impl AsRef<Path>) -> Result<Store> {
        let store = Store {
            root: root.as_ref().to_owned(),
            limits: Limits::default(),
            lock_timeout: Duration::from_secs(120),
        };
        store.create_skeleton()?;
        store.sweep()?;
        Ok(store)
    }

    /// Replaces the limits on what is loaded.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Store {
        self.limits = limits;
        self
    }

    /// Replaces the time to wait for other processes that change the store (default: 120 s).
    #[must_use]
    pub fn with_lock_timeout(mut self, timeout: Duration) -> Store {
        self.lock_timeout = timeout;
        self
    }

    /// The store's root directory.
    pub fn root(&self) -> &Path {
        &self.root
    }
}
