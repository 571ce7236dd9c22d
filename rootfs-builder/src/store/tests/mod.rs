//! The store as its users see it.

mod keeping;
mod loading;
mod refused;
mod saving;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::error::Error;
use crate::layer::{EntryError, LayerError};
use crate::testing::{
    Item, Layout, NodeKind, TarBuilder, config, docker_archive, fsck, gzip, read_image,
    tar_of_directory,
};

/// A store and a place for sources.
struct Bench {
    dir: TempDir,
    store: Store,
}

impl Bench {
    fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("store")).unwrap();
        Bench { dir, store }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn layout(&self, name: &str) -> Layout {
        Layout::new(&self.path(name))
    }

    fn load(&self, source: &Path) -> Result<Vec<LoadedImage>> {
        self.store.load(Source::Path(source), None)
    }

    /// An image of one file, loaded under `name`.
    fn load_simple(&self, name: &str, content: &str) -> Digest {
        let mut layout = self.layout(&format!("layout-{content}"));
        let image = layout.image(&[file_layer(content)]);
        layout.index(image, Some(&self::name(name).to_string()));
        self.load(&layout.path).unwrap()[0].id
    }

    /// Every file of the store but the lock and the version.
    fn files(&self) -> Vec<String> {
        let mut files = Vec::new();
        let mut pending = vec![self.store.root().to_owned()];
        while let Some(dir) = pending.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    pending.push(path.clone());
                }
                files.push(
                    path.strip_prefix(self.store.root())
                        .unwrap()
                        .to_str()
                        .unwrap()
                        .to_owned(),
                );
            }
        }
        files.retain(|file| {
            ![
                "lock", "version", "layers", "blobs", "images", "leases", "tmp",
            ]
            .contains(&file.as_str())
        });
        files.sort();
        files
    }

    /// Loads something that must be refused, and checks that nothing of it stays.
    fn refused(&self, source: &Path) -> Error {
        let before = self.files();
        let error = self.load(source).unwrap_err();
        assert_eq!(self.files(), before, "left behind after: {error}");
        error
    }
}

fn file_layer(content: &str) -> Vec<u8> {
    TarBuilder::of([Item::file("file", content)])
}

fn name(text: &str) -> Reference {
    text.parse().unwrap()
}
