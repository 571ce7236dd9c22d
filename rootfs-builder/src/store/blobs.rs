//! Layers as they were transferred, compressed: what [`Store::save`] writes, as EROFS images cannot become them again.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use flate2::write::GzEncoder;
use serde::{Deserialize, Serialize};

use super::Store;
use super::disk::sync_parent;
use super::publish::seal_layer;
use super::work::WorkDir;
use crate::digest::{Digest, HashingWriter};
use crate::error::{Error, Result};
use crate::layer::decompress::Compression;

/// A kept blob, in the record of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RecordedBlob {
    pub(super) digest: Digest,
    /// In bytes.
    pub(super) size: u64,
    pub(super) compression: Kept,
}

/// How a kept blob is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Kept {
    Gzip,
    Zstd,
}

impl Kept {
    /// The media type of a layer (image specification, `layer.md`).
    pub(super) fn media_type(self) -> &'static str {
        match self {
            Kept::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Kept::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }
}

/// The blobs that a load has in its work directory, by diff id.
pub(super) type KeptBlobs = BTreeMap<Digest, RecordedBlob>;

fn staged_blob(work: &WorkDir, digest: &Digest) -> PathBuf {
    work.path().join(format!("blob-{}", digest.hex()))
}

impl Store {
    /// Links the kept blob of a layer that the store has into the work directory; `None` when there is none.
    pub(super) fn hold_blob(
        &self,
        work: &WorkDir,
        diff_id: &Digest,
    ) -> Result<Option<RecordedBlob>> {
        for id in self.image_ids()? {
            let layers = match self.read_record(&id) {
                Ok(record) => record.map(|record| record.layers).unwrap_or_default(),
                // That image is of no use, but others may be.
                Err(Error::Corrupt { .. }) => continue,
                Err(error) => return Err(error),
            };
            let layer = layers.into_iter().find(|layer| layer.diff_id == *diff_id);
            let Some(blob) = layer.and_then(|layer| layer.blob) else {
                continue;
            };
            let path = staged_blob(work, &blob.digest);
            match fs::hard_link(self.blob_path(&blob.digest), &path) {
                Ok(()) => return Ok(Some(blob)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    return Ok(Some(blob));
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(Error::io("link", &path, error)),
            }
        }
        Ok(None)
    }

    /// Moves a blob from the work directory to its place. The caller holds the lock and syncs the directory.
    pub(super) fn publish_blob(&self, work: &WorkDir, blob: &RecordedBlob) -> Result<()> {
        let path = self.blob_path(&blob.digest);
        match fs::metadata(&path) {
            Ok(metadata) if metadata.len() == blob.size => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io("read", &path, error)),
        }
        fs::rename(staged_blob(work, &blob.digest), &path).map_err(Error::on("rename", &path))
    }
}

/// Where a blob that is read goes besides.
enum Sink {
    /// Not known yet: the first bytes, which tell.
    Start(Vec<u8>),
    /// As it comes.
    Plain(HashingWriter<File>, Kept),
    /// It came uncompressed.
    Packed(Box<GzEncoder<HashingWriter<File>>>),
}

/// Bytes that tell a compression.
const TELLING: usize = 6;

/// Passes a layer's blob on to whoever reads it, and keeps it in a file of the work directory.
pub(super) struct Keeper<R> {
    inner: R,
    file: Option<File>,
    path: PathBuf,
    sink: Sink,
    /// What went wrong with the file, which is not the reader's fault.
    failure: Option<io::Error>,
}

impl<R: Read> Keeper<R> {
    pub(super) fn new(inner: R, work: &WorkDir) -> Result<Self> {
        let path = work.path().join("blob");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&path)
            .map_err(Error::on("create", &path))?;
        Ok(Keeper {
            inner,
            file: Some(file),
            path,
            sink: Sink::Start(Vec::with_capacity(TELLING)),
            failure: None,
        })
    }

    fn keep(&mut self, bytes: &[u8]) -> io::Result<()> {
        match &mut self.sink {
            Sink::Start(start) => {
                start.extend_from_slice(bytes);
                if start.len() < TELLING {
                    return Ok(());
                }
                self.begin()
            }
            Sink::Plain(file, _) => file.write_all(bytes),
            Sink::Packed(encoder) => encoder.write_all(bytes),
        }
    }

    /// Chooses the sink by the first bytes.
    fn begin(&mut self) -> io::Result<()> {
        let (Sink::Start(start), Some(file)) = (&mut self.sink, self.file.take()) else {
            return Ok(());
        };
        let start = std::mem::take(start);
        let file = HashingWriter::new(file);
        // One that is compressed otherwise cannot be converted either, which says so.
        self.sink = match Compression::of(&start).unwrap_or(Compression::None) {
            Compression::Gzip => Sink::Plain(file, Kept::Gzip),
            Compression::Zstd => Sink::Plain(file, Kept::Zstd),
            Compression::None => {
                let level = flate2::Compression::fast();
                Sink::Packed(Box::new(GzEncoder::new(file, level)))
            }
        };
        self.keep(&start)
    }

    /// What went wrong with the file, if anything did.
    pub(super) fn failure(&mut self) -> Option<Error> {
        let failure = self.failure.take();
        failure.map(|source| Error::io("write", &self.path, source))
    }

    /// Once everything is read: the blob under its own name, on disk.
    pub(super) fn finish(mut self, work: &WorkDir) -> Result<RecordedBlob> {
        let on = |source| Error::io("write", &work.path().join("blob"), source);
        if matches!(self.sink, Sink::Start(_)) {
            self.begin().map_err(on)?;
        }
        let (writer, compression) = match self.sink {
            Sink::Plain(writer, kept) => (writer, kept),
            Sink::Packed(encoder) => (encoder.finish().map_err(on)?, Kept::Gzip),
            // `begin` has replaced it.
            Sink::Start(_) => return Err(on(io::Error::other("nothing was read"))),
        };
        let (file, digest, size) = writer.finish();
        seal_layer(&self.path, &file)?;
        let path = staged_blob(work, &digest);
        fs::rename(&self.path, &path).map_err(Error::on("rename", &path))?;
        sync_parent(&path)?;
        Ok(RecordedBlob {
            digest,
            size,
            compression,
        })
    }
}

impl<R: Read> Read for Keeper<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        if let Err(error) = self.keep(&buf[..n]) {
            self.failure = Some(error);
            return Err(io::Error::other("the layer cannot be kept"));
        }
        Ok(n)
    }
}

/// Keeps a blob that is a file of the work directory already, if it is compressed.
pub(super) fn adopt(
    work: &WorkDir,
    from: &Path,
    digest: &Digest,
    size: u64,
) -> Result<Option<RecordedBlob>> {
    let file = File::open(from).map_err(Error::on("open", from))?;
    let mut start = Vec::new();
    (&file)
        .take(TELLING as u64)
        .read_to_end(&mut start)
        .map_err(Error::on("read", from))?;
    let compression = match Compression::of(&start) {
        Ok(Compression::Gzip) => Kept::Gzip,
        Ok(Compression::Zstd) => Kept::Zstd,
        _ => return Ok(None),
    };
    seal_layer(from, &file)?;
    let path = staged_blob(work, digest);
    match fs::hard_link(from, &path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(Error::io("link", &path, error)),
    }
    Ok(Some(RecordedBlob {
        digest: *digest,
        size,
        compression,
    }))
}
