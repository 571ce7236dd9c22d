//! Applies the entries of a layer to a tree, by the rules in the parent module's documentation.

use std::collections::{BTreeSet, VecDeque};
use std::io::{self, Read};

use super::{EntryError, LayerError, implied};
use crate::erofs::{Attributes, ContentWriter, Kind, NodeId, Tree, Uuid, XattrError, Xattrs};
use crate::limits::Limits;
use crate::tar::{self, Entry, EntryKind, Input, Segment, Timestamp};

const WHITEOUT_PREFIX: &[u8] = b".wh.";
/// Names that AUFS keeps for itself.
const AUFS_PREFIX: &[u8] = b".wh..wh.";
const OPAQUE_MARKER: &[u8] = b".wh..wh..opq";
/// The attribute by which overlayfs knows that a directory hides all below it.
pub(crate) const OPAQUE_XATTR: &[u8] = b"trusted.overlay.opaque";
/// Attributes by which overlayfs keeps its own state.
const OVERLAY_XATTRS: &[u8] = b"trusted.overlay.";
/// Links followed for one path, as in Linux (`MAXSYMLINKS`).
const MAX_LINKS: usize = 40;
/// Components looked up for one path, those of links included.
const MAX_STEPS: usize = 1024;
/// Longest name in bytes, in Linux and in EROFS.
const MAX_NAME: usize = 255;
/// Longest target of a symbolic link in bytes (`PATH_MAX` less the NUL).
const MAX_TARGET: usize = 4095;

/// A layer on its way to an image.
pub(super) struct Applier<'a> {
    writer: ContentWriter<'a>,
    tree: Tree,
    limits: &'a Limits,
    entries: usize,
    metadata_bytes: usize,
    /// Whiteouts: an entry that comes to the same name takes their place.
    whiteouts: BTreeSet<NodeId>,
    opaque: BTreeSet<NodeId>,
    /// Directories that the archive has no entry for.
    implied: BTreeSet<NodeId>,
    dropped_xattrs: bool,
}

/// Where an entry goes.
struct Place<'e> {
    parent: NodeId,
    name: &'e [u8],
}

impl<'a> Applier<'a> {
    pub(super) fn new(writer: ContentWriter<'a>, limits: &'a Limits) -> Self {
        Applier {
            writer,
            tree: Tree::new(implied_directory()),
            limits,
            entries: 0,
            metadata_bytes: 0,
            whiteouts: BTreeSet::new(),
            opaque: BTreeSet::new(),
            implied: BTreeSet::from([Tree::ROOT]),
            dropped_xattrs: false,
        }
    }

    /// Applies one entry, whose data `reader` is about to give.
    pub(super) fn apply<R: Input>(
        &mut self,
        entry: Entry,
        reader: &mut tar::Reader<R>,
    ) -> Result<(), LayerError> {
        let failed = |reason| LayerError::Entry {
            path: show(&entry.path),
            reason,
        };
        check_limit(
            "length of a path in bytes",
            entry.path.len(),
            self.limits.path_bytes,
        )?;
        check_limit(
            "length of a path in bytes",
            entry.link.len(),
            self.limits.path_bytes,
        )?;
        let components = components(&entry.path).map_err(failed)?;
        check_limit("depth of a path", components.len(), self.limits.depth)?;
        let Some((name, parents)) = components.split_last() else {
            return self.apply_root(&entry);
        };
        if components
            .iter()
            .any(|component| component.starts_with(AUFS_PREFIX) && *component != OPAQUE_MARKER)
        {
            return Ok(());
        }
        if parents
            .iter()
            .any(|parent| parent.starts_with(WHITEOUT_PREFIX))
        {
            return Err(failed(EntryError::Whiteout));
        }
        let parent = self.parent(&entry, parents)?;
        if *name == OPAQUE_MARKER {
            return self.make_opaque(parent).map_err(failed);
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT_PREFIX) {
            if matches!(hidden, b"" | b"." | b"..") {
                return Err(failed(EntryError::Whiteout));
            }
            return self.apply_whiteout(Place {
                parent,
                name: hidden,
            });
        }
        self.apply_at(&entry, Place { parent, name }, reader)
    }

    /// Writes everything that is not there yet.
    pub(super) fn finish(mut self, uuid: Uuid) -> Result<(), LayerError> {
        for &directory in &self.opaque {
            let xattrs = &mut self.tree.attributes_mut(directory).xattrs;
            xattrs
                .insert(OPAQUE_XATTR, b"y")
                .map_err(|_| LayerError::Entry {
                    path: String::new(),
                    reason: EntryError::Xattr {
                        name: show(OPAQUE_XATTR),
                    },
                })?;
        }
        let image = self.writer.image();
        let length = self.writer.finish(&self.tree, uuid)?;
        let implied = implied::paths(&self.tree, &self.implied);
        implied::write(image, length, &implied).map_err(LayerError::Write)
    }

    fn apply_root(&mut self, entry: &Entry) -> Result<(), LayerError> {
        if entry.kind != EntryKind::Directory {
            return Err(LayerError::Entry {
                path: show(&entry.path),
                reason: EntryError::NotRoot,
            });
        }
        *self.tree.attributes_mut(Tree::ROOT) = self.attributes(entry)?;
        self.implied.remove(&Tree::ROOT);
        Ok(())
    }

    fn apply_at<R: Input>(
        &mut self,
        entry: &Entry,
        place: Place<'_>,
        reader: &mut tar::Reader<R>,
    ) -> Result<(), LayerError> {
        let failed = |reason| LayerError::Entry {
            path: show(&entry.path),
            reason,
        };
        if entry.kind == EntryKind::HardLink {
            let target = self.hard_link_target(entry)?;
            return self.link(place, target);
        }
        let attributes = self.attributes(entry)?;
        let existing = self.tree.child(place.parent, place.name);
        let kind = match entry.kind {
            EntryKind::Directory => {
                if let Some(directory) = existing.filter(|&id| self.is_directory(id)) {
                    *self.tree.attributes_mut(directory) = attributes;
                    self.implied.remove(&directory);
                    return Ok(());
                }
                Kind::Directory(Default::default())
            }
            EntryKind::File => {
                check_limit_u64(
                    "length of a file in bytes",
                    entry.size,
                    self.limits.file_bytes,
                )?;
                let whole = [Segment {
                    offset: 0,
                    length: entry.size,
                }];
                let segments = entry.sparse.as_deref().unwrap_or(&whole);
                let content =
                    self.writer
                        .sparse_file(entry.size, segments, &mut EntryData(reader))?;
                self.account(content.table_bytes())?;
                Kind::File(content)
            }
            EntryKind::Symlink => {
                if entry.link.is_empty() || entry.link.len() > MAX_TARGET {
                    return Err(failed(EntryError::SymlinkTarget {
                        length: entry.link.len(),
                    }));
                }
                self.account(entry.link.len())?;
                Kind::Symlink(entry.link.as_slice().into())
            }
            EntryKind::CharDevice | EntryKind::BlockDevice => {
                let (major, minor) = entry.device;
                if major >= 1 << 12 || minor >= 1 << 20 {
                    return Err(failed(EntryError::DeviceNumber { major, minor }));
                }
                match entry.kind {
                    EntryKind::CharDevice => Kind::CharDevice(major, minor),
                    _ => Kind::BlockDevice(major, minor),
                }
            }
            // Hard links are done above.
            EntryKind::Fifo | EntryKind::HardLink => Kind::Fifo,
        };
        let is_directory = entry.kind == EntryKind::Directory;
        let id = self.add(attributes, kind)?;
        if is_directory && existing.is_some_and(|id| self.whiteouts.contains(&id)) {
            self.opaque.insert(id);
        }
        self.link(place, id)
    }

    /// Gives a node a name; what had it before is gone.
    fn link(&mut self, place: Place<'_>, id: NodeId) -> Result<(), LayerError> {
        self.count_entry()?;
        self.account(place.name.len())?;
        self.tree.link(place.parent, place.name, id);
        Ok(())
    }

    fn apply_whiteout(&mut self, place: Place<'_>) -> Result<(), LayerError> {
        match self.tree.child(place.parent, place.name) {
            Some(existing) if self.whiteouts.contains(&existing) => Ok(()),
            Some(existing) if self.is_directory(existing) => {
                self.opaque.insert(existing);
                Ok(())
            }
            Some(_) => Ok(()),
            None => {
                let id = self.add(Attributes::default(), Kind::CharDevice(0, 0))?;
                self.whiteouts.insert(id);
                self.link(place, id)
            }
        }
    }

    fn make_opaque(&mut self, directory: NodeId) -> Result<(), EntryError> {
        if directory == Tree::ROOT {
            return Err(EntryError::OpaqueRoot);
        }
        self.opaque.insert(directory);
        Ok(())
    }

    /// The directory that the parents of an entry's path lead to; those that are missing are made.
    fn parent(&mut self, entry: &Entry, parents: &[&[u8]]) -> Result<NodeId, LayerError> {
        let mut walk = Walk::new(parents);
        loop {
            match walk.step(&self.tree).map_err(|reason| LayerError::Entry {
                path: show(&entry.path),
                reason,
            })? {
                Step::Done(directory) => return Ok(directory),
                Step::Missing { parent, name } => {
                    check_limit("depth of a path", walk.depth(), self.limits.depth)?;
                    let directory = self.make_parent(parent, &name)?;
                    walk.enter(directory);
                }
                Step::Other { parent, name, id } if self.whiteouts.contains(&id) => {
                    let directory = self.make_parent(parent, &name)?;
                    self.opaque.insert(directory);
                    walk.enter(directory);
                }
                Step::Other { name, .. } => {
                    let reason = EntryError::ParentNotDirectory {
                        parent: show(&name),
                    };
                    return Err(LayerError::Entry {
                        path: show(&entry.path),
                        reason,
                    });
                }
            }
        }
    }

    fn make_parent(&mut self, parent: NodeId, name: &[u8]) -> Result<NodeId, LayerError> {
        let directory = self.add(implied_directory(), Kind::Directory(Default::default()))?;
        self.implied.insert(directory);
        self.link(Place { parent, name }, directory)?;
        Ok(directory)
    }

    /// The node that a hard link names. Only its parents are followed if they are links.
    fn hard_link_target(&self, entry: &Entry) -> Result<NodeId, LayerError> {
        let failed = |reason| LayerError::Entry {
            path: show(&entry.path),
            reason,
        };
        let target = || show(&entry.link);
        let missing = || failed(EntryError::HardLinkMissing { target: target() });
        let components = components(&entry.link).map_err(failed)?;
        let (name, parents) = components.split_last().ok_or_else(missing)?;
        let mut walk = Walk::new(parents);
        let Step::Done(directory) = walk.step(&self.tree).map_err(failed)? else {
            return Err(missing());
        };
        let id = self
            .tree
            .child(directory, name)
            .filter(|id| !self.whiteouts.contains(id))
            .ok_or_else(missing)?;
        if self.is_directory(id) {
            return Err(failed(EntryError::HardLinkToDirectory { target: target() }));
        }
        Ok(id)
    }

    fn is_directory(&self, id: NodeId) -> bool {
        matches!(self.tree.kind(id), Kind::Directory(_))
    }

    fn add(&mut self, attributes: Attributes, kind: Kind) -> Result<NodeId, LayerError> {
        self.tree
            .add(attributes, kind)
            .ok_or_else(|| self.too_many_entries())
    }

    fn count_entry(&mut self) -> Result<(), LayerError> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            Err(self.too_many_entries())
        } else {
            Ok(())
        }
    }

    fn too_many_entries(&self) -> LayerError {
        LayerError::Limit {
            what: "number of entries",
            limit: self.limits.entries as u64,
        }
    }

    fn account(&mut self, bytes: usize) -> Result<(), LayerError> {
        self.metadata_bytes += bytes;
        check_limit(
            "length of all names and attributes in bytes",
            self.metadata_bytes,
            self.limits.metadata_bytes,
        )
    }

    fn attributes(&mut self, entry: &Entry) -> Result<Attributes, LayerError> {
        let bytes = entry
            .xattrs
            .iter()
            .map(|(name, value)| name.len() + value.len())
            .sum();
        check_limit(
            "length of the extended attributes of an entry in bytes",
            bytes,
            self.limits.xattr_bytes,
        )?;
        self.account(bytes)?;
        let mut xattrs = Xattrs::default();
        for (name, value) in &entry.xattrs {
            if name.starts_with(OVERLAY_XATTRS) {
                continue;
            }
            match xattrs.insert(name, value) {
                Ok(()) => {}
                Err(XattrError::UnknownNamespace) => self.warn_of_dropped_xattr(entry, name),
                Err(XattrError::TooLong) => {
                    let reason = EntryError::Xattr { name: show(name) };
                    return Err(LayerError::Entry {
                        path: show(&entry.path),
                        reason,
                    });
                }
            }
        }
        Ok(Attributes {
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            mtime: entry.mtime,
            xattrs,
        })
    }

    fn warn_of_dropped_xattr(&mut self, entry: &Entry, name: &[u8]) {
        if !std::mem::replace(&mut self.dropped_xattrs, true) {
            log::warn!(
                "{}: extended attribute {} is of a kind that Linux does not know and is left out (further ones too)",
                show(&entry.path),
                show(name)
            );
        }
    }
}

/// A walk along a path within the tree, through symbolic links.
struct Walk {
    /// The directories from the root to where the walk is.
    stack: Vec<NodeId>,
    rest: VecDeque<Box<[u8]>>,
    links: usize,
    steps: usize,
}

/// Where a walk stops.
enum Step {
    /// At the end of the path, in this directory.
    Done(NodeId),
    /// The directory has no such name.
    Missing { parent: NodeId, name: Box<[u8]> },
    /// The name is neither a directory nor a link.
    Other {
        parent: NodeId,
        name: Box<[u8]>,
        id: NodeId,
    },
}

impl Walk {
    fn new(path: &[&[u8]]) -> Self {
        Walk {
            stack: vec![Tree::ROOT],
            rest: path.iter().map(|&component| component.into()).collect(),
            links: 0,
            steps: 0,
        }
    }

    fn here(&self) -> NodeId {
        self.stack.last().copied().unwrap_or(Tree::ROOT)
    }

    fn depth(&self) -> usize {
        self.stack.len()
    }

    fn enter(&mut self, directory: NodeId) {
        self.stack.push(directory);
    }

    /// Goes on until the path ends or something is in the way.
    fn step(&mut self, tree: &Tree) -> Result<Step, EntryError> {
        while let Some(name) = self.rest.pop_front() {
            self.steps += 1;
            if self.steps > MAX_STEPS {
                return Err(EntryError::LinkLoop);
            }
            match &*name {
                b"" | b"." => continue,
                b".." => {
                    // The root is its own parent.
                    if self.stack.len() > 1 {
                        self.stack.pop();
                    }
                    continue;
                }
                _ => {}
            }
            if name.len() > MAX_NAME {
                return Err(EntryError::NameTooLong);
            }
            let parent = self.here();
            let Some(id) = tree.child(parent, &name) else {
                return Ok(Step::Missing { parent, name });
            };
            match tree.kind(id) {
                Kind::Directory(_) => self.enter(id),
                Kind::Symlink(target) => self.follow(target)?,
                _ => return Ok(Step::Other { parent, name, id }),
            }
        }
        Ok(Step::Done(self.here()))
    }

    fn follow(&mut self, target: &[u8]) -> Result<(), EntryError> {
        self.links += 1;
        if self.links > MAX_LINKS {
            return Err(EntryError::LinkLoop);
        }
        if target.starts_with(b"/") {
            self.stack.truncate(1);
        }
        for component in target.split(|&byte| byte == b'/').rev() {
            self.rest.push_front(component.into());
        }
        Ok(())
    }
}

/// The data of the current entry.
struct EntryData<'r, R>(&'r mut tar::Reader<R>);

impl<R: Input> Read for EntryData<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

/// Splits a path; empty components and `.` are left out.
fn components(path: &[u8]) -> Result<Vec<&[u8]>, EntryError> {
    let mut components = Vec::new();
    for component in path.split(|&byte| byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => return Err(EntryError::DotDot),
            // A whiteout's own name is longer than the name it hides; the image never has it.
            name if name.strip_prefix(WHITEOUT_PREFIX).unwrap_or(name).len() > MAX_NAME => {
                return Err(EntryError::NameTooLong);
            }
            name => components.push(name),
        }
    }
    Ok(components)
}

/// The attributes of a directory that the archive has no entry for.
pub(crate) fn implied_directory() -> Attributes {
    Attributes {
        mode: 0o755,
        mtime: Timestamp::default(),
        ..Attributes::default()
    }
}

fn check_limit(what: &'static str, value: usize, limit: usize) -> Result<(), LayerError> {
    check_limit_u64(what, value as u64, limit as u64)
}

fn check_limit_u64(what: &'static str, value: u64, limit: u64) -> Result<(), LayerError> {
    if value > limit {
        Err(LayerError::Limit { what, limit })
    } else {
        Ok(())
    }
}

/// Bytes from an archive for a message, cut to a readable length.
fn show(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().take(300).collect()
}
