//! The one root file system all container runtimes start: a static busybox.

use std::{
    fs,
    io::Write,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use crate::error::BenchError;

/// Name under which the image is loaded.
pub const REFERENCE: &str = "caisson-bench:latest";

const APPLETS: [&str; 6] = ["sh", "echo", "sleep", "cat", "head", "true"];

/// Makes `directory/rootfs` from the busybox at `busybox`.
///
/// # Errors
/// When busybox is missing or a file cannot be written.
pub fn make_rootfs(directory: &Path, busybox: &Path) -> Result<PathBuf, BenchError> {
    let root = directory.join("rootfs");
    let make = || -> std::io::Result<()> {
        for name in ["bin", "dev", "etc", "proc", "sys", "tmp"] {
            fs::create_dir_all(root.join(name))?;
        }
        fs::copy(busybox, root.join("bin/busybox"))?;
        fs::set_permissions(root.join("bin/busybox"), fs::Permissions::from_mode(0o755))?;
        for applet in APPLETS {
            symlink("busybox", root.join("bin").join(applet))?;
        }
        fs::write(root.join("etc/passwd"), "root:x:0:0:root:/:/bin/sh\n")
    };
    make().map_err(BenchError::io(format!(
        "cannot make a root file system from {}",
        busybox.display()
    )))?;
    Ok(root)
}

/// Packs `rootfs` as an archive in `docker save`'s format, tagged `reference`.
///
/// # Errors
/// When a file cannot be read or written.
pub fn make_archive(rootfs: &Path, archive: &Path, reference: &str) -> Result<(), BenchError> {
    let make = || -> std::io::Result<()> {
        let mut layer = tar::Builder::new(Vec::new());
        layer.follow_symlinks(false);
        layer.append_dir_all(".", rootfs)?;
        let layer = layer.into_inner()?;
        let config = serde_json::json!({
            "architecture": "amd64",
            "os": "linux",
            "config": { "Cmd": ["/bin/sh"], "Env": ["PATH=/bin"] },
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", hex(&layer))] },
            "history": [{ "created_by": "caisson-bench" }],
        })
        .to_string();
        let config_name = format!("{}.json", hex(config.as_bytes()));
        let manifest = serde_json::json!([{
            "Config": config_name,
            "RepoTags": [reference],
            "Layers": ["layer.tar"],
        }])
        .to_string();
        let mut outer = tar::Builder::new(fs::File::create(archive)?);
        for (name, bytes) in [
            ("layer.tar", layer.as_slice()),
            (&config_name, config.as_bytes()),
            ("manifest.json", manifest.as_bytes()),
        ] {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            outer.append_data(&mut header, name, bytes)?;
        }
        outer.into_inner()?.flush()
    };
    make().map_err(BenchError::io(format!(
        "cannot write {}",
        archive.display()
    )))
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    #[test]
    fn the_archive_names_the_layer_by_its_digest() {
        let scratch = tempfile::TempDir::new().unwrap();
        let busybox = scratch.path().join("busybox");
        fs::write(&busybox, "not really").unwrap();
        let root = make_rootfs(scratch.path(), &busybox).unwrap();
        let path = scratch.path().join("image.tar");
        make_archive(&root, &path, REFERENCE).unwrap();

        let mut archive = tar::Archive::new(fs::File::open(&path).unwrap());
        let mut files = std::collections::HashMap::new();
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            files.insert(entry.path().unwrap().display().to_string(), bytes);
        }
        let manifest: serde_json::Value = serde_json::from_slice(&files["manifest.json"]).unwrap();
        let config = &files[manifest[0]["Config"].as_str().unwrap()];
        let config: serde_json::Value = serde_json::from_slice(config).unwrap();
        assert_eq!(
            config["rootfs"]["diff_ids"][0],
            format!("sha256:{}", hex(&files["layer.tar"]))
        );
        let mut layer = tar::Archive::new(files["layer.tar"].as_slice());
        let names: Vec<_> = layer
            .entries()
            .unwrap()
            .map(|e| e.unwrap().path().unwrap().display().to_string())
            .collect();
        assert!(names.iter().any(|n| n.ends_with("bin/sh")), "{names:?}");
    }
}
