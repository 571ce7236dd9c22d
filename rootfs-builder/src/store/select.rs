//! From a source's index to the images in it: which blobs they are made of and how they are called.

use std::collections::HashMap;

use oci_spec::image::{Arch, Descriptor, ImageIndex, ImageManifest, MediaType, Os, Platform};
use serde::Deserialize;

use super::source::Members;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::reference::{Reference, is_tag};

/// The platform that our guests run.
pub const PLATFORM: &str = "linux/amd64";
/// Indexes within indexes; two are seen in practice.
pub const MAX_INDEX_DEPTH: usize = 4;

/// The annotation in which containerd and docker put the whole name.
const ANNOTATION_IMAGE_NAME: &str = "io.containerd.image.name";
/// The annotation of the image specification (`annotations.md`), most often only a tag.
const ANNOTATION_REF_NAME: &str = "org.opencontainers.image.ref.name";

/// An image of a source, not yet verified.
#[derive(Debug)]
pub(super) struct Candidate {
    pub(super) config: Blob,
    pub(super) manifest_digest: Option<Digest>,
    /// Bottom to top.
    pub(super) layers: Vec<Blob>,
    pub(super) references: Vec<Reference>,
}

/// A member of the source, and what is promised of it.
#[derive(Debug)]
pub(super) struct Blob {
    pub(super) member: String,
    pub(super) digest: Option<Digest>,
    pub(super) size: Option<u64>,
}

/// A blob that has to be fetched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlobRef {
    /// Its digest.
    pub digest: Digest,
    /// Its length in bytes, as promised.
    pub size: u64,
}

/// What a registry answers when it is asked for an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Manifest {
    /// An image.
    Image {
        /// The configuration.
        config: BlobRef,
        /// Bottom to top, as they are transferred.
        layers: Vec<BlobRef>,
    },
    /// An index, whose entry for our platform is the manifest (or index) to go on with.
    Index {
        /// That entry.
        next: BlobRef,
    },
}

/// Finds the images of a source.
pub(super) fn candidates(members: &Members, limits: &Limits) -> Result<Vec<Candidate>> {
    let layout = members.read("oci-layout", limits.manifest_bytes)?;
    let index = members.read("index.json", limits.manifest_bytes)?;
    if let (Some(layout), Some(index)) = (layout, index) {
        check_layout_version(members, &layout)?;
        return oci_candidates(members, &index, limits);
    }
    match members.read("manifest.json", limits.manifest_bytes)? {
        Some(manifest) => docker_candidates(members, &manifest),
        None => Err(Error::NotAnImage {
            source_name: members.name.clone(),
            reason: "it has neither oci-layout and index.json nor manifest.json".to_owned(),
        }),
    }
}

/// `oci-layout` (image specification, `image-layout.md`).
fn check_layout_version(members: &Members, json: &[u8]) -> Result<()> {
    #[derive(Deserialize)]
    struct Layout {
        #[serde(rename = "imageLayoutVersion")]
        version: String,
    }
    let layout: Layout = parse(members, "oci-layout", json)?;
    if layout.version.split('.').next() != Some("1") {
        return Err(members.invalid(format!(
            "image layout version {:?} is not supported",
            layout.version
        )));
    }
    Ok(())
}

fn oci_candidates(members: &Members, index: &[u8], limits: &Limits) -> Result<Vec<Candidate>> {
    let index: ImageIndex = parse(members, "index.json", index)?;
    let mut found = Vec::new();
    let mut passed_over = Vec::new();
    for descriptor in index.manifests() {
        let Some((descriptor, manifest)) = resolve(members, descriptor, limits, &mut passed_over)?
        else {
            continue;
        };
        // Two names of one image are two descriptors.
        let references = names(members, descriptor.root);
        let digest = descriptor.digest;
        match found
            .iter_mut()
            .find(|other: &&mut Candidate| other.manifest_digest == Some(digest))
        {
            Some(other) => other.references.extend(references),
            None => found.push(oci_candidate(digest, &manifest, references)?),
        }
    }
    if found.is_empty() {
        return Err(Error::WrongPlatform {
            wanted: PLATFORM.to_owned(),
            found: passed_over,
        });
    }
    Ok(found)
}

/// A manifest's digest, and the descriptor in `index.json` that led to it.
struct Resolved<'a> {
    root: &'a Descriptor,
    digest: Digest,
}

/// Follows a descriptor of `index.json` to the manifest for our platform, if it has one.
fn resolve<'a>(
    members: &Members,
    root: &'a Descriptor,
    limits: &Limits,
    passed_over: &mut Vec<String>,
) -> Result<Option<(Resolved<'a>, ImageManifest)>> {
    let mut descriptor = root.clone();
    for _ in 0..=MAX_INDEX_DEPTH {
        if !is_usable(&descriptor, passed_over) {
            return Ok(None);
        }
        let digest = sha256(descriptor.digest().as_ref())?;
        let what = format!("manifest {digest}");
        match descriptor.media_type() {
            MediaType::ImageManifest => {}
            MediaType::ImageIndex => {}
            MediaType::Other(name) if name == DOCKER_MANIFEST || name == DOCKER_MANIFEST_LIST => {}
            other => {
                return Err(Error::UnknownMediaType {
                    what,
                    media_type: shorten(other.as_ref()),
                });
            }
        }
        let json = read_verified(
            members,
            "manifest",
            &digest,
            Some(descriptor.size()),
            limits.manifest_bytes,
        )?;
        if is_index(&descriptor) {
            let index: ImageIndex = parse(members, &what, &json)?;
            match best(index.manifests(), passed_over) {
                Some(next) => descriptor = next.clone(),
                None => return Ok(None),
            }
        } else {
            let manifest: ImageManifest = parse(members, &what, &json)?;
            return Ok(Some((Resolved { root, digest }, manifest)));
        }
    }
    Err(members.invalid(format!(
        "indexes are nested more than {MAX_INDEX_DEPTH} deep"
    )))
}

const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_MANIFEST_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

fn is_index(descriptor: &Descriptor) -> bool {
    match descriptor.media_type() {
        MediaType::ImageIndex => true,
        MediaType::Other(name) => name == DOCKER_MANIFEST_LIST,
        _ => false,
    }
}

/// Whether a descriptor can lead to an image for us; notes the platform when it cannot.
fn is_usable(descriptor: &Descriptor, passed_over: &mut Vec<String>) -> bool {
    // Build attestations stand beside images, marked by this annotation and an unknown platform.
    let annotations = descriptor.annotations().as_ref();
    if annotations.is_some_and(|annotations| annotations.contains_key("vnd.docker.reference.type"))
    {
        return false;
    }
    match descriptor.platform() {
        None => true,
        Some(platform) if platform_rank(platform).is_some() => true,
        Some(platform) => {
            note_platform(passed_over, &platform_name(platform));
            false
        }
    }
}

/// The descriptor of a multi-platform index that suits us best: the least demanding variant of our architecture.
fn best<'a>(manifests: &'a [Descriptor], passed_over: &mut Vec<String>) -> Option<&'a Descriptor> {
    let usable: Vec<_> = manifests
        .iter()
        .filter(|descriptor| is_usable(descriptor, passed_over))
        .collect();
    usable.into_iter().min_by_key(|descriptor| {
        // One without a platform is only a guess: its configuration decides later.
        descriptor
            .platform()
            .as_ref()
            .and_then(platform_rank)
            .unwrap_or(u8::MAX)
    })
}

/// How demanding a platform is of an x86-64 host, `None` when it is another platform.
fn platform_rank(platform: &Platform) -> Option<u8> {
    if *platform.os() != Os::Linux || *platform.architecture() != Arch::Amd64 {
        return None;
    }
    match platform.variant().as_deref() {
        None | Some("" | "v1") => Some(0),
        Some("v2") => Some(1),
        Some("v3") => Some(2),
        Some(_) => Some(3),
    }
}

fn platform_name(platform: &Platform) -> String {
    let mut name = format!("{}/{}", platform.os(), platform.architecture());
    if let Some(variant) = platform.variant() {
        name.push('/');
        name.push_str(variant);
    }
    shorten(&name)
}

/// Notes a platform for the error message, which does not get longer than a screen.
fn note_platform(passed_over: &mut Vec<String>, name: &str) {
    if passed_over.len() < 16 && !passed_over.iter().any(|other| other == name) {
        passed_over.push(name.to_owned());
    }
}

fn oci_candidate(
    digest: Digest,
    manifest: &ImageManifest,
    references: Vec<Reference>,
) -> Result<Candidate> {
    let config = manifest.config();
    match config.media_type() {
        MediaType::ImageConfig => {}
        MediaType::Other(name) if name == "application/vnd.docker.container.image.v1+json" => {}
        other => {
            return Err(Error::UnknownMediaType {
                what: format!("the configuration in manifest {digest}"),
                media_type: shorten(other.as_ref()),
            });
        }
    }
    Ok(Candidate {
        config: blob(config)?,
        manifest_digest: Some(digest),
        layers: manifest
            .layers()
            .iter()
            .map(layer_blob)
            .collect::<Result<_>>()?,
        references,
    })
}

/// The image of a manifest that is in a source as a blob.
pub(super) fn staged_candidate(
    members: &Members,
    manifest: &Digest,
    references: Vec<Reference>,
    limits: &Limits,
) -> Result<Candidate> {
    let json = read_verified(members, "manifest", manifest, None, limits.manifest_bytes)?;
    let parsed: ImageManifest = parse(members, &format!("manifest {manifest}"), &json)?;
    oci_candidate(*manifest, &parsed, references)
}

/// Tells a manifest from an index, by its media type or, without one, by what it has.
pub(super) fn read_manifest(name: &str, json: &[u8]) -> Result<Manifest> {
    #[derive(Deserialize)]
    struct Shape {
        #[serde(rename = "mediaType")]
        media_type: Option<String>,
        #[serde(rename = "schemaVersion")]
        version: Option<u32>,
        manifests: Option<serde::de::IgnoredAny>,
    }
    let invalid = |error: serde_json::Error| Error::InvalidImage {
        source_name: name.into(),
        reason: error.to_string(),
    };
    let shape: Shape = serde_json::from_slice(json).map_err(invalid)?;
    let is_index = match shape.media_type.as_deref() {
        Some("application/vnd.oci.image.index.v1+json" | DOCKER_MANIFEST_LIST) => true,
        Some("application/vnd.oci.image.manifest.v1+json" | DOCKER_MANIFEST) => false,
        None if shape.version == Some(2) => shape.manifests.is_some(),
        other => {
            return Err(Error::UnknownMediaType {
                what: name.to_owned(),
                media_type: shorten(other.unwrap_or("image manifest, schema 1")),
            });
        }
    };
    if is_index {
        let index: ImageIndex = serde_json::from_slice(json).map_err(invalid)?;
        let mut found = Vec::new();
        let next = best(index.manifests(), &mut found).ok_or(Error::WrongPlatform {
            wanted: PLATFORM.to_owned(),
            found,
        })?;
        return Ok(Manifest::Index {
            next: blob_ref(next.digest().as_ref(), next.size())?,
        });
    }
    let manifest: ImageManifest = serde_json::from_slice(json).map_err(invalid)?;
    // Refuses media types that cannot be loaded, before anything is fetched.
    oci_candidate(Digest::of(json), &manifest, Vec::new())?;
    let config = manifest.config();
    let layers = manifest.layers().iter();
    Ok(Manifest::Image {
        config: blob_ref(config.digest().as_ref(), config.size())?,
        layers: layers
            .map(|layer| blob_ref(layer.digest().as_ref(), layer.size()))
            .collect::<Result<_>>()?,
    })
}

fn blob_ref(digest: &str, size: u64) -> Result<BlobRef> {
    Ok(BlobRef {
        digest: sha256(digest)?,
        size,
    })
}

fn blob(descriptor: &Descriptor) -> Result<Blob> {
    let digest = sha256(descriptor.digest().as_ref())?;
    Ok(Blob {
        member: blob_path(&digest),
        digest: Some(digest),
        size: Some(descriptor.size()),
    })
}

fn layer_blob(descriptor: &Descriptor) -> Result<Blob> {
    let media_type = descriptor.media_type().to_string();
    let foreign = media_type.contains("nondistributable") || media_type.contains("rootfs.foreign");
    if foreign {
        return Err(Error::ForeignLayer {
            digest: shorten(descriptor.digest().as_ref()),
        });
    }
    // How it is compressed is seen from its first bytes, as all runtimes do: the names are not reliable.
    const KNOWN: [&str; 6] = [
        "application/vnd.oci.image.layer.v1.tar",
        "application/vnd.oci.image.layer.v1.tar+gzip",
        "application/vnd.oci.image.layer.v1.tar+zstd",
        "application/vnd.docker.image.rootfs.diff.tar",
        "application/vnd.docker.image.rootfs.diff.tar.gzip",
        "application/vnd.docker.image.rootfs.diff.tar.zstd",
    ];
    if !KNOWN.contains(&media_type.as_str()) {
        return Err(Error::UnknownMediaType {
            what: format!("layer {}", shorten(descriptor.digest().as_ref())),
            media_type: shorten(&media_type),
        });
    }
    blob(descriptor)
}

/// The names that a descriptor of `index.json` gives its image.
fn names(members: &Members, descriptor: &Descriptor) -> Vec<Reference> {
    let empty = HashMap::new();
    let annotations = descriptor.annotations().as_ref().unwrap_or(&empty);
    if let Some(name) = annotations.get(ANNOTATION_IMAGE_NAME) {
        return usable_name(name);
    }
    let Some(name) = annotations.get(ANNOTATION_REF_NAME) else {
        return Vec::new();
    };
    if name.contains(['/', ':']) {
        return usable_name(name);
    }
    // Only a tag: the repository is what the layout itself is called.
    match members.base_name() {
        Some(base) if is_tag(name) => usable_name(&format!("{base}:{name}")),
        _ => Vec::new(),
    }
}

/// A name from an annotation. They may hold anything: what is no name for us leaves the image without one.
fn usable_name(name: &str) -> Vec<Reference> {
    match tagged(name) {
        Ok(reference) => vec![reference],
        Err(error) => {
            log::warn!("the image gets no name: {error}");
            Vec::new()
        }
    }
}

/// A name that can be stored: one with a tag and no digest.
fn tagged(name: &str) -> Result<Reference> {
    let reference: Reference = name.parse()?;
    if reference.digest().is_some() {
        let reference = Box::new(reference);
        return Err(Error::DigestReference { reference });
    }
    Ok(reference)
}

/// One image of docker's `manifest.json` (moby's image specification 1.2).
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerManifest {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Option<Vec<String>>,
}

fn docker_candidates(members: &Members, manifest: &[u8]) -> Result<Vec<Candidate>> {
    let images: Vec<DockerManifest> = parse(members, "manifest.json", manifest)?;
    if images.is_empty() {
        return Err(members.invalid("manifest.json names no image".to_owned()));
    }
    images
        .into_iter()
        .map(|image| {
            Ok(Candidate {
                // Named `<digest>.json` or `blobs/sha256/<digest>`; either way its digest is the image's id, and
                // the diff ids in it vouch for the layers.
                config: Blob {
                    digest: docker_config_digest(&image.config),
                    member: image.config,
                    size: None,
                },
                manifest_digest: None,
                layers: image
                    .layers
                    .unwrap_or_default()
                    .into_iter()
                    .map(|member| Blob {
                        member,
                        digest: None,
                        size: None,
                    })
                    .collect(),
                references: image
                    .repo_tags
                    .unwrap_or_default()
                    .iter()
                    .map(|name| tagged(name))
                    .collect::<Result<_>>()?,
            })
        })
        .collect()
}

/// The digest that a docker archive's file name of a configuration promises, if it does.
fn docker_config_digest(member: &str) -> Option<Digest> {
    let name = member.rsplit('/').next().unwrap_or(member);
    format!("sha256:{}", name.strip_suffix(".json").unwrap_or(name))
        .parse()
        .ok()
}

/// Reads a small blob and checks its length and digest.
pub(super) fn read_verified(
    members: &Members,
    what: &'static str,
    digest: &Digest,
    size: Option<u64>,
    limit: u64,
) -> Result<Vec<u8>> {
    let bytes = read_blob(members, what, &blob_path(digest), size, limit)?;
    check_digest(what, &bytes, digest)?;
    Ok(bytes)
}

/// Reads the small member that a blob is and checks what is promised of it.
pub(super) fn read_member(
    members: &Members,
    what: &'static str,
    blob: &Blob,
    limit: u64,
) -> Result<Vec<u8>> {
    let bytes = read_blob(members, what, &blob.member, blob.size, limit)?;
    if let Some(digest) = &blob.digest {
        check_digest(what, &bytes, digest)?;
    }
    Ok(bytes)
}

fn read_blob(
    members: &Members,
    what: &'static str,
    path: &str,
    size: Option<u64>,
    limit: u64,
) -> Result<Vec<u8>> {
    let bytes = members
        .read(path, limit)?
        .ok_or_else(|| Error::MissingBlob {
            what,
            name: shorten(path),
        })?;
    match size {
        Some(expected) if expected != bytes.len() as u64 => Err(Error::SizeMismatch {
            what: format!("{what} {path}"),
            expected,
            actual: bytes.len() as u64,
        }),
        _ => Ok(bytes),
    }
}

fn check_digest(what: &'static str, bytes: &[u8], expected: &Digest) -> Result<()> {
    let actual = Digest::of(bytes);
    if actual != *expected {
        return Err(Error::DigestMismatch {
            what: format!("{what} {expected}"),
            expected: *expected,
            actual,
        });
    }
    Ok(())
}

/// Where a layout keeps a blob (`image-layout.md`, "Blobs").
fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn sha256(text: &str) -> Result<Digest> {
    Ok(text.parse()?)
}

fn parse<T: serde::de::DeserializeOwned>(members: &Members, what: &str, json: &[u8]) -> Result<T> {
    serde_json::from_slice(json).map_err(|error| members.invalid(format!("{what}: {error}")))
}

/// Text from an image for a message: control characters shown, length bounded.
fn shorten(text: &str) -> String {
    text.chars()
        .take(200)
        .flat_map(char::escape_debug)
        .collect()
}
