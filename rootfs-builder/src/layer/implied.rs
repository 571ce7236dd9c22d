//! Remembers which directories of a layer have no entry in its archive.
//!
//! Such a directory must be in the image, but its attributes are not the layer's: in an overlay it would hide those that a
//! lower layer gives it. The store puts that right when it knows all layers of an image; for that the image file has
//! a list of these directories behind the file system: its length in bytes (u64, little-endian), then the paths, each
//! ended by a NUL (the root is the empty path), padded to a whole block. No list means none.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::erofs::{Image, Kind, NodeId, Tree};

/// The list's length field, in bytes.
const HEADER: u64 = 8;
/// Image files are whole blocks of this many bytes.
const BLOCK: u64 = 4096;

/// The paths of those of `directories` that the root leads to.
pub(super) fn paths(tree: &Tree, directories: &BTreeSet<NodeId>) -> Vec<Vec<u8>> {
    let mut paths = Vec::new();
    let mut pending = vec![(Tree::ROOT, Vec::new())];
    while let Some((id, path)) = pending.pop() {
        if let Kind::Directory(entries) = tree.kind(id) {
            for (name, &child) in entries {
                if matches!(tree.kind(child), Kind::Directory(_)) {
                    let separator: &[u8] = if path.is_empty() { b"" } else { b"/" };
                    pending.push((child, [&path, separator, name].concat()));
                }
            }
        }
        if directories.contains(&id) {
            paths.push(path);
        }
    }
    paths.sort();
    paths
}

/// Writes the list behind a file system of `length` bytes.
pub(super) fn write(image: &File, length: u64, paths: &[Vec<u8>]) -> io::Result<()> {
    if paths.is_empty() {
        return Ok(());
    }
    let list: Vec<u8> = paths
        .iter()
        .flat_map(|path| path.iter().copied().chain([0]))
        .collect();
    image.write_all_at(&(list.len() as u64).to_le_bytes(), length)?;
    image.write_all_at(&list, length + HEADER)?;
    image.set_len((length + HEADER + list.len() as u64).next_multiple_of(BLOCK))
}

/// The paths of the directories of a converted layer that its archive had no entry for.
///
/// # Errors
/// Those of reading; `InvalidData` when the list is damaged.
pub fn implied_directories(image: &File) -> io::Result<Vec<Vec<u8>>> {
    let start = Image::open(image)?.length();
    let length = image.metadata()?.len();
    if length <= start {
        return Ok(Vec::new());
    }
    let mut header = [0; HEADER as usize];
    image.read_exact_at(&mut header, start)?;
    let size = u64::from_le_bytes(header);
    if size > length - start - HEADER {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "its list of directories is damaged",
        ));
    }
    let mut list = vec![0; size as usize];
    image.read_exact_at(&mut list, start + HEADER)?;
    Ok(list
        .split_inclusive(|&byte| byte == 0)
        .map(|path| path.strip_suffix(b"\0").unwrap_or(path).to_vec())
        .collect())
}
