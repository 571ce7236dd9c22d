//! The root file system with the programs of the workload, the same files for all contenders.

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use crate::{
    child::{find, quiet},
    error::BenchError,
};

/// Programs of this machine and the packages that have them.
const PROGRAMS: [(&str, &str); 5] = [
    ("bash", "bash"),
    ("fio", "fio"),
    ("git", "git"),
    ("iperf3", "iperf3"),
    ("jq", "jq"),
];

const APPLETS: [&str; 24] = [
    "awk", "cat", "cut", "dd", "echo", "find", "head", "ip", "ln", "mount", "printf", "rm", "sed",
    "seq", "sh", "sleep", "stat", "sync", "tail", "tar", "tr", "true", "uname", "wc",
];

/// Makes `directory/rootfs`.
///
/// # Errors
/// A program is not installed, or a file cannot be written.
pub fn make_rootfs(directory: &Path) -> Result<PathBuf, BenchError> {
    let root = directory.join("rootfs");
    let mut files = BTreeSet::new();
    for (name, package) in PROGRAMS {
        let program = find(name, package)?;
        files.extend(libraries(&program)?);
        files.insert(program);
    }
    let busybox = find("busybox", "busybox-static")?;
    let make = || -> std::io::Result<()> {
        for name in [
            "bin", "dev", "disk", "etc", "proc", "share", "sys", "tmp", "usr",
        ] {
            fs::create_dir_all(root.join(name))?;
        }
        for file in &files {
            // Where the loader and scripts look for it; links are followed.
            let target = root.join(file.strip_prefix("/").unwrap_or(file));
            if let Some(parent) = target.parent() {
                fs::create_dir_all(parent)?;
            }
            fs::copy(file, &target)?;
        }
        fs::copy(busybox, root.join("bin/busybox"))?;
        for applet in APPLETS {
            let link = root.join("bin").join(applet);
            if !link.exists() {
                symlink("busybox", link)?;
            }
        }
        for (name, text) in [
            ("workload", include_str!("workload")),
            ("init", include_str!("init")),
        ] {
            let path = root.join("bin").join(name);
            fs::write(&path, text)?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
        }
        // The scripts' first line.
        let bash = root.join("bin/bash");
        if !bash.exists() {
            symlink("/usr/bin/bash", bash)?;
        }
        fs::write(root.join("etc/passwd"), "root:x:0:0:root:/tmp:/bin/sh\n")
    };
    make().map_err(BenchError::io(format!(
        "cannot make a root file system in {}",
        root.display()
    )))?;
    Ok(root)
}

/// What ldd(1) names.
fn libraries(program: &Path) -> Result<Vec<PathBuf>, BenchError> {
    let output = Command::new("ldd")
        .arg(program)
        .output()
        .map_err(BenchError::io("cannot start ldd"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(PathBuf::from)
        .collect())
}

/// The same as an EROFS file, for a virtual machine to boot.
///
/// # Errors
/// mkfs.erofs is not installed or fails.
pub fn make_erofs(rootfs: &Path, image: &Path) -> Result<(), BenchError> {
    let mkfs = find("mkfs.erofs", "erofs-utils")?;
    quiet(Command::new(mkfs).arg("--quiet").arg(image).arg(rootfs))
}

/// Files of the archive that is unpacked on a shared directory.
const DIRECTORIES: usize = 10;
const FILES: usize = 30;

/// Writes that archive: 300 files of 4 KiB.
///
/// # Errors
/// The disk's.
pub fn make_tree(archive: &Path) -> Result<(), BenchError> {
    let make = || -> std::io::Result<()> {
        let mut builder = tar::Builder::new(fs::File::create(archive)?);
        let data: Vec<u8> = (0..4096_u32)
            .flat_map(|n| n.to_le_bytes())
            .take(4096)
            .collect();
        for directory in 0..DIRECTORIES {
            for file in 0..FILES {
                let mut header = tar::Header::new_gnu();
                header.set_size(data.len() as u64);
                header.set_mode(0o644);
                let name = format!("tree/{directory}/{file}");
                builder.append_data(&mut header, name, data.as_slice())?;
            }
        }
        builder.into_inner().map(drop)
    };
    make().map_err(BenchError::io(format!(
        "cannot write {}",
        archive.display()
    )))
}
