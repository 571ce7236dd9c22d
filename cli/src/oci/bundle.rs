//! A bundle's config.json: checked, and turned into the one that the shim gets.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use caisson_sandbox::hooks::Hooks;
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde_json::{Value, json};

use crate::error::Error;

/// Largest config.json; those of Kubernetes pods are below a hundred KiB.
const MAX_CONFIG: u64 = 16 << 20;

/// What a bundle says.
pub struct Bundle {
    /// Its directory.
    pub path: PathBuf,
    /// config.json as it is, unknown fields included.
    document: Value,
    /// The root file system's directory.
    pub rootfs: PathBuf,
    /// config.json's `process.terminal`.
    pub terminal: bool,
    /// Rows and columns it asks for.
    pub console_size: Option<(u16, u16)>,
    /// A network namespace of its own is asked for, and not by path.
    pub own_network: bool,
    /// config.json's `linux.cgroupsPath`.
    pub cgroups_path: Option<String>,
    /// Those that run on the host.
    pub hooks: Hooks,
    /// config.json's `annotations`.
    pub annotations: BTreeMap<String, String>,
    /// config.json's `ociVersion`.
    pub version: String,
}

/// Reads `path`, at most `limit` bytes of it.
///
/// # Errors
/// It cannot be read, or is longer.
pub fn read(path: &Path, limit: u64) -> Result<Vec<u8>, Error> {
    use io::Read;
    let mut text = Vec::new();
    let read = fs::File::open(path).and_then(|file| {
        // A FIFO or a device would never end.
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        file.take(limit + 1).read_to_end(&mut text)
    });
    read.map_err(Error::file("read", path))?;
    if text.len() as u64 > limit {
        return Err(Error::file("read", path)(io::Error::other(format!(
            "larger than {limit} bytes"
        ))));
    }
    Ok(text)
}

impl Bundle {
    /// Reads the bundle in a directory.
    ///
    /// # Errors
    /// It is none, or asks for what cannot be.
    pub fn load(directory: &Path) -> Result<Self, Error> {
        let path =
            fs::canonicalize(directory).map_err(Error::file("open the bundle", directory))?;
        let file = path.join("config.json");
        let text = read(&file, MAX_CONFIG)?;
        let malformed = |error: &dyn std::fmt::Display| {
            Error::State(format!(
                "{} is no OCI specification: {error}",
                file.display()
            ))
        };
        let document: Value = serde_json::from_slice(&text).map_err(|error| malformed(&error))?;
        let spec: Spec =
            serde_json::from_value(document.clone()).map_err(|error| malformed(&error))?;
        let root = spec
            .root()
            .as_ref()
            .ok_or_else(|| malformed(&"root is missing"))?;
        let rootfs = path.join(root.path());
        let rootfs =
            fs::canonicalize(&rootfs).map_err(Error::file("open the root file system", &rootfs))?;
        if !rootfs.is_dir() {
            return Err(Error::State(format!(
                "the root file system {} is not a directory",
                rootfs.display()
            )));
        }
        let process = spec
            .process()
            .as_ref()
            .ok_or_else(|| malformed(&"process is missing"))?;
        if process.args().as_ref().is_none_or(Vec::is_empty) {
            return Err(malformed(&"process.args is empty"));
        }
        if !process.cwd().is_absolute() {
            return Err(malformed(&format!(
                "process.cwd \"{}\" is not absolute",
                process.cwd().display()
            )));
        }
        let linux = spec.linux().as_ref();
        let own_network = linux
            .and_then(|linux| linux.namespaces().as_ref())
            .into_iter()
            .flatten()
            .any(|one| one.typ() == LinuxNamespaceType::Network && one.path().is_none());
        let cgroups_path = linux
            .and_then(|linux| linux.cgroups_path().as_ref())
            .map(|path| path.display().to_string())
            .filter(|path| !path.is_empty());
        let clip = |number: u64| u16::try_from(number).unwrap_or(u16::MAX);
        Ok(Self {
            rootfs,
            terminal: process.terminal().unwrap_or(false),
            console_size: process
                .console_size()
                .map(|size| (clip(size.height()), clip(size.width()))),
            own_network,
            cgroups_path,
            hooks: Hooks::of(&spec)?,
            annotations: spec
                .annotations()
                .clone()
                .unwrap_or_default()
                .into_iter()
                .collect(),
            version: spec.version().clone(),
            path,
            document,
        })
    }

    /// The config.json for the shim: paths that do not depend on the bundle's directory; hooks of
    /// the host taken out; the network namespace and the cgroup by their real paths.
    pub fn for_shim(&self, network: Option<&Path>, cgroup: Option<&Path>) -> Value {
        let mut document = self.document.clone();
        if let Some(root) = document.get_mut("root") {
            root["path"] = json!(self.rootfs);
        }
        for mount in array(&mut document, "/mounts") {
            let bind = mount["type"] == "bind"
                || mount["options"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .any(|option| option == "bind" || option == "rbind");
            if bind && let Some(source) = mount["source"].as_str() {
                // Relative to the bundle (OCI runtime-spec, "mounts").
                mount["source"] = json!(self.path.join(source));
            }
        }
        if let Some(network) = network {
            for namespace in array(&mut document, "/linux/namespaces") {
                if namespace["type"] == "network" {
                    namespace["path"] = json!(network);
                }
            }
        }
        if let Some(linux) = document.get_mut("linux").and_then(Value::as_object_mut) {
            match cgroup {
                // The shim makes the machine's cgroup beside this one, so within the container's.
                Some(cgroup) => {
                    linux.insert("cgroupsPath".to_owned(), json!(cgroup.join("microvm")))
                }
                None => linux.remove("cgroupsPath"),
            };
        }
        if let Some(hooks) = document.get_mut("hooks").and_then(Value::as_object_mut) {
            hooks.retain(|name, _| ["createContainer", "startContainer"].contains(&name.as_str()));
        }
        document
    }
}

fn array<'a>(document: &'a mut Value, pointer: &str) -> impl Iterator<Item = &'a mut Value> {
    document
        .pointer_mut(pointer)
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(config: &str) -> (tempfile::TempDir, Result<Bundle, Error>) {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("root")).unwrap();
        fs::write(directory.path().join("config.json"), config).unwrap();
        let bundle = Bundle::load(directory.path());
        (directory, bundle)
    }

    fn refusal(config: &str) -> String {
        match bundle(config).1 {
            Ok(_) => panic!("{config} was taken"),
            Err(error) => error.to_string(),
        }
    }

    const PROCESS: &str = r#""process":{"cwd":"/","args":["sh"],"user":{"uid":0,"gid":0},"terminal":true,"consoleSize":{"height":20,"width":70000}}"#;

    #[test]
    fn what_the_shim_gets() {
        let text = format!(
            r#"{{"ociVersion":"1.2.0","x-unknown":1,"root":{{"path":"root"}},{PROCESS},
            "mounts":[{{"destination":"/a","type":"bind","source":"sub"}},{{"destination":"/p","type":"proc","source":"proc"}}],
            "hooks":{{"prestart":[{{"path":"/bin/true"}}],"startContainer":[{{"path":"/in/guest"}}]}},
            "linux":{{"cgroupsPath":"machine.slice:libpod:x","namespaces":[{{"type":"network"}},{{"type":"pid"}}]}}}}"#
        );
        let (directory, bundle) = bundle(&text);
        let bundle = bundle.unwrap();
        let path = fs::canonicalize(directory.path()).unwrap();
        assert!(bundle.own_network && bundle.terminal);
        assert_eq!(bundle.console_size, Some((20, u16::MAX)));
        let out = bundle.for_shim(
            Some(Path::new("/proc/7/ns/net")),
            Some(Path::new("/machine.slice/libpod-x.scope")),
        );
        assert_eq!(out["x-unknown"], 1);
        assert_eq!(out["root"]["path"], json!(path.join("root")));
        assert_eq!(out["mounts"][0]["source"], json!(path.join("sub")));
        assert_eq!(out["mounts"][1]["source"], "proc");
        assert_eq!(out["linux"]["namespaces"][0]["path"], "/proc/7/ns/net");
        assert_eq!(out["linux"]["namespaces"][1], json!({ "type": "pid" }));
        assert_eq!(
            out["linux"]["cgroupsPath"],
            "/machine.slice/libpod-x.scope/microvm"
        );
        assert_eq!(
            out["hooks"],
            json!({ "startContainer": [{ "path": "/in/guest" }] })
        );
    }

    #[test]
    fn bad_ones_are_named() {
        assert!(refusal("{").contains("config.json"));
        assert!(refusal(r#"{"ociVersion":"1.2.0"}"#).contains("root is missing"));
        assert!(
            refusal(r#"{"ociVersion":"1.2.0","root":{"path":"root"}}"#)
                .contains("process is missing")
        );
        assert!(
            refusal(&format!(
                r#"{{"ociVersion":"1.2.0","root":{{"path":"nowhere"}},{PROCESS}}}"#
            ))
            .contains("nowhere")
        );
        let relative = PROCESS.replace(r#""cwd":"/""#, r#""cwd":"here""#);
        assert!(
            refusal(&format!(
                r#"{{"ociVersion":"1.2.0","root":{{"path":"root"}},{relative}}}"#
            ))
            .contains("not absolute")
        );
        assert!(
            Bundle::load(Path::new("/no/such/bundle"))
                .err()
                .unwrap()
                .to_string()
                .contains("/no/such/bundle")
        );
    }
}
