//! The table of names.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Store;
use super::disk::read_text;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::reference::Reference;

/// All names of the store. One file, replaced as a whole under the lock, so that a reader sees one state.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct References {
    references: BTreeMap<Reference, Digest>,
    /// Those by digest alone, under which images were pulled: the digest can be that of an index.
    #[serde(default)]
    digests: BTreeMap<Reference, Digest>,
}

impl References {
    /// The image that a name means.
    pub(super) fn get(&self, reference: &Reference) -> Option<Digest> {
        match reference.digest() {
            Some(digest) => self.digests.get(&reference.by_digest(*digest)),
            None => self.references.get(reference),
        }
        .copied()
    }

    /// Gives `reference` to `image`, taking it away from any other.
    pub(super) fn insert(&mut self, reference: Reference, image: Digest) {
        match reference.digest() {
            Some(digest) => self.digests.insert(reference.by_digest(*digest), image),
            None => self.references.insert(reference, image),
        };
    }

    pub(super) fn remove(&mut self, reference: &Reference) {
        self.references.remove(reference);
    }

    /// Forgets every name of an image.
    pub(super) fn forget(&mut self, image: &Digest) {
        self.references.retain(|_, id| id != image);
        self.digests.retain(|_, id| id != image);
    }

    /// The names by digest of `image`, sorted.
    pub(super) fn digests_of(&self, image: &Digest) -> Vec<Reference> {
        let of_image = self.digests.iter().filter(|(_, id)| *id == image);
        of_image.map(|(reference, _)| reference.clone()).collect()
    }

    /// The names by tag of `image`, sorted.
    pub(super) fn of(&self, image: &Digest) -> Vec<Reference> {
        self.references
            .iter()
            .filter(|(_, id)| *id == image)
            .map(|(reference, _)| reference.clone())
            .collect()
    }

    /// The images that have a name in the repository of `reference`.
    pub(super) fn in_repository<'a>(
        &'a self,
        reference: &'a Reference,
    ) -> impl Iterator<Item = Digest> + 'a {
        self.references
            .iter()
            .filter(|(other, _)| other.same_repository(reference))
            .map(|(_, id)| *id)
    }
}

impl Store {
    fn references_path(&self) -> PathBuf {
        self.root.join("references.json")
    }

    pub(super) fn read_references(&self) -> Result<References> {
        let path = self.references_path();
        match read_text(&path)? {
            None => Ok(References::default()),
            Some(text) => serde_json::from_str(&text).map_err(|error| Error::Corrupt {
                path,
                reason: error.to_string(),
            }),
        }
    }

    /// Replaces the table. The caller holds the lock, and has read the table under it.
    pub(super) fn write_references(&self, references: &References) -> Result<()> {
        let path = self.references_path();
        let json = serde_json::to_vec_pretty(references).map_err(|error| Error::Corrupt {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        self.replace(&path, &json)
    }
}
