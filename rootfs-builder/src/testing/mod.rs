//! What the tests of several modules share: archives made byte by byte, images read back by another implementation.

mod image;
mod oci;
mod tar;

pub(crate) use image::{Node, NodeKind, read_image};
pub(crate) use oci::{Layout, config, docker_archive, gzip, tar_of_directory};
pub(crate) use tar::{Item, TarBuilder, seal};

use std::process::{Command, Stdio};

/// Has `fsck.erofs` check an image: the format's own tool, which shares no code with us.
pub(crate) fn fsck(image: &std::path::Path) {
    let output = Command::new("fsck.erofs")
        .arg("--extract")
        .arg(image)
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|error| {
            panic!("these tests need fsck.erofs (Debian package erofs-utils): {error}")
        });
    assert!(
        output.status.success(),
        "fsck.erofs rejects {}: {}{}",
        image.display(),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}
