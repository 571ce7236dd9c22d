//! The names and attributes of an image, in memory.

use std::collections::BTreeMap;

use super::content::Content;
use super::format::FileType;
use crate::tar::Timestamp;

/// A node of one [`Tree`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(u32);

/// Owner, permissions, time and extended attributes of a node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Permission, setuid, setgid and sticky bits; others are ignored.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of last modification.
    pub mtime: Timestamp,
    /// Extended attributes.
    pub xattrs: Xattrs,
}

/// What a node is.
#[derive(Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory: names (not `.` or `..`) and what they mean. A node that is no directory may have several names.
    Directory(BTreeMap<Box<[u8]>, NodeId>),
    /// A regular file.
    File(Content),
    /// A symbolic link: 1 to 4095 bytes.
    Symlink(Box<[u8]>),
    /// A character device: major (12 bits) and minor (20 bits) number.
    CharDevice(u32, u32),
    /// A block device: major (12 bits) and minor (20 bits) number.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
}

impl Kind {
    pub(super) fn file_type(&self) -> FileType {
        match self {
            Kind::Directory(_) => FileType::Directory,
            Kind::File(_) => FileType::Regular,
            Kind::Symlink(_) => FileType::Symlink,
            Kind::CharDevice(..) => FileType::CharDevice,
            Kind::BlockDevice(..) => FileType::BlockDevice,
            Kind::Fifo => FileType::Fifo,
        }
    }
}

#[derive(Debug)]
pub(super) struct Node {
    pub(super) attributes: Attributes,
    pub(super) kind: Kind,
}

/// A directory tree. Nodes that nothing leads to any more are not written.
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Node>,
}

impl Tree {
    /// The root directory.
    pub const ROOT: NodeId = NodeId(0);

    /// A tree of an empty root directory.
    pub fn new(root: Attributes) -> Tree {
        Tree {
            nodes: vec![Node {
                attributes: root,
                kind: Kind::Directory(BTreeMap::new()),
            }],
        }
    }

    /// Adds a node without a name, `None` when there are 2³² of them.
    pub fn add(&mut self, attributes: Attributes, kind: Kind) -> Option<NodeId> {
        let id = NodeId(u32::try_from(self.nodes.len()).ok()?);
        self.nodes.push(Node { attributes, kind });
        Some(id)
    }

    /// Gives a node a name in a directory, replacing what had that name; false when `parent` is no directory.
    ///
    /// The caller sees to it that `name` is a valid file name and that a directory has one name only.
    pub fn link(&mut self, parent: NodeId, name: &[u8], child: NodeId) -> bool {
        match &mut self.node_mut(parent).kind {
            Kind::Directory(entries) => {
                entries.insert(name.into(), child);
                true
            }
            _ => false,
        }
    }

    /// What a name means in a directory.
    pub fn child(&self, parent: NodeId, name: &[u8]) -> Option<NodeId> {
        match &self.node(parent).kind {
            Kind::Directory(entries) => entries.get(name).copied(),
            _ => None,
        }
    }

    /// What a node is.
    pub fn kind(&self, id: NodeId) -> &Kind {
        &self.node(id).kind
    }

    /// The attributes of a node, to be changed.
    pub fn attributes_mut(&mut self, id: NodeId) -> &mut Attributes {
        &mut self.node_mut(id).attributes
    }

    pub(super) fn node(&self, id: NodeId) -> &Node {
        // An id comes from `add` of this tree, and nodes are never removed.
        &self.nodes[id.0 as usize]
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node {
        &mut self.nodes[id.0 as usize]
    }

    /// How many nodes were ever added.
    pub(super) fn capacity(&self) -> usize {
        self.nodes.len()
    }
}

impl NodeId {
    pub(super) fn index(self) -> usize {
        self.0 as usize
    }
}

/// The extended attributes of a node, by the number of their name's prefix and the rest of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Xattrs(BTreeMap<Name, Box<[u8]>>);

/// The number of a name's prefix, and the rest of the name.
type Name = (u8, Box<[u8]>);

/// Why an extended attribute cannot be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum XattrError {
    /// The format only knows `user.`, `trusted.`, `security.` and POSIX ACLs.
    #[error("its name is of none of the kinds user., trusted., security. or system.posix_acl_")]
    UnknownNamespace,
    /// Linux allows names of 255 bytes and values of 65535 bytes, and all of a node must fit 256 KiB.
    #[error("it is longer than can be stored")]
    TooLong,
}

/// Name prefixes and their numbers (`EROFS_XATTR_INDEX_*`); the second and third are whole names.
const PREFIXES: [(u8, &[u8]); 5] = [
    (1, b"user."),
    (2, b"system.posix_acl_access"),
    (3, b"system.posix_acl_default"),
    (4, b"trusted."),
    (6, b"security."),
];

/// Length of the header before the attributes of an inode, in bytes.
const HEADER: u64 = 12;
/// The most that `i_xattr_icount` can count, in bytes.
const MAX_BYTES: u64 = HEADER + 4 * (u16::MAX as u64 - 1);

impl Xattrs {
    /// Adds an attribute by its full name, replacing one of the same name.
    ///
    /// # Errors
    /// [`XattrError`]; nothing is added then.
    pub fn insert(&mut self, name: &[u8], value: &[u8]) -> Result<(), XattrError> {
        let (index, rest) = split_name(name).ok_or(XattrError::UnknownNamespace)?;
        if name.len() > 255 || value.len() > usize::from(u16::MAX) {
            return Err(XattrError::TooLong);
        }
        // Counts the old value too when it is replaced: only near the limit does that matter.
        if self.encoded_bytes().max(HEADER) + entry_bytes(rest, value) > MAX_BYTES {
            return Err(XattrError::TooLong);
        }
        self.0.insert((index, rest.into()), value.into());
        Ok(())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Takes an attribute away by its full name, and gives its value.
    pub fn remove(&mut self, name: &[u8]) -> Option<Box<[u8]>> {
        let (index, rest) = split_name(name)?;
        self.0.remove(&(index, rest.into()))
    }

    /// What [`Xattrs::encode`] has encoded; `None` when it is malformed.
    pub(super) fn decode(bytes: &[u8]) -> Option<Xattrs> {
        let mut xattrs = Xattrs::default();
        let mut position = HEADER as usize;
        while position < bytes.len() {
            let [name_length, index, low, high] = *bytes.get(position..)?.first_chunk()?;
            let name = position + 4;
            let value = name + usize::from(name_length);
            let end = value + usize::from(u16::from_le_bytes([low, high]));
            xattrs.0.insert(
                (index, bytes.get(name..value)?.into()),
                bytes.get(value..end)?.into(),
            );
            position = end.next_multiple_of(4);
        }
        Some(xattrs)
    }

    /// Length of what [`Xattrs::encode`] gives, in bytes: 0 without attributes.
    pub(super) fn encoded_bytes(&self) -> u64 {
        if self.0.is_empty() {
            return 0;
        }
        HEADER
            + self
                .0
                .iter()
                .map(|((_, name), value)| entry_bytes(name, value))
                .sum::<u64>()
    }

    /// `erofs_xattr_ibody_header` and the entries, each aligned to 4 bytes.
    pub(super) fn encode(&self) -> Vec<u8> {
        if self.0.is_empty() {
            return Vec::new();
        }
        let mut out = vec![0; HEADER as usize];
        for ((index, name), value) in &self.0 {
            // `insert` has checked that both lengths fit.
            out.extend([name.len() as u8, *index]);
            out.extend((value.len() as u16).to_le_bytes());
            out.extend_from_slice(name);
            out.extend_from_slice(value);
            out.resize(out.len().next_multiple_of(4), 0);
        }
        out
    }
}

/// The number of a name's prefix, and the rest of the name; `None` when the format has no number for it.
fn split_name(name: &[u8]) -> Option<(u8, &[u8])> {
    let (index, rest, is_prefix) = PREFIXES.iter().find_map(|(index, prefix)| {
        Some((*index, name.strip_prefix(*prefix)?, prefix.ends_with(b".")))
    })?;
    (rest.is_empty() != is_prefix && !rest.contains(&0)).then_some((index, rest))
}

fn entry_bytes(name: &[u8], value: &[u8]) -> u64 {
    (4 + name.len() as u64 + value.len() as u64).next_multiple_of(4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xattr_names_are_split_at_their_prefix() {
        let mut xattrs = Xattrs::default();
        xattrs.insert(b"user.a", b"1").unwrap();
        xattrs.insert(b"system.posix_acl_access", b"acl").unwrap();
        xattrs.insert(b"security.capability", &[0, 1, 2]).unwrap();
        xattrs.insert(b"user.a", b"22").unwrap();
        assert_eq!(xattrs.0.len(), 3);
        assert_eq!(xattrs.encode().len() as u64, xattrs.encoded_bytes());
    }

    #[test]
    fn what_cannot_be_stored_is_refused() {
        let mut xattrs = Xattrs::default();
        for name in [
            &b"user."[..],
            b"",
            b"com.apple.x",
            b"system.nfs4_acl",
            b"system.posix_acl_accessx",
            b"user.a\0b",
        ] {
            assert_eq!(
                xattrs.insert(name, b""),
                Err(XattrError::UnknownNamespace),
                "{name:?}"
            );
        }
        assert_eq!(
            xattrs.insert(b"user.a", &[0; 65536]),
            Err(XattrError::TooLong)
        );
        assert_eq!(
            xattrs.insert(&[b"user.".as_slice(), &[b'a'; 251]].concat(), b""),
            Err(XattrError::TooLong)
        );
        assert_eq!(xattrs.encoded_bytes(), 0);
        for i in 0..3 {
            xattrs
                .insert(format!("user.{i}").as_bytes(), &[0; 65535])
                .unwrap();
        }
        assert_eq!(
            xattrs.insert(b"user.z", &[0; 65535]),
            Err(XattrError::TooLong)
        );
        assert!(xattrs.encoded_bytes() <= MAX_BYTES);
    }
}
