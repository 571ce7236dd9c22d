//! Reads EROFS images by the crate `erofs-rs`.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;

use erofs_rs::EroFS;
use erofs_rs::backend::SliceImage;

/// A node as another implementation reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) kind: NodeKind,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: (i64, u32),
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(crate) links: u32,
    pub(crate) inode: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NodeKind {
    Directory,
    /// Content; `None` for files longer than 64 MiB, whose length is the second.
    File(Option<Vec<u8>>, u64),
    Symlink(Vec<u8>),
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
    Other,
}

impl Node {
    pub(crate) fn content(&self) -> &[u8] {
        match &self.kind {
            NodeKind::File(Some(content), _) => content,
            other => panic!("not a readable file: {other:?}"),
        }
    }
}

/// All nodes by path; the root is the empty path.
pub(crate) fn read_image(path: &Path) -> BTreeMap<Vec<u8>, Node> {
    let bytes = std::fs::read(path).unwrap();
    assert_eq!(bytes.len() % 4096, 0, "whole blocks");
    let image = EroFS::new(SliceImage::new(&bytes)).unwrap();
    // What layers have behind the file system is no part of it.
    assert!(image.super_block().block_count() * 4096 <= bytes.len() as u64);
    let mut nodes = BTreeMap::new();
    let root = image
        .get_inode(image.super_block().root_inode_id())
        .unwrap();
    nodes.insert(Vec::new(), node(&image, root));
    for entry in image.walk_dir("/").unwrap() {
        let entry = entry.unwrap();
        let name = entry.dir_entry.file_name();
        if name == b"." || name == b".." {
            continue;
        }
        let path = entry
            .dir_entry
            .path()
            .as_bytes()
            .strip_prefix(b"/")
            .unwrap()
            .to_vec();
        // Found by search too, not only by listing.
        let found = image.xattrs(entry.dir_entry.path()).unwrap();
        let node = node(&image, entry.inode);
        assert_eq!(found, node.xattrs);
        assert!(nodes.insert(path, node).is_none());
    }
    nodes
}

fn node(image: &EroFS<SliceImage<'_>>, inode: erofs_rs::types::Inode) -> Node {
    use std::os::unix::fs::PermissionsExt;
    let file_type = inode.file_type();
    let kind = if inode.is_dir() {
        NodeKind::Directory
    } else if inode.is_file() {
        let size = inode.data_size();
        let mut content = Vec::new();
        if size <= 64 << 20 {
            image
                .open_inode_file(inode)
                .unwrap()
                .read_to_end(&mut content)
                .unwrap();
            NodeKind::File(Some(content), size)
        } else {
            NodeKind::File(None, size)
        }
    } else if inode.is_symlink() {
        NodeKind::Symlink(image.read_link_inode(inode).unwrap().as_bytes().to_vec())
    } else {
        match (inode.device(), format!("{file_type:?}").contains("Char")) {
            (Some((major, minor)), true) => NodeKind::CharDevice(major, minor),
            (Some((major, minor)), false) => NodeKind::BlockDevice(major, minor),
            (None, _) => NodeKind::Other,
        }
    };
    Node {
        kind,
        mode: inode.permissions().mode() & 0o7777,
        uid: inode.uid(),
        gid: inode.gid(),
        mtime: inode.modified_unix(),
        xattrs: image.xattrs_inode(inode).unwrap(),
        links: inode.nlink(),
        inode: inode.id(),
    }
}
