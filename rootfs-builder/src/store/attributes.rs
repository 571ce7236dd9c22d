//! The layer that gives directories back the attributes that a layer above them hides.
//!
//! Some builders leave out the parents of what they add: a layer with only `tmp/new` says nothing of `tmp`. Unpacked on
//! top of the layers below, as a container runtime does, `tmp` keeps its mode. As an image of its own the layer must have
//! a `tmp`, and overlayfs shows the attributes of the topmost one. As layers are shared between images, that cannot be
//! mended in the layer. So an image with such a directory gets one more small layer on top: nothing but these directories
//! and their parents, with the attributes that they would have had.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use super::Store;
use super::images::RecordedLayer;
use super::publish::{seal_layer, staged_layer};
use super::work::WorkDir;
use crate::digest::HashingReader;
use crate::erofs::{
    Attributes, ContentWriter, Directory, DirectoryEntry, Image, Kind, NodeId, Tree, Uuid,
};
use crate::error::{Error, Result};
use crate::layer::{LayerError, OPAQUE_XATTR, implied_directories, implied_directory};

impl Store {
    /// Makes that layer in the work directory, where the others are, if the image needs it.
    pub(super) fn stage_attributes(
        &self,
        work: &WorkDir,
        layers: &[RecordedLayer],
    ) -> Result<Option<RecordedLayer>> {
        if layers.len() < 2 {
            return Ok(None);
        }
        let files = layers
            .iter()
            .map(|layer| open(staged_layer(work, &layer.diff_id)))
            .collect::<Result<Vec<_>>>()?;
        let mut implied = Implied::default();
        let mut count = 0;
        for (layer, (path, file)) in files.iter().enumerate() {
            for directory in implied_directories(file).map_err(|error| damaged(path, error))? {
                implied.insert(&directory, layer);
                count += 1;
            }
            if count > self.limits.entries {
                let limit = self.limits.entries as u64;
                return Err(Error::Limit {
                    what: "number of directories without an entry".to_owned(),
                    limit,
                });
            }
        }
        match Mender::new(&files)?.mend(&implied)? {
            Some(tree) => write(work, &tree).map(Some),
            None => Ok(None),
        }
    }
}

fn open(path: PathBuf) -> Result<(PathBuf, File)> {
    let file = File::open(&path).map_err(Error::on("open", &path))?;
    Ok((path, file))
}

fn damaged(path: &std::path::Path, error: io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof => Error::Corrupt {
            path: path.to_owned(),
            reason: error.to_string(),
        },
        _ => Error::io("read", path, error),
    }
}

fn write(work: &WorkDir, tree: &Tree) -> Result<RecordedLayer> {
    let path = work.path().join("attributes.erofs");
    let on = |action| Error::on(action, &path);
    let options = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .clone();
    let file = options.open(&path).map_err(on("create"))?;
    let spool = tempfile::tempfile_in(work.path()).map_err(on("create"))?;
    ContentWriter::new(&file, spool)
        .finish(tree, Uuid::FromContent)
        .map_err(|error| match LayerError::from(error) {
            LayerError::Write(source) | LayerError::Read(source) => {
                Error::io("write", &path, source)
            }
            other => Error::Corrupt {
                path: path.clone(),
                reason: other.to_string(),
            },
        })?;
    let mut reader = HashingReader::new(File::open(&path).map_err(on("open"))?);
    io::copy(&mut reader, &mut io::sink()).map_err(on("read"))?;
    let (diff_id, _) = reader.finish();
    let size = seal_layer(&path, &file)?;
    let staged = staged_layer(work, &diff_id);
    fs::rename(&path, &staged).map_err(Error::on("rename", &staged))?;
    Ok(RecordedLayer {
        diff_id,
        size,
        blob: None,
    })
}

/// The directories without an entry, as a tree; in each the layers in which it has none, ascending.
#[derive(Debug, Default)]
struct Implied {
    layers: Vec<usize>,
    children: BTreeMap<Box<[u8]>, Implied>,
}

impl Implied {
    fn insert(&mut self, path: &[u8], layer: usize) {
        let mut node = self;
        for name in path
            .split(|&byte| byte == b'/')
            .filter(|name| !name.is_empty())
        {
            node = node.children.entry(name.into()).or_default();
        }
        node.layers.push(layer);
    }

    fn is_in(&self, layer: usize) -> bool {
        self.layers.binary_search(&layer).is_ok()
    }
}

/// A directory in one of the layers.
struct Present {
    layer: usize,
    directory: Directory,
}

/// A directory on the way from the root to where a [`Mender`] is.
struct Visited {
    name: Box<[u8]>,
    attributes: Attributes,
    /// Its node in the new layer, once it has one.
    node: Option<NodeId>,
}

/// Walks the layers as overlayfs would and finds the directories to be mended.
struct Mender<'a> {
    layers: Vec<(&'a PathBuf, Image<'a>)>,
    way: Vec<Visited>,
    tree: Tree,
    mended: bool,
}

impl<'a> Mender<'a> {
    fn new(files: &'a [(PathBuf, File)]) -> Result<Self> {
        let layers = files
            .iter()
            .map(|(path, file)| {
                Ok((
                    path,
                    Image::open(file).map_err(|error| damaged(path, error))?,
                ))
            })
            .collect::<Result<_>>()?;
        Ok(Mender {
            layers,
            way: Vec::new(),
            tree: Tree::new(implied_directory()),
            mended: false,
        })
    }

    /// The tree of the new layer, `None` when nothing is hidden.
    fn mend(mut self, implied: &Implied) -> Result<Option<Tree>> {
        let mut roots = Vec::new();
        for (layer, (path, image)) in self.layers.iter().enumerate().rev() {
            let directory = image.root().map_err(|error| damaged(path, error))?;
            roots.push(Present { layer, directory });
        }
        let (attributes, hidden) = effective(implied, &roots);
        *self.tree.attributes_mut(Tree::ROOT) = attributes.clone();
        self.mended |= hidden;
        self.way.push(Visited {
            name: Box::default(),
            attributes,
            node: Some(Tree::ROOT),
        });
        self.visit(implied, &roots)?;
        Ok(self.mended.then_some(self.tree))
    }

    /// Looks at the directories without an entry that are in a directory; `present` is topmost first.
    fn visit(&mut self, implied: &Implied, present: &[Present]) -> Result<()> {
        for (name, below) in self.look_up(implied, present)? {
            // With only one layer there is nothing to be hidden.
            let Some(child) = implied.children.get(&name).filter(|_| below.len() > 1) else {
                continue;
            };
            let (attributes, hidden) = effective(child, &below);
            self.way.push(Visited {
                name,
                attributes,
                node: None,
            });
            if hidden {
                self.add()?;
            }
            self.visit(child, &below)?;
            self.way.pop();
        }
        Ok(())
    }

    /// For each directory without an entry: where it is a directory, down to the layer that hides all below.
    fn look_up(
        &self,
        implied: &Implied,
        present: &[Present],
    ) -> Result<BTreeMap<Box<[u8]>, Vec<Present>>> {
        let mut found: BTreeMap<Box<[u8]>, Vec<Present>> = BTreeMap::new();
        if implied.children.is_empty() {
            return Ok(found);
        }
        let mut closed: BTreeMap<Box<[u8]>, ()> = BTreeMap::new();
        for Present { layer, directory } in present {
            let (path, image) = &self.layers[*layer];
            let mut entries = Vec::new();
            image
                .entries(directory, &mut |name, entry| {
                    if implied.children.contains_key(name) && !closed.contains_key(name) {
                        entries.push((Box::<[u8]>::from(name), entry));
                    }
                })
                .map_err(|error| damaged(path, error))?;
            for (name, entry) in entries {
                let DirectoryEntry::Directory(number) = entry else {
                    closed.insert(name, ());
                    continue;
                };
                let mut directory = image
                    .directory(number)
                    .map_err(|error| damaged(path, error))?;
                if directory.attributes.xattrs.remove(OPAQUE_XATTR).is_some() {
                    closed.insert(name.clone(), ());
                }
                found.entry(name).or_default().push(Present {
                    layer: *layer,
                    directory,
                });
            }
        }
        Ok(found)
    }

    /// Adds the directory at the end of the way to the new layer, and those before it that it does not have yet.
    fn add(&mut self) -> Result<()> {
        self.mended = true;
        let mut parent = Tree::ROOT;
        for visited in &mut self.way {
            parent = match visited.node {
                Some(node) => node,
                None => {
                    let kind = Kind::Directory(BTreeMap::new());
                    let node =
                        self.tree
                            .add(visited.attributes.clone(), kind)
                            .ok_or_else(|| Error::Limit {
                                what: "number of directories".to_owned(),
                                limit: u64::from(u32::MAX),
                            })?;
                    self.tree.link(parent, &visited.name, node);
                    *visited.node.insert(node)
                }
            };
        }
        Ok(())
    }
}

/// The attributes that a directory has once its layers are unpacked on top of each other, and whether overlayfs
/// would show others.
fn effective(implied: &Implied, present: &[Present]) -> (Attributes, bool) {
    let own = present.iter().find(|present| !implied.is_in(present.layer));
    let Some(own) = own else {
        return (implied_directory(), false);
    };
    let attributes = own.directory.attributes.clone();
    let topmost_is_implied = present
        .first()
        .is_some_and(|topmost| implied.is_in(topmost.layer));
    // A time alone is not worth a layer.
    let default = implied_directory();
    let differs = (attributes.mode, attributes.uid, attributes.gid)
        != (default.mode, default.uid, default.gid)
        || !attributes.xattrs.is_empty();
    (attributes, topmost_is_implied && differs)
}
