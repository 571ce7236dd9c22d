//! Images for microVMs: the guest's own image, and OCI images as stacks of EROFS layers.
//!
//! - [`Store`]: a content-addressed image store. Loads OCI layouts, OCI archives and docker archives,
//!   converts every layer to one read-only EROFS image, verifies all digests, counts who uses what.
//! - [`guest_image`]: the guest's root file system (agent and skeleton), reproducible byte for byte.
//! - [`erofs`], [`tar`], [`layer`]: the parts; they know nothing of the store.
//!
//! # Example
//! ```no_run
//! use caisson_rootfs_builder::{Source, Store};
//!
//! # fn main() -> Result<(), caisson_rootfs_builder::Error> {
//! let store = Store::open(Store::DEFAULT_ROOT)?;
//!
//! // `caisson load -i busybox.tar`
//! for image in store.load(Source::Path("busybox.tar".as_ref()), None)? {
//!     println!("Loaded image: {}", image.display_name());
//! }
//!
//! // `caisson images`
//! for image in store.images()? {
//!     println!("{} {} {}", image.references.len(), image.id.short(), image.size);
//! }
//!
//! // `caisson run busybox`: the lease keeps the layers until the container is removed.
//! let image = store.lease("container-1", "busybox")?;
//! let _entrypoint = image.config.config().as_ref().and_then(|config| config.entrypoint().clone());
//! for layer in &image.layers {
//!     println!("{} {}", layer.diff_id, layer.path.display()); // bottom to top
//! }
//! store.release("container-1")?;
//!
//! // `caisson rmi busybox`
//! let removed = store.remove("busybox", false)?;
//! println!("Untagged: {:?}, deleted: {:?}", removed.untagged, removed.deleted);
//! # Ok(())
//! # }
//! ```
#![forbid(unsafe_code)]

pub mod digest;
pub mod erofs;
mod error;
pub mod guest_image;
pub mod layer;
pub mod limits;
pub mod reference;
pub mod store;
pub mod tar;
#[cfg(test)]
mod testing;

pub use digest::Digest;
pub use error::{Error, Result};
pub use limits::Limits;
pub use oci_spec::image::ImageConfiguration;
pub use reference::Reference;
pub use store::{
    BlobRef, Image, ImageSummary, LayerRef, Lease, LoadedImage, MAX_INDEX_DEPTH, Manifest,
    PLATFORM, Prune, Pruned, Removed, Source, Staging, Store,
};
