//! What programs rely on when they keep files on volumes: the programs themselves, the calls they
//! make, the kinds of mounts, and disks and servers that fail.
//!
//! The counts are smaller than people have them, since the machine under test may be emulated;
//! `make soak` has them as they are.

mod calls;
mod faults;
mod mounts;
mod programs;
mod published;

pub use faults::SmallDisk;

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use caisson_tests::{Host, Image, Layer};

const PYTHON: &str = "/usr/lib/python3.13";
const PACKAGES: [&str; 5] = ["encodings", "collections", "re", "importlib", "lib-dynload"];
const MODULES: [&str; 22] = [
    "os",
    "io",
    "abc",
    "codecs",
    "stat",
    "posixpath",
    "genericpath",
    "_collections_abc",
    "site",
    "_sitebuiltins",
    "struct",
    "types",
    "enum",
    "operator",
    "functools",
    "keyword",
    "reprlib",
    "copyreg",
    "linecache",
    "warnings",
    "_weakrefset",
    "weakref",
];

/// Programs of this machine beside busybox: git, GNU tar, sqlite3, python3.
pub fn tools(host: &Host) -> &'static str {
    const NAME: &str = "caisson.test/tools:1";
    static LOADED: OnceLock<()> = OnceLock::new();
    LOADED.get_or_init(|| {
        // ctypes is the one part of python with a library of its own.
        let native = format!("{PYTHON}/lib-dynload");
        let ctypes = below(&native, |name| name.starts_with("_ctypes."));
        let layer = Layer::new()
            .programs(&[
                "/usr/bin/git",
                "/usr/bin/tar",
                "/usr/bin/sqlite3",
                ctypes.to_str().unwrap(),
            ])
            .symlink("usr/bin/git-upload-pack", "git")
            .dir("usr/lib/git-core", 0o755)
            .symlink("usr/lib/git-core/git", "../../bin/git")
            .dir("usr/share/git-core/templates", 0o755);
        let layer = python(layer, &["ctypes"], &[]);
        host.load(&Image::busybox(NAME).layer(layer).uncompressed());
    });
    NAME
}

/// Adds python3 with what most scripts import, and more packages and modules of its library.
pub fn python(layer: Layer, packages: &[&str], modules: &[&str]) -> Layer {
    let of_python = |path: &Path| {
        let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
        // Sources and what they were compiled to; of the native modules those that scripts here
        // import.
        name.ends_with(".pyc")
            || name.ends_with(".py")
            || ["mmap.", "_struct.", "fcntl."]
                .iter()
                .any(|start| name.starts_with(start))
    };
    let layer = layer
        .programs(&["/usr/bin/python3.13"])
        .symlink("usr/bin/python3", "python3.13")
        .dir(PYTHON.trim_start_matches('/'), 0o755);
    let layer = PACKAGES.iter().chain(packages).fold(layer, |layer, part| {
        layer.host(&format!("{PYTHON}/{part}"), &of_python)
    });
    let layer = layer.dir(&format!("{PYTHON}/__pycache__")[1..], 0o755);
    MODULES.iter().chain(modules).fold(layer, |layer, module| {
        layer
            .host(&format!("{PYTHON}/{module}.py"), &of_python)
            .host(
                &format!("{PYTHON}/__pycache__/{module}.cpython-313.pyc"),
                &of_python,
            )
    })
}

/// The one entry of `directory` whose name is `wanted`.
fn below(directory: &str, wanted: impl Fn(&str) -> bool) -> PathBuf {
    fs::read_dir(directory)
        .unwrap_or_else(|error| panic!("{directory}: {error}"))
        .map(|entry| entry.unwrap().path())
        .find(|path| wanted(path.file_name().unwrap().to_str().unwrap()))
        .unwrap_or_else(|| panic!("{directory}: not what was looked for"))
}

/// A directory for a volume in the scratch directory, and `-v`'s value for it on /data.
fn volume(host: &Host) -> (PathBuf, String) {
    let directory = host.scratch().join("volume");
    fs::create_dir(&directory).unwrap();
    let flag = format!("{}:/data", directory.display());
    (directory, flag)
}

/// Open descriptors of the one file server.
fn descriptors(host: &Host) -> usize {
    let servers = host.processes_of("caisson-fs");
    assert_eq!(servers.len(), 1, "one file server");
    fs::read_dir(format!("/proc/{}/fd", servers[0]))
        .unwrap()
        .count()
}

/// What the container's shim has said so far.
fn shim_log(host: &Host, name: &str) -> String {
    let inspected = host.inspect(name);
    let log = Path::new("/var/lib/caisson/containers")
        .join(inspected["Id"].as_str().unwrap())
        .join("bundle/log");
    fs::read_to_string(log).unwrap()
}
