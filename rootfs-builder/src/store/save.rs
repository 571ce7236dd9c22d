//! Saving: images as one archive that is an OCI layout and a docker archive at once, as docker 25 and later write it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};

use serde_json::{Value, json};

use super::blobs::RecordedBlob;
use super::images::{Record, RecordedLayer};
use super::{Image, Staging, Store};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::reference::Reference;

/// An image to be saved.
struct Saved {
    image: Image,
    layers: Vec<RecordedLayer>,
    /// The names that are saved with it.
    tags: Vec<Reference>,
}

impl Store {
    /// Writes images to `out` as a tar archive. An image given by a name with a tag keeps that name, one given by its id
    /// or a digest has none in the archive. The layers are those the images were loaded with, byte for byte (compressed
    /// if they were not), so ids and diff ids stay.
    ///
    /// # Errors
    /// Those of [`Store::get`]; [`Error::NotKept`] for an image of before layers were kept; [`Error::Output`] when `out`
    /// fails, which has a part of the archive then.
    pub fn save(&self, names: &[&str], out: &mut dyn Write) -> Result<()> {
        let staging = self.stage()?;
        let mut images: Vec<Saved> = Vec::new();
        for name in names {
            let image = self.get(name)?;
            let tag = name.parse::<Reference>().ok().filter(|reference| {
                reference.digest().is_none() && image.references.contains(reference)
            });
            if let Some(same) = images.iter_mut().find(|other| other.image.id == image.id) {
                let new = tag.filter(|tag| !same.tags.contains(tag));
                same.tags.extend(new);
                continue;
            }
            let record = self
                .read_record(&image.id)?
                .ok_or_else(|| Error::NotFound {
                    name: (*name).to_owned(),
                })?;
            let layers = own_layers(&image, record)?;
            for layer in &layers {
                // Whatever is removed meanwhile stays until the archive is written.
                self.link_blob(layer, &staging, &image)?;
            }
            images.push(Saved {
                image,
                layers,
                tags: tag.into_iter().collect(),
            });
        }
        let mut archive = Archive::new(out);
        archive.write(&images, &|blob| {
            let path = staging.blob_path(&blob.digest);
            File::open(&path).map_err(Error::on("open", &path))
        })
    }

    fn link_blob(&self, layer: &RecordedLayer, staging: &Staging, image: &Image) -> Result<()> {
        let not_kept = || Error::NotKept { id: image.id };
        let blob = layer.blob.as_ref().ok_or_else(not_kept)?;
        let to = &staging.blob_path(&blob.digest);
        let from = self.blob_path(&blob.digest);
        let corrupt = |reason: String| Error::Corrupt {
            path: from.clone(),
            reason,
        };
        match fs::hard_link(&from, to) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(corrupt("it is missing".to_owned()));
            }
            Err(error) => return Err(Error::io("link", to, error)),
        }
        let length = fs::metadata(to).map_err(Error::on("read", to))?.len();
        if length != blob.size {
            return Err(corrupt(format!(
                "it has {length} bytes, expected {}",
                blob.size
            )));
        }
        Ok(())
    }
}

/// The layers of the image's configuration, without the one that the store may have added.
fn own_layers(image: &Image, record: Record) -> Result<Vec<RecordedLayer>> {
    let mut layers = record.layers;
    layers.truncate(image.config.rootfs().diff_ids().len());
    if layers.iter().any(|layer| layer.blob.is_none()) {
        return Err(Error::NotKept { id: image.id });
    }
    Ok(layers)
}

struct Archive<'a> {
    tar: tar::Builder<&'a mut dyn Write>,
    written: BTreeSet<Digest>,
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn output(source: io::Error) -> Error {
    Error::Output { source }
}

impl<'a> Archive<'a> {
    fn new(out: &'a mut dyn Write) -> Self {
        Archive {
            tar: tar::Builder::new(out),
            written: BTreeSet::new(),
        }
    }

    fn write(
        &mut self,
        images: &[Saved],
        open: &dyn Fn(&RecordedBlob) -> Result<File>,
    ) -> Result<()> {
        self.directory("blobs/")?;
        self.directory("blobs/sha256/")?;
        let mut manifests = Vec::new();
        let mut docker = Vec::new();
        for saved in images {
            for layer in &saved.layers {
                let Some(blob) = &layer.blob else { continue };
                if self.written.insert(blob.digest) {
                    self.file(&blob_name(&blob.digest), blob.size, open(blob)?)?;
                }
            }
            self.blob(&saved.image.id, &saved.image.config_json)?;
            let manifest = manifest(saved);
            let digest = Digest::of(&manifest);
            self.blob(&digest, &manifest)?;
            manifests.extend(descriptors(saved, &digest, manifest.len()));
            docker.push(docker_entry(saved));
        }
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": manifests,
        });
        self.bytes("index.json", index.to_string().as_bytes())?;
        self.bytes("manifest.json", Value::from(docker).to_string().as_bytes())?;
        self.bytes("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        self.tar.finish().map_err(output)
    }

    fn blob(&mut self, digest: &Digest, bytes: &[u8]) -> Result<()> {
        if self.written.insert(*digest) {
            self.bytes(&blob_name(digest), bytes)?;
        }
        Ok(())
    }

    fn directory(&mut self, name: &str) -> Result<()> {
        let mut header = header(0o755, 0);
        header.set_entry_type(tar::EntryType::Directory);
        self.tar
            .append_data(&mut header, name, io::empty())
            .map_err(output)
    }

    fn bytes(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.file(name, bytes.len() as u64, bytes)
    }

    fn file(&mut self, name: &str, size: u64, content: impl Read) -> Result<()> {
        self.tar
            .append_data(&mut header(0o644, size), name, content.take(size))
            .map_err(output)
    }
}

/// The same for every archive, so that the same images make the same bytes.
fn header(mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_ustar();
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

fn manifest(saved: &Saved) -> Vec<u8> {
    let layers: Vec<Value> = saved
        .layers
        .iter()
        .filter_map(|layer| layer.blob.as_ref())
        .map(|blob| {
            json!({
                "mediaType": blob.compression.media_type(),
                "digest": blob.digest,
                "size": blob.size,
            })
        })
        .collect();
    json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": saved.image.id,
            "size": saved.image.config_json.len(),
        },
        "layers": layers,
    })
    .to_string()
    .into_bytes()
}

/// One for each name; one without annotations for an image that has none.
fn descriptors(saved: &Saved, digest: &Digest, size: usize) -> Vec<Value> {
    let descriptor = json!({
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": digest,
        "size": size,
        "platform": {
            "architecture": saved.image.config.architecture(),
            "os": saved.image.config.os(),
        },
    });
    if saved.tags.is_empty() {
        return vec![descriptor];
    }
    let tagged = saved.tags.iter().map(|tag| {
        let mut descriptor = descriptor.clone();
        descriptor["annotations"] = json!({
            "io.containerd.image.name": tag.to_string(),
            "org.opencontainers.image.ref.name": tag.tag(),
        });
        descriptor
    });
    tagged.collect()
}

/// An entry of docker's `manifest.json`.
fn docker_entry(saved: &Saved) -> Value {
    let tags: Vec<String> = saved.tags.iter().map(Reference::familiar).collect();
    let layers: Vec<String> = saved
        .layers
        .iter()
        .filter_map(|layer| layer.blob.as_ref())
        .map(|blob| blob_name(&blob.digest))
        .collect();
    json!({
        "Config": blob_name(&saved.image.id),
        "RepoTags": if tags.is_empty() { Value::Null } else { json!(tags) },
        "Layers": layers,
    })
}
