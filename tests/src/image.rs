//! Small OCI images, written here so that no daemon and no network is needed.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tar::{EntryType, Header};

/// One layer: tar entries in the order in which they are added.
///
/// Nothing is checked: hostile names and types are what the bad-input tests need.
#[derive(Clone, Default)]
pub struct Layer {
    tar: Vec<u8>,
    owner: (u64, u64),
}

impl Layer {
    /// A layer without entries.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the owner of the entries that follow (0:0 at first).
    #[must_use]
    pub fn owner(mut self, uid: u64, gid: u64) -> Self {
        self.owner = (uid, gid);
        self
    }

    /// A directory.
    #[must_use]
    pub fn dir(self, path: &str, mode: u32) -> Self {
        self.entry(EntryType::Directory, path, mode, "", &[])
    }

    /// A regular file.
    #[must_use]
    pub fn file(self, path: &str, mode: u32, contents: impl AsRef<[u8]>) -> Self {
        self.entry(EntryType::Regular, path, mode, "", contents.as_ref())
    }

    /// A symbolic link.
    #[must_use]
    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Symlink, path, 0o777, target, &[])
    }

    /// A hard link to an earlier entry.
    #[must_use]
    pub fn hard_link(self, path: &str, target: &str) -> Self {
        self.entry(EntryType::Link, path, 0o644, target, &[])
    }

    /// Removes what lower layers have at `directory/name` (OCI image layer specification, "Whiteouts").
    #[must_use]
    pub fn whiteout(self, directory: &str, name: &str) -> Self {
        self.file(&format!("{directory}/.wh.{name}"), 0o644, [])
    }

    /// Hides all that lower layers have in `directory` (the same, "Opaque Whiteout").
    #[must_use]
    pub fn opaque(self, directory: &str) -> Self {
        self.file(&format!("{directory}/.wh..wh..opq"), 0o644, [])
    }

    fn entry(
        mut self,
        kind: EntryType,
        path: &str,
        mode: u32,
        link: &str,
        contents: &[u8],
    ) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(self.owner.0);
        header.set_gid(self.owner.1);
        header.set_mtime(1_700_000_000);
        header.set_size(contents.len() as u64);
        // Written as raw bytes: the crate's setters refuse the `..` that some tests need.
        let old = header.as_old_mut();
        assert!(
            path.len() < 100 && link.len() < 100,
            "name too long: {path}"
        );
        old.name[..path.len()].copy_from_slice(path.as_bytes());
        old.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.tar.extend_from_slice(header.as_bytes());
        self.tar.extend_from_slice(contents);
        self.tar.resize(self.tar.len().next_multiple_of(512), 0);
        self
    }

    /// A file, link or directory tree of this machine at its own path, owned as entries are.
    /// `wanted` says of each file below a directory whether it is taken.
    ///
    /// # Panics
    /// If it cannot be read.
    #[must_use]
    pub fn host(self, path: &str, wanted: &dyn Fn(&Path) -> bool) -> Self {
        let stat = fs::symlink_metadata(path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let name = path.trim_start_matches('/');
        if stat.is_symlink() {
            let target = fs::read_link(path).expect("read a link");
            return self.symlink(name, target.to_str().expect("UTF-8"));
        }
        if stat.is_file() {
            let contents = fs::read(path).unwrap_or_else(|error| panic!("{path}: {error}"));
            return self.file(name, stat.permissions().mode() & 0o777, contents);
        }
        let mut entries: Vec<_> = fs::read_dir(path)
            .expect("list a directory")
            .map(|entry| entry.expect("list a directory").path())
            .filter(|path| path.is_dir() || wanted(path))
            .collect();
        entries.sort();
        entries.iter().fold(self.dir(name, 0o755), |layer, path| {
            layer.host(path.to_str().expect("UTF-8"), wanted)
        })
    }

    /// Programs of this machine at their own paths, with the libraries that ldd(1) names.
    ///
    /// # Panics
    /// If one is not installed.
    #[must_use]
    pub fn programs(self, programs: &[&str]) -> Self {
        let mut files = BTreeSet::new();
        for program in programs {
            // Not all are linked dynamically, which ldd tells as a failure.
            let libraries = crate::Command::new(["ldd", program]).run().stdout();
            files.extend(
                libraries
                    .split_whitespace()
                    .filter(|word| word.starts_with('/'))
                    .map(str::to_owned),
            );
            files.insert((*program).to_owned());
        }
        files.iter().fold(self, |layer, path| {
            // A library's name is a link to its file; one file with that name does.
            let real = fs::canonicalize(path).unwrap_or_else(|error| panic!("{path}: {error}"));
            let contents = fs::read(real).expect("read a program");
            layer.file(path.trim_start_matches('/'), 0o755, contents)
        })
    }

    /// The layer's tar archive.
    pub fn tar(&self) -> Vec<u8> {
        let mut tar = self.tar.clone();
        tar.extend_from_slice(&[0; 1024]);
        tar
    }
}

/// An image: layers from bottom to top, and its configuration.
#[derive(Clone)]
pub struct Image {
    /// Its reference, such as `caisson.test/busybox:latest`.
    pub name: String,
    /// Bottom to top.
    pub layers: Vec<Layer>,
    /// The configuration's `config` object (`Cmd`, `Entrypoint`, `Env`, `User`, ...).
    pub config: Value,
    /// Its layers are compressed.
    pub compressed: bool,
}

impl Image {
    /// An image without layers.
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            layers: Vec::new(),
            config: json!({ "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"] }),
            compressed: true,
        }
    }

    /// Debian's static busybox with all its applets, and the users `root` and `app` (1000:1000,
    /// also in group `extra`, 2000).
    ///
    /// # Panics
    /// If busybox-static is not installed.
    pub fn busybox(name: &str) -> Self {
        let busybox = ["/bin/busybox", "/usr/bin/busybox"]
            .into_iter()
            .find_map(|path| fs::read(path).ok())
            .expect("/bin/busybox: apt-get install busybox-static");
        assert!(
            !busybox
                .windows(14)
                .any(|window| window == b"/lib64/ld-linu"),
            "/bin/busybox is linked dynamically: apt-get install busybox-static"
        );
        let applets = crate::Command::new(["busybox", "--list"])
            .run()
            .ok()
            .stdout();
        let mut layer = Layer::new()
            .dir("bin", 0o755)
            .file("bin/busybox", 0o755, busybox);
        for applet in applets.lines().filter(|name| *name != "busybox") {
            layer = layer.symlink(&format!("bin/{applet}"), "busybox");
        }
        layer = layer
            .dir("etc", 0o755)
            .file(
                "etc/passwd",
                0o644,
                "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/home/app:/bin/sh\n",
            )
            .file(
                "etc/group",
                0o644,
                "root:x:0:\napp:x:1000:\nextra:x:2000:app\n",
            )
            .dir("tmp", 0o1777)
            .dir("root", 0o700)
            .dir("var", 0o755)
            .dir("home", 0o755)
            .owner(1000, 1000)
            .dir("home/app", 0o755);
        let mut image = Self::new(name);
        image.config["Cmd"] = json!(["sh"]);
        image.layers.push(layer);
        image
    }

    /// Leaves its layers uncompressed: quicker to make when they are large.
    #[must_use]
    pub fn uncompressed(mut self) -> Self {
        self.compressed = false;
        self
    }

    /// Adds a layer on top.
    #[must_use]
    pub fn layer(mut self, layer: Layer) -> Self {
        self.layers.push(layer);
        self
    }

    /// Sets a key of the configuration's `config` object.
    #[must_use]
    pub fn config(mut self, key: &str, value: Value) -> Self {
        self.config[key] = value;
        self
    }

    /// Writes it as an OCI image layout (layers gzip-compressed unless
    /// [`Self::uncompressed`]) into a directory that is made.
    ///
    /// # Panics
    /// If writing fails.
    pub fn write_layout(&self, directory: &Path) {
        let blobs = directory.join("blobs/sha256");
        fs::create_dir_all(&blobs).expect("make the layout's directory");
        let put = |bytes: &[u8]| {
            let digest = hex(bytes);
            fs::write(blobs.join(&digest), bytes).expect("write a blob");
            (format!("sha256:{digest}"), bytes.len())
        };
        let mut descriptors = Vec::new();
        let mut diff_ids = Vec::new();
        for layer in &self.layers {
            let tar = layer.tar();
            let (kind, (digest, size)) = if self.compressed {
                diff_ids.push(format!("sha256:{}", hex(&tar)));
                ("tar+gzip", put(&gzip(&tar)))
            } else {
                let plain = put(&tar);
                diff_ids.push(plain.0.clone());
                ("tar", plain)
            };
            descriptors.push(json!({
                "mediaType": format!("application/vnd.oci.image.layer.v1.{kind}"),
                "digest": digest, "size": size,
            }));
        }
        let (config, config_size) = put(&self.config_json(&diff_ids));
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": config, "size": config_size,
            },
            "layers": descriptors,
        });
        let (manifest, manifest_size) = put(&to_bytes(&manifest));
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [{
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": manifest, "size": manifest_size,
                "annotations": {
                    "io.containerd.image.name": self.name,
                    "org.opencontainers.image.ref.name": self.name,
                },
            }],
        });
        fs::write(directory.join("index.json"), to_bytes(&index)).expect("write index.json");
        fs::write(
            directory.join("oci-layout"),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        )
        .expect("write oci-layout");
    }

    /// Writes it as a tar archive of an OCI image layout.
    ///
    /// # Panics
    /// If writing fails.
    pub fn write_oci_archive(&self, path: &Path) {
        let layout = tempfile::tempdir().expect("a temporary directory");
        self.write_layout(layout.path());
        let mut archive = Layer::new();
        for file in files_below(layout.path()) {
            let name = file.strip_prefix(layout.path()).expect("it is below");
            let contents = fs::read(&file).expect("read back");
            archive = archive.file(name.to_str().expect("ASCII"), 0o644, contents);
        }
        fs::write(path, archive.tar()).expect("write the archive");
    }

    /// Writes it as `docker save` does (plain layers and `manifest.json`).
    ///
    /// # Panics
    /// If writing fails.
    pub fn write_docker_archive(&self, path: &Path) {
        let mut archive = Layer::new();
        let mut diff_ids = Vec::new();
        let mut names = Vec::new();
        for layer in &self.layers {
            let tar = layer.tar();
            let digest = hex(&tar);
            let name = format!("{digest}/layer.tar");
            archive = archive.file(&name, 0o644, &tar);
            diff_ids.push(format!("sha256:{digest}"));
            names.push(name);
        }
        let config = self.config_json(&diff_ids);
        let config_name = format!("{}.json", hex(&config));
        let manifest = json!([{
            "Config": config_name, "RepoTags": [self.name], "Layers": names,
        }]);
        archive = archive.file(&config_name, 0o644, &config).file(
            "manifest.json",
            0o644,
            to_bytes(&manifest),
        );
        fs::write(path, archive.tar()).expect("write the archive");
    }

    fn config_json(&self, diff_ids: &[String]) -> Vec<u8> {
        to_bytes(&json!({
            "created": "2024-01-01T00:00:00Z",
            "architecture": "amd64",
            "os": "linux",
            "config": self.config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
            "history": [],
        }))
    }
}

/// The SHA-256 of some bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    Sha256::digest(bytes)
        .iter()
        .fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).expect("compress in memory");
    encoder.finish().expect("compress in memory")
}

fn to_bytes(value: &Value) -> Vec<u8> {
    serde_json::to_vec(value).expect("a JSON value can be written")
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).expect("list") {
        let path = entry.expect("list").path();
        if path.is_dir() {
            files.extend(files_below(&path));
        } else {
            files.push(path);
        }
    }
    files.sort();
    files
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn small() -> Image {
        Image::new("caisson.test/small:1")
            .layer(Layer::new().dir("etc", 0o755).file("etc/a", 0o644, "a"))
            .layer(Layer::new().whiteout("etc", "a").opaque("etc"))
    }

    #[test]
    fn a_layout_is_consistent() {
        let directory = tempfile::tempdir().unwrap();
        small().write_layout(directory.path());
        let read = |path: &str| -> Value {
            serde_json::from_slice(&fs::read(directory.path().join(path)).unwrap()).unwrap()
        };
        let blob = |digest: &Value| {
            let name = digest.as_str().unwrap().strip_prefix("sha256:").unwrap();
            let bytes = fs::read(directory.path().join("blobs/sha256").join(name)).unwrap();
            assert_eq!(hex(&bytes), name);
            bytes
        };
        let manifest: Value =
            serde_json::from_slice(&blob(&read("index.json")["manifests"][0]["digest"])).unwrap();
        let config: Value = serde_json::from_slice(&blob(&manifest["config"]["digest"])).unwrap();
        for (layer, diff_id) in manifest["layers"]
            .as_array()
            .unwrap()
            .iter()
            .zip(config["rootfs"]["diff_ids"].as_array().unwrap())
        {
            let mut tar = Vec::new();
            flate2::read::GzDecoder::new(&blob(&layer["digest"])[..])
                .read_to_end(&mut tar)
                .unwrap();
            assert_eq!(format!("sha256:{}", hex(&tar)), diff_id.as_str().unwrap());
        }
    }

    #[test]
    fn a_layer_is_a_tar_archive_others_can_read() {
        let layer = Layer::new()
            .owner(7, 8)
            .file("a", 0o640, "contents")
            .symlink("b", "a")
            .hard_link("c", "a");
        let tar = layer.tar();
        let mut archive = tar::Archive::new(&tar[..]);
        let seen: Vec<_> = archive
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let header = entry.header().clone();
                (
                    entry.path().unwrap().display().to_string(),
                    header.entry_type(),
                    header.uid().unwrap(),
                    header.mode().unwrap(),
                )
            })
            .collect();
        assert_eq!(
            seen,
            [
                ("a".to_owned(), EntryType::Regular, 7, 0o640),
                ("b".to_owned(), EntryType::Symlink, 7, 0o777),
                ("c".to_owned(), EntryType::Link, 7, 0o644),
            ]
        );
    }

    #[test]
    fn archives_hold_the_image() {
        let directory = tempfile::tempdir().unwrap();
        let names = |path: &Path| -> Vec<String> {
            let bytes = fs::read(path).unwrap();
            tar::Archive::new(&bytes[..])
                .entries()
                .unwrap()
                .map(|entry| entry.unwrap().path().unwrap().display().to_string())
                .collect()
        };
        let oci = directory.path().join("oci.tar");
        small().write_oci_archive(&oci);
        let oci = names(&oci);
        assert!(
            oci.contains(&"index.json".to_owned()) && oci.len() == 6,
            "{oci:?}"
        );
        let docker = directory.path().join("docker.tar");
        small().write_docker_archive(&docker);
        let docker = names(&docker);
        assert!(
            docker.contains(&"manifest.json".to_owned()) && docker.len() == 4,
            "{docker:?}"
        );
    }
}
