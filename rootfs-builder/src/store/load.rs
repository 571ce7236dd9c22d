//! Loading: verify, convert each layer that the store does not have, publish.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;

use oci_spec::image::{Arch, ImageConfiguration, Os};

use super::blobs::{Keeper, KeptBlobs, RecordedBlob, adopt};
use super::images::{Record, RecordedLayer};
use super::publish::{Prepared, seal_layer, staged_layer};
use super::select::{Blob, Candidate, PLATFORM, candidates, read_member};
use super::source::{Members, Source};
use super::work::WorkDir;
use super::{LoadedImage, Store};
use crate::digest::{Digest, HashingReader};
use crate::error::{Error, Result};
use crate::layer::decompress::Decoder;
use crate::layer::{self, LayerError};
use crate::reference::Reference;

impl Store {
    /// Loads all images of a source, which may be an OCI image layout directory, an OCI archive or a docker
    /// archive, each archive plain or compressed by gzip or zstd.
    ///
    /// Every digest and size is verified. The images get the names that the source gives them (OCI: the
    /// annotations `io.containerd.image.name` or `org.opencontainers.image.ref.name`, docker: `RepoTags`), or only
    /// `name` if one is given. Of an image for several platforms, the one for `linux/amd64` is loaded. Either all
    /// images of the source are loaded or, on an error, none.
    ///
    /// # Errors
    /// Any of [`Error`] that says what is wrong with the source, [`Error::NoSpace`], [`Error::Busy`].
    pub fn load(&self, source: Source<'_>, name: Option<&Reference>) -> Result<Vec<LoadedImage>> {
        if let Some(reference) = name.filter(|reference| reference.digest().is_some()) {
            return Err(Error::DigestReference {
                reference: Box::new(reference.clone()),
            });
        }
        let work = self.work_dir()?;
        let members = Members::open(source, &work, &self.limits)?;
        let mut candidates = candidates(&members, &self.limits)?;
        if let Some(reference) = name {
            rename(&mut candidates, reference, &members)?;
        }
        let mut kept = KeptBlobs::new();
        let prepared = candidates
            .into_iter()
            .map(|image| self.prepare(&members, &work, image, &mut kept))
            .collect::<Result<Vec<_>>>()?;
        self.publish(&work, &prepared)
    }

    /// Brings everything that the image needs into the work directory.
    pub(super) fn prepare(
        &self,
        members: &Members,
        work: &WorkDir,
        image: Candidate,
        kept: &mut KeptBlobs,
    ) -> Result<Prepared> {
        let config_json = read_member(
            members,
            "configuration",
            &image.config,
            self.limits.config_bytes,
        )?;
        let config: ImageConfiguration = serde_json::from_slice(&config_json).map_err(|error| {
            members.invalid(format!("configuration {}: {error}", image.config.member))
        })?;
        check_platform(&config)?;
        let diff_ids = self.check_layers(members, &config, &image)?;
        let mut budget = self.limits.image_bytes;
        let mut layers = Vec::with_capacity(diff_ids.len());
        for (blob, diff_id) in image.layers.iter().zip(diff_ids) {
            layers.push(self.stage_layer(members, work, blob, &diff_id, &mut budget, kept)?);
        }
        layers.extend(self.stage_attributes(work, &layers)?);
        Ok(Prepared {
            id: Digest::of(&config_json),
            config_json,
            record: Record {
                manifest_digest: image.manifest_digest,
                layers,
            },
            references: image.references,
        })
    }

    /// The diff ids of the image, which must be as many as its layers.
    fn check_layers(
        &self,
        members: &Members,
        config: &ImageConfiguration,
        image: &Candidate,
    ) -> Result<Vec<Digest>> {
        let diff_ids = config.rootfs().diff_ids();
        if diff_ids.len() != image.layers.len() {
            return Err(members.invalid(format!(
                "the manifest has {} layers, the configuration {}",
                image.layers.len(),
                diff_ids.len()
            )));
        }
        if diff_ids.len() > self.limits.layers {
            return Err(Error::Limit {
                what: "number of layers".to_owned(),
                limit: self.limits.layers as u64,
            });
        }
        diff_ids
            .iter()
            .map(|diff_id| Ok(diff_id.parse()?))
            .collect()
    }

    /// Brings one layer and its blob into the work directory.
    fn stage_layer(
        &self,
        members: &Members,
        work: &WorkDir,
        blob: &Blob,
        diff_id: &Digest,
        budget: &mut u64,
        kept: &mut KeptBlobs,
    ) -> Result<RecordedLayer> {
        let path = staged_layer(work, diff_id);
        let recorded = |size, blob: &RecordedBlob| RecordedLayer {
            diff_id: *diff_id,
            size,
            blob: Some(blob.clone()),
        };
        // Images repeat layers, empty ones above all.
        if let (Some(blob), Ok(metadata)) = (kept.get(diff_id), fs::metadata(&path)) {
            return Ok(recorded(metadata.len(), blob));
        }
        // One whose blob was not kept is converted again, so that there is one from now on.
        if let Some(blob) = self.hold_blob(work, diff_id)? {
            match fs::hard_link(self.layer_path(diff_id), &path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(Error::io("link", &path, error)),
            }
            if let Ok(metadata) = fs::metadata(&path) {
                let layer = recorded(metadata.len(), &blob);
                kept.insert(*diff_id, blob);
                return Ok(layer);
            }
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(Error::on("create", &path))?;
        let (length, blob) = self.convert(members, work, blob, diff_id, &file, *budget)?;
        *budget = budget.saturating_sub(length);
        let layer = recorded(seal_layer(&path, &file)?, &blob);
        kept.insert(*diff_id, blob);
        Ok(layer)
    }

    /// Converts a layer and verifies it; the length of the uncompressed tar in bytes, and its blob.
    fn convert(
        &self,
        members: &Members,
        work: &WorkDir,
        blob: &Blob,
        diff_id: &Digest,
        image: &File,
        budget: u64,
    ) -> Result<(u64, RecordedBlob)> {
        let missing = || Error::MissingBlob {
            what: "layer",
            name: blob.member.clone(),
        };
        let (reader, length) = members.member(&blob.member)?.ok_or_else(missing)?;
        if let Some(expected) = blob.size.filter(|&expected| expected != length) {
            return Err(Error::SizeMismatch {
                what: format!("layer {}", blob.member),
                expected,
                actual: length,
            });
        }
        // What was pulled is in the work directory: nothing has to be written twice.
        let adopted = match &blob.digest {
            Some(digest) if members.is_in(work) => {
                adopt(work, &work.path().join(&blob.member), digest, length)?
            }
            _ => None,
        };
        let conversion = Conversion {
            store: self,
            work,
            blob,
            diff_id,
            image,
            bound: self.layer_bound(length, budget),
        };
        if let Some(kept) = adopted {
            let (_, uncompressed) = conversion.run(reader, &mut |_| None)?;
            return Ok((uncompressed, kept));
        }
        let keeper = Keeper::new(reader, work)?;
        let (keeper, uncompressed) = conversion.run(keeper, &mut Keeper::failure)?;
        Ok((uncompressed, keeper.finish(work)?))
    }

    /// How many bytes a layer may have uncompressed, and the name of that limit.
    fn layer_bound(&self, compressed: u64, budget: u64) -> (u64, &'static str) {
        let limits = &self.limits;
        [
            (limits.layer_bytes, "uncompressed size in bytes"),
            (budget, "uncompressed bytes left for this image"),
            (
                compressed
                    .saturating_mul(limits.ratio)
                    .max(limits.ratio_from),
                "uncompressed size in bytes for its compressed size",
            ),
        ]
        .into_iter()
        .min_by_key(|(bound, _)| *bound)
        .unwrap_or((limits.layer_bytes, "uncompressed size in bytes"))
    }
}

/// The conversion of one layer.
struct Conversion<'a> {
    store: &'a Store,
    work: &'a WorkDir,
    blob: &'a Blob,
    diff_id: &'a Digest,
    image: &'a File,
    /// Most bytes uncompressed, and the name of that limit.
    bound: (u64, &'static str),
}

impl Conversion<'_> {
    /// Reads all of the blob; its reader again, and the length of the uncompressed tar in bytes. `failure` tells what
    /// the reader itself could not do, which is not the blob's fault.
    fn run<R: Read>(
        &self,
        reader: R,
        failure: &mut dyn FnMut(&mut R) -> Option<Error>,
    ) -> Result<(R, u64)> {
        let (work, diff_id) = (self.work, self.diff_id);
        let (bound, bound_name) = self.bound;
        let spool = tempfile::tempfile_in(work.path())
            .map_err(Error::on("create a file in", work.path()))?;
        let mut compressed = HashingReader::new(reader);
        let limits = &self.store.limits;
        let converted =
            decode_and_convert(&mut compressed, bound, self.image, spool, diff_id, limits);
        let drained = io::copy(&mut compressed, &mut io::sink());
        let (mut reader, actual, _) = compressed.into_parts();
        if let Some(error) = failure(&mut reader) {
            return Err(error);
        }
        drained.map_err(Error::on("read a layer for", work.path()))?;
        // Whatever a damaged blob did to the conversion, that it is damaged is what the user must know.
        if let Some(expected) = self.blob.digest.filter(|&expected| expected != actual) {
            return Err(Error::DigestMismatch {
                what: format!("layer {expected}"),
                expected,
                actual,
            });
        }
        match converted {
            Ok((actual, _)) if actual != *diff_id => Err(Error::DigestMismatch {
                what: format!("layer {diff_id} once uncompressed"),
                expected: *diff_id,
                actual,
            }),
            Ok((_, uncompressed)) => Ok((reader, uncompressed)),
            Err(LayerError::TooLong) => Err(Error::Limit {
                what: format!("layer {diff_id}: {bound_name}"),
                limit: bound,
            }),
            Err(LayerError::Write(source)) => Err(Error::io("write", work.path(), source)),
            Err(source) => Err(Error::Layer {
                layer: *diff_id,
                source,
            }),
        }
    }
}

/// Converts a compressed layer; the digest and length of the uncompressed tar.
fn decode_and_convert(
    compressed: &mut impl Read,
    bound: u64,
    image: &File,
    spool: File,
    diff_id: &Digest,
    limits: &crate::Limits,
) -> Result<(Digest, u64), LayerError> {
    let decoder = Decoder::detect(compressed).map_err(LayerError::Read)?;
    let mut guard = Guard {
        inner: decoder,
        left: bound,
        exceeded: false,
    };
    let mut tar = HashingReader::new(&mut guard);
    let converted = layer::convert(&mut tar, image, spool, diff_id, limits);
    let result = tar.finish();
    if guard.exceeded {
        return Err(LayerError::TooLong);
    }
    converted.map(|()| result)
}

/// Ends a stream with an error when it is longer than it may be.
struct Guard<R> {
    inner: R,
    left: u64,
    exceeded: bool,
}

impl<R: Read> Read for Guard<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        match self.left.checked_sub(n as u64) {
            Some(left) => {
                self.left = left;
                Ok(n)
            }
            None => {
                self.exceeded = true;
                Err(io::Error::other("the layer is longer than it may be"))
            }
        }
    }
}

fn rename(candidates: &mut [Candidate], reference: &Reference, members: &Members) -> Result<()> {
    match candidates {
        [only] => {
            only.references = vec![reference.clone()];
            Ok(())
        }
        several => Err(Error::AmbiguousSource {
            source_name: members.name.clone(),
            reference: Box::new(reference.clone()),
            count: several.len(),
        }),
    }
}

fn check_platform(config: &ImageConfiguration) -> Result<()> {
    if *config.os() == Os::Linux && *config.architecture() == Arch::Amd64 {
        return Ok(());
    }
    let found = format!("{}/{}", config.os(), config.architecture());
    Err(Error::WrongPlatform {
        wanted: PLATFORM.to_owned(),
        found: vec![found.chars().take(100).collect()],
    })
}
