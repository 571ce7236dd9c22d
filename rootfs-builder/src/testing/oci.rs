//! Writes image layouts and archives.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::tar::{Item, TarBuilder};
use crate::digest::Digest;

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// An OCI image layout directory under construction.
#[derive(Debug)]
pub(crate) struct Layout {
    pub(crate) path: PathBuf,
    manifests: Vec<Value>,
}

impl Layout {
    pub(crate) fn new(path: &Path) -> Layout {
        fs::create_dir_all(path.join("blobs/sha256")).unwrap();
        fs::write(path.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Layout {
            path: path.to_owned(),
            manifests: Vec::new(),
        }
    }

    /// Where a blob is.
    pub(crate) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.path.join("blobs/sha256").join(digest.hex())
    }

    /// Adds a blob and gives a descriptor of it.
    pub(crate) fn blob(&self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = Digest::of(bytes);
        fs::write(self.blob_path(&digest), bytes).unwrap();
        json!({"mediaType": media_type, "digest": digest.to_string(), "size": bytes.len()})
    }

    /// Adds an image of plain tars, gzipped; gives a descriptor of its manifest.
    pub(crate) fn image(&self, layers: &[Vec<u8>]) -> Value {
        self.image_for("linux", "amd64", layers)
    }

    pub(crate) fn image_for(&self, os: &str, architecture: &str, layers: &[Vec<u8>]) -> Value {
        let diff_ids: Vec<Digest> = layers.iter().map(|tar| Digest::of(tar)).collect();
        let descriptors: Vec<Value> = layers
            .iter()
            .map(|tar| self.blob("application/vnd.oci.image.layer.v1.tar+gzip", &gzip(tar)))
            .collect();
        self.manifest(config(os, architecture, &diff_ids), descriptors)
    }

    /// Adds a manifest of a configuration and layers that may contradict each other.
    pub(crate) fn manifest(&self, config: Value, layers: Vec<Value>) -> Value {
        let config = self.blob(
            "application/vnd.oci.image.config.v1+json",
            config.to_string().as_bytes(),
        );
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": layers,
        });
        self.blob(
            "application/vnd.oci.image.manifest.v1+json",
            manifest.to_string().as_bytes(),
        )
    }

    /// Puts a descriptor into the index, with a name.
    pub(crate) fn index(&mut self, mut descriptor: Value, name: Option<&str>) -> &mut Layout {
        if let Some(name) = name {
            descriptor["annotations"] = json!({"org.opencontainers.image.ref.name": name});
        }
        self.manifests.push(descriptor);
        let index = json!({"schemaVersion": 2, "manifests": self.manifests});
        fs::write(self.path.join("index.json"), index.to_string()).unwrap();
        self
    }
}

pub(crate) fn config(os: &str, architecture: &str, diff_ids: &[Digest]) -> Value {
    json!({
        "architecture": architecture,
        "os": os,
        "created": "2024-05-06T07:08:09.5Z",
        "config": {"Cmd": ["/bin/sh"], "Env": ["PATH=/bin"], "Healthcheck": {"Test": ["NONE"]}},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    })
}

/// A tar of all regular files under a directory.
pub(crate) fn tar_of_directory(root: &Path) -> Vec<u8> {
    let mut items = Vec::new();
    let mut pending = vec![root.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                pending.push(path);
            } else {
                let name = path
                    .strip_prefix(root)
                    .unwrap()
                    .to_str()
                    .unwrap()
                    .to_owned();
                items.push(Item::file(name, fs::read(&path).unwrap()));
            }
        }
    }
    TarBuilder::of(items)
}

/// An archive as `docker save` wrote it before version 25: `manifest.json`, a layer repeated as a symbolic link.
pub(crate) fn docker_archive(tags: &[&str], layers: &[Vec<u8>]) -> Vec<u8> {
    let diff_ids: Vec<Digest> = layers.iter().map(|tar| Digest::of(tar)).collect();
    let config = config("linux", "amd64", &diff_ids).to_string();
    let config_name = format!("{}.json", Digest::of(config.as_bytes()).hex());
    let mut items = vec![Item::file(&config_name, &config)];
    let mut names = Vec::new();
    for (i, tar) in layers.iter().enumerate() {
        let name = format!("layer{i}/layer.tar");
        match layers[..i].iter().position(|other| other == tar) {
            Some(same) => items.push(Item::symlink(&name, format!("../layer{same}/layer.tar"))),
            None => items.push(Item::file(&name, tar)),
        }
        names.push(name);
    }
    let manifest = json!([{"Config": config_name, "RepoTags": tags, "Layers": names}]);
    items.push(Item::file("manifest.json", manifest.to_string()));
    TarBuilder::of(items)
}
