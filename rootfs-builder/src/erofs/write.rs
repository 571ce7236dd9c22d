//! Lays out and writes everything but the data of files.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::ops::Bound;
use std::os::unix::fs::FileExt;

use super::ErofsError;
use super::content::{At, Content, ContentWriter, Place};
use super::format::{
    BLOCK, DIRENT, INODE, Inode, Layout, NULL_ADDRESS, SLOT, SUPER_OFFSET, SuperBlock,
    device_number,
};
use super::tree::{Kind, NodeId, Tree};
use crate::digest::HashingReader;

/// The root's inode is 64 bytes into the metadata area: number 0 means "none" to programs that read directories.
const ROOT_NID: u16 = 2;

/// How the file system's UUID is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Uuid {
    /// These bytes, made a valid UUID of version 8 (RFC 9562).
    Given([u8; 16]),
    /// From the SHA-256 of the image itself (with a UUID of zeros), which means to read it once more.
    FromContent,
}

/// A node to be written, in the order in which the inodes lie.
struct Placed {
    node: NodeId,
    /// The directory it was found in first.
    parent: NodeId,
    links: u32,
    /// Where its directory entries or link target are, when not behind the inode.
    block: u32,
    layout: Layout,
    nid: u64,
}

impl ContentWriter<'_> {
    /// Writes names, attributes and the superblock: the image is complete. Gives its length in bytes.
    ///
    /// The file is not synced.
    ///
    /// # Errors
    /// [`ErofsError::Write`], [`ErofsError::TooLarge`], [`ErofsError::Read`] when the spool fails.
    pub fn finish(mut self, tree: &Tree, uuid: Uuid) -> Result<u64, ErofsError> {
        let (mut order, positions) = walk(tree)?;
        for placed in &mut order {
            place_data(tree, placed, &mut self.next_block)?;
        }
        let metadata_block = self.next_block;
        let metadata_bytes = assign_nids(tree, &mut order)?;
        let blocks = metadata_block + metadata_bytes.div_ceil(BLOCK);
        if blocks >= u64::from(NULL_ADDRESS) {
            return Err(ErofsError::TooLarge);
        }
        self.image
            .set_len(blocks * BLOCK)
            .map_err(ErofsError::Write)?;
        let mut out = Output {
            file: self.image,
            offset: metadata_block * BLOCK,
            buffer: Vec::new(),
        };
        for (number, placed) in order.iter().enumerate() {
            let lookup = |id: NodeId| order[positions[id.index()]].nid;
            write_node(
                &self,
                tree,
                placed,
                number as u32 + 1,
                &lookup,
                metadata_block * BLOCK,
                &mut out,
            )?;
        }
        out.flush()?;
        let has_chunks = order
            .iter()
            .any(|placed| placed.layout == Layout::ChunkBased);
        let mut superblock = SuperBlock {
            root: ROOT_NID,
            inodes: order.len() as u64,
            blocks: blocks as u32,
            metadata_block: metadata_block as u32,
            uuid: [0; 16],
            has_chunks,
        };
        superblock.uuid = match uuid {
            Uuid::Given(bytes) => version_8(bytes),
            Uuid::FromContent => {
                self.write_superblock(&superblock)?;
                version_8(hash(self.image)?)
            }
        };
        self.write_superblock(&superblock)?;
        Ok(blocks * BLOCK)
    }

    fn write_superblock(&self, superblock: &SuperBlock) -> Result<(), ErofsError> {
        self.image
            .write_all_at(&superblock.encode(), SUPER_OFFSET)
            .map_err(ErofsError::Write)
    }
}

/// All nodes that the root leads to, directory by directory, with their link counts; and where each is in that list, by
/// [`NodeId::index`].
fn walk(tree: &Tree) -> Result<(Vec<Placed>, Vec<usize>), ErofsError> {
    const UNSEEN: usize = usize::MAX;
    let new = |node, parent| Placed {
        node,
        parent,
        links: 0,
        block: 0,
        layout: Layout::FlatPlain,
        nid: 0,
    };
    let mut order = Vec::with_capacity(tree.capacity());
    let mut positions = vec![UNSEEN; tree.capacity()];
    order.push(new(Tree::ROOT, Tree::ROOT));
    positions[Tree::ROOT.index()] = 0;
    let mut next = 0;
    while let Some(placed) = order.get(next) {
        let directory = placed.node;
        if let Kind::Directory(entries) = tree.kind(directory) {
            order[next].links += 2;
            for &child in entries.values() {
                if positions[child.index()] == UNSEEN {
                    positions[child.index()] = order.len();
                    order.push(new(child, directory));
                }
                let position = positions[child.index()];
                if matches!(tree.kind(child), Kind::Directory(_)) {
                    // Its `..` is a link to this directory.
                    order[next].links += 1;
                } else {
                    order[position].links += 1;
                }
            }
        }
        next += 1;
    }
    if u32::try_from(order.len()).is_err() {
        return Err(ErofsError::TooLarge);
    }
    Ok((order, positions))
}

/// Decides on the layout of a node, and reserves blocks for what does not fit behind its inode.
fn place_data(tree: &Tree, placed: &mut Placed, next_block: &mut u64) -> Result<(), ErofsError> {
    let node = tree.node(placed.node);
    let head = INODE + node.attributes.xattrs.encoded_bytes();
    let size = match &node.kind {
        Kind::File(Content(Place::Spooled { size, .. })) => *size,
        Kind::File(Content(Place::Chunked { .. })) => {
            placed.layout = Layout::ChunkBased;
            return Ok(());
        }
        Kind::Directory(entries) => directory_bytes(entries),
        Kind::Symlink(target) => target.len() as u64,
        _ => return Ok(()),
    };
    if head + size <= BLOCK {
        placed.layout = Layout::FlatInline;
        return Ok(());
    }
    if *next_block + size.div_ceil(BLOCK) >= u64::from(NULL_ADDRESS) {
        return Err(ErofsError::TooLarge);
    }
    placed.block = *next_block as u32;
    *next_block += size.div_ceil(BLOCK);
    Ok(())
}

/// Gives every inode its place; the length of the metadata area in bytes.
fn assign_nids(tree: &Tree, order: &mut [Placed]) -> Result<u64, ErofsError> {
    let mut position = u64::from(ROOT_NID) * SLOT;
    for placed in order {
        let node = tree.node(placed.node);
        let head = INODE + node.attributes.xattrs.encoded_bytes();
        // What must lie within one block: the inode, and inline data together with all before it.
        let together = match placed.layout {
            Layout::FlatInline => head + inline_bytes(&node.kind),
            _ => INODE,
        };
        if position % BLOCK + together > BLOCK {
            position = position.next_multiple_of(BLOCK);
        }
        placed.nid = position / SLOT;
        let behind = match (&node.kind, placed.layout) {
            (kind, Layout::FlatInline) => inline_bytes(kind),
            (Kind::File(content), _) => content.table_bytes() as u64,
            _ => 0,
        };
        position = (position + head + behind).next_multiple_of(SLOT);
    }
    Ok(position)
}

/// Length of a node's data when it lies behind its inode, in bytes.
fn inline_bytes(kind: &Kind) -> u64 {
    match kind {
        Kind::Directory(entries) => directory_bytes(entries),
        Kind::File(Content(Place::Spooled { size, .. })) => *size,
        Kind::Symlink(target) => target.len() as u64,
        _ => 0,
    }
}

/// Writes an inode and what follows it, and the blocks of a long directory or link.
fn write_node(
    writer: &ContentWriter<'_>,
    tree: &Tree,
    placed: &Placed,
    number: u32,
    nid_of: &dyn Fn(NodeId) -> u64,
    metadata_start: u64,
    out: &mut Output<'_>,
) -> Result<(), ErofsError> {
    let node = tree.node(placed.node);
    let attributes = &node.attributes;
    let mut data = Vec::new();
    let (size, union) = match &node.kind {
        Kind::Directory(entries) => {
            data = encode_directory(tree, entries, placed, nid_of);
            (data.len() as u64, placed.block)
        }
        Kind::Symlink(target) => {
            data.extend_from_slice(target);
            (data.len() as u64, placed.block)
        }
        Kind::File(Content(place)) => match place {
            Place::Empty => (0, 0),
            Place::Flat { block, size } => (*size, *block),
            Place::Spooled { offset, size } => {
                let mut spooled = At {
                    file: &writer.spool,
                    offset: *offset,
                }
                .take(*size);
                spooled.read_to_end(&mut data).map_err(ErofsError::Read)?;
                (*size, placed.block)
            }
            Place::Chunked { size, bits, .. } => (*size, *bits),
        },
        Kind::CharDevice(major, minor) | Kind::BlockDevice(major, minor) => (
            0,
            device_number(*major, *minor).ok_or(ErofsError::TooLarge)?,
        ),
        Kind::Fifo => (0, 0),
    };
    let inode = Inode {
        layout: placed.layout,
        xattr_bytes: attributes.xattrs.encoded_bytes(),
        mode: node.kind.file_type().mode() | attributes.mode & 0o7777,
        size,
        union,
        number,
        uid: attributes.uid,
        gid: attributes.gid,
        mtime: attributes.mtime,
        links: placed.links,
    };
    out.seek(metadata_start + placed.nid * SLOT)?;
    out.put(&inode.encode())?;
    out.put(&attributes.xattrs.encode())?;
    match (&node.kind, placed.layout) {
        (_, Layout::FlatInline) => out.put(&data),
        (Kind::File(Content(Place::Chunked { blocks, .. })), _) => {
            let table: Vec<u8> = blocks
                .iter()
                .flat_map(|block| block.to_le_bytes())
                .collect();
            out.put(&table)
        }
        _ => writer
            .image
            .write_all_at(&data, u64::from(placed.block) * BLOCK)
            .map_err(ErofsError::Write),
    }
}

/// The names of a directory in the order that the kernel searches in: by bytes, `.` and `..` among them.
fn sorted_names(
    entries: &BTreeMap<Box<[u8]>, NodeId>,
) -> impl Iterator<Item = (&[u8], Option<NodeId>)> {
    let between = |after: Bound<&[u8]>, before: Bound<&[u8]>| {
        entries
            .range::<[u8], _>((after, before))
            .map(|(name, id)| (&**name, Some(*id)))
    };
    between(Bound::Unbounded, Bound::Excluded(b"."))
        .chain([(&b"."[..], None)])
        .chain(between(Bound::Excluded(b"."), Bound::Excluded(b"..")))
        .chain([(&b".."[..], None)])
        .chain(between(Bound::Excluded(b".."), Bound::Unbounded))
}

/// Length of a directory in bytes: whole blocks, and what the last one uses.
fn directory_bytes(entries: &BTreeMap<Box<[u8]>, NodeId>) -> u64 {
    let mut full_blocks = 0;
    let mut used = 0;
    for (name, _) in sorted_names(entries) {
        let length = DIRENT + name.len();
        if used + length > BLOCK as usize {
            full_blocks += 1;
            used = 0;
        }
        used += length;
    }
    full_blocks * BLOCK + used as u64
}

/// The blocks of a directory: in each the entries, then their names in the same order.
fn encode_directory(
    tree: &Tree,
    entries: &BTreeMap<Box<[u8]>, NodeId>,
    placed: &Placed,
    nid_of: &dyn Fn(NodeId) -> u64,
) -> Vec<u8> {
    let mut out = Vec::new();
    let mut block: Vec<(&[u8], NodeId)> = Vec::new();
    let mut used = 0;
    for (name, child) in sorted_names(entries) {
        let id = child.unwrap_or(if name == b"." {
            placed.node
        } else {
            placed.parent
        });
        let length = DIRENT + name.len();
        if used + length > BLOCK as usize {
            encode_directory_block(tree, &block, nid_of, &mut out);
            out.resize(out.len().next_multiple_of(BLOCK as usize), 0);
            block.clear();
            used = 0;
        }
        used += length;
        block.push((name, id));
    }
    encode_directory_block(tree, &block, nid_of, &mut out);
    out
}

fn encode_directory_block(
    tree: &Tree,
    entries: &[(&[u8], NodeId)],
    nid_of: &dyn Fn(NodeId) -> u64,
    out: &mut Vec<u8>,
) {
    let mut name_offset = entries.len() * DIRENT;
    for (name, id) in entries {
        out.extend(nid_of(*id).to_le_bytes());
        // Within a block of 4096 bytes.
        out.extend((name_offset as u16).to_le_bytes());
        out.extend([tree.kind(*id).file_type() as u8, 0]);
        name_offset += name.len();
    }
    for (name, _) in entries {
        out.extend_from_slice(name);
    }
}

/// Sequential output with a buffer; gaps are zeros.
struct Output<'a> {
    file: &'a File,
    /// Where the buffer belongs.
    offset: u64,
    buffer: Vec<u8>,
}

impl Output<'_> {
    /// Moves on to an offset that is not before the current one.
    fn seek(&mut self, offset: u64) -> Result<(), ErofsError> {
        let gap = offset - (self.offset + self.buffer.len() as u64);
        self.buffer.resize(self.buffer.len() + gap as usize, 0);
        self.put(&[])
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), ErofsError> {
        const FULL: usize = 256 << 10;
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= FULL {
            self.flush()
        } else {
            Ok(())
        }
    }

    fn flush(&mut self) -> Result<(), ErofsError> {
        self.file
            .write_all_at(&self.buffer, self.offset)
            .map_err(ErofsError::Write)?;
        self.offset += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

/// The first half of the SHA-256 of a file.
fn hash(file: &File) -> Result<[u8; 16], ErofsError> {
    let mut reader = HashingReader::new(At { file, offset: 0 });
    std::io::copy(&mut reader, &mut std::io::sink()).map_err(ErofsError::Read)?;
    let (digest, _) = reader.finish();
    let mut half = [0; 16];
    (&mut half[..])
        .write_all(&digest.bytes()[..16])
        .map_err(ErofsError::Read)?;
    Ok(half)
}

/// Sets the version and variant bits of RFC 9562.
fn version_8(mut bytes: [u8; 16]) -> [u8; 16] {
    bytes[6] = bytes[6] & 0x0f | 0x80;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    bytes
}
