//! The guest's root file system: the agent and the skeleton that it needs, nothing else.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::erofs::{Attributes, ContentWriter, ErofsError, Kind, NodeId, Tree, Uuid};

/// Directories of the image and their modes. Those that the agent mounts upon are empty.
const DIRECTORIES: [(&str, u32); 14] = [
    ("bin", 0o755),
    ("dev", 0o755),
    ("etc", 0o755),
    ("lib", 0o755),
    ("mnt", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("sbin", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("usr", 0o755),
    ("var", 0o755),
    ("var/lib", 0o755),
];

/// Small files of the image.
const FILES: [(&str, &str); 4] = [
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/sbin/nologin\nnobody:x:65534:65534:nobody:/:/sbin/nologin\n",
    ),
    ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
    (
        "etc/hosts",
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n",
    ),
    (
        "etc/nsswitch.conf",
        "passwd: files\ngroup: files\nhosts: files dns\n",
    ),
];

/// Symbolic links of the image. The root is read-only, so what changes lies under /run.
const LINKS: [(&str, &str); 5] = [
    ("sbin/init", "caisson-agent"),
    ("etc/resolv.conf", "/run/resolv.conf"),
    ("etc/mtab", "/proc/self/mounts"),
    ("var/run", "/run"),
    ("var/tmp", "/tmp"),
];

const AGENT: &str = "sbin/caisson-agent";

/// Why the guest image could not be made. No output is left behind.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestImageError {
    /// A system call failed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The agent is not what a guest can start.
    #[error("{} cannot be the guest's first program: {reason}", path.display())]
    Agent {
        /// The file given.
        path: PathBuf,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The image could not be written.
    #[error("cannot write {}: {source}", path.display())]
    Image {
        /// The output.
        path: PathBuf,
        /// Why.
        source: ErofsError,
    },
}

/// Writes the guest image with the program `agent` to `output`, replacing it in one step.
///
/// The same agent gives the same bytes: owners, times and order are fixed, the UUID comes from the content.
///
/// # Errors
/// [`GuestImageError`].
pub fn build(agent: &Path, output: &Path) -> Result<(), GuestImageError> {
    let on = |action, path: &Path| {
        let path = path.to_owned();
        move |source| GuestImageError::Io {
            action,
            path,
            source,
        }
    };
    let mut program = open_agent(agent)?;
    let directory = match output.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let image = tempfile::Builder::new()
        .prefix(".caisson-guest-image-")
        .tempfile_in(directory)
        .map_err(on("create a file in", directory))?;
    let spool = tempfile::tempfile_in(directory).map_err(on("create a file in", directory))?;
    write(&mut program, image.as_file(), spool).map_err(|source| GuestImageError::Image {
        path: output.to_owned(),
        source,
    })?;
    let permissions = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    image
        .as_file()
        .set_permissions(permissions)
        .map_err(on("change the mode of", output))?;
    image.as_file().sync_all().map_err(on("sync", output))?;
    image
        .persist(output)
        .map_err(|error| on("create", output)(error.error))?;
    Ok(())
}

/// Opens the agent and checks that it is a static x86-64 program: nothing in the image could load libraries for it.
fn open_agent(path: &Path) -> Result<File, GuestImageError> {
    let on = |source| GuestImageError::Io {
        action: "read",
        path: path.to_owned(),
        source,
    };
    let bad = |reason| GuestImageError::Agent {
        path: path.to_owned(),
        reason,
    };
    if !fs::metadata(path).map_err(on)?.is_file() {
        return Err(bad("it is not a regular file"));
    }
    let mut file = File::open(path).map_err(on)?;
    let mut start = Vec::new();
    (&mut file)
        .take(64 << 10)
        .read_to_end(&mut start)
        .map_err(on)?;
    check_elf(&start).map_err(bad)?;
    std::io::Seek::rewind(&mut file).map_err(on)?;
    Ok(file)
}

/// ELF-64 header and program headers (System V ABI, "Object Files"; AMD64 supplement).
fn check_elf(start: &[u8]) -> Result<(), &'static str> {
    const EM_X86_64: u64 = 62;
    const PT_INTERP: u64 = 3;
    const PROGRAM_HEADER: usize = 56;
    let field = |offset: usize, length: usize| {
        let bytes = start.get(offset..offset.checked_add(length)?)?;
        Some(
            bytes
                .iter()
                .rev()
                .fold(0u64, |value, &byte| value << 8 | u64::from(byte)),
        )
    };
    // Class 64-bit, little-endian.
    if !start.starts_with(b"\x7fELF\x02\x01") || field(18, 2) != Some(EM_X86_64) {
        return Err("it is not an x86-64 ELF program");
    }
    let headers = (field(32, 8), field(54, 2), field(56, 2));
    let (Some(offset), Some(size), Some(count)) = headers else {
        return Err("its ELF header is cut off");
    };
    for i in 0..count {
        let position = offset
            .checked_add(i * size)
            .and_then(|position| usize::try_from(position).ok());
        // The whole header must be there, of which the first field is its type.
        let header = position.filter(|&position| field(position, PROGRAM_HEADER).is_some());
        match header.and_then(|position| field(position, 4)) {
            Some(PT_INTERP) => return Err("it is linked dynamically"),
            Some(_) => {}
            None => return Err("its ELF program headers are cut off"),
        }
    }
    Ok(())
}

fn write(agent: &mut File, image: &File, spool: File) -> Result<(), ErofsError> {
    let mut writer = ContentWriter::new(image, spool);
    let mut tree = Tree::new(with_mode(0o755));
    for (path, mode) in DIRECTORIES {
        add(&mut tree, path, mode, Kind::Directory(Default::default()))?;
    }
    for (path, text) in FILES {
        let content = writer.file(text.len() as u64, &mut text.as_bytes())?;
        add(&mut tree, path, 0o644, Kind::File(content))?;
    }
    for (path, target) in LINKS {
        add(
            &mut tree,
            path,
            0o777,
            Kind::Symlink(target.as_bytes().into()),
        )?;
    }
    let size = agent.metadata().map_err(ErofsError::Read)?.len();
    let content = writer.file(size, agent)?;
    add(&mut tree, AGENT, 0o755, Kind::File(content))?;
    writer.finish(&tree, Uuid::FromContent).map(drop)
}

/// Adds a node whose parents are in the tree.
fn add(tree: &mut Tree, path: &str, mode: u32, kind: Kind) -> Result<NodeId, ErofsError> {
    let (parents, name) = path.rsplit_once('/').unwrap_or(("", path));
    let mut parent = Tree::ROOT;
    for component in parents.split('/').filter(|component| !component.is_empty()) {
        parent = tree
            .child(parent, component.as_bytes())
            .ok_or(ErofsError::TooLarge)?;
    }
    let node = tree
        .add(with_mode(mode), kind)
        .ok_or(ErofsError::TooLarge)?;
    tree.link(parent, name.as_bytes(), node);
    Ok(node)
}

fn with_mode(mode: u32) -> Attributes {
    Attributes {
        mode,
        ..Attributes::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{NodeKind, fsck, read_image};

    /// An ELF-64 file for x86-64 with program headers of these types.
    fn elf(headers: &[u32]) -> Vec<u8> {
        let mut file = vec![0; 64 + headers.len() * 56];
        file[..6].copy_from_slice(b"\x7fELF\x02\x01");
        file[18] = 62;
        file[32] = 64;
        file[54] = 56;
        file[56] = headers.len() as u8;
        for (i, kind) in headers.iter().enumerate() {
            file[64 + i * 56..][..4].copy_from_slice(&kind.to_le_bytes());
        }
        file.resize(9000, 0xcc);
        file
    }

    fn build_in(dir: &Path, agent: &[u8]) -> Result<PathBuf, GuestImageError> {
        fs::write(dir.join("agent"), agent).unwrap();
        build(&dir.join("agent"), &dir.join("image")).map(|()| dir.join("image"))
    }

    #[test]
    fn the_image_has_the_agent_and_its_skeleton() {
        let dir = tempfile::tempdir().unwrap();
        let agent = elf(&[1, 1]);
        let image = build_in(dir.path(), &agent).unwrap();
        fsck(&image);
        let nodes = read_image(&image);
        let program = &nodes[&b"sbin/caisson-agent"[..]];
        assert!(program.content() == agent && program.mode == 0o755);
        assert_eq!(
            nodes[&b"sbin/init"[..]].kind,
            NodeKind::Symlink(b"caisson-agent".to_vec())
        );
        for directory in ["proc", "sys", "dev", "run", "tmp", "mnt", "etc"] {
            assert_eq!(
                nodes[directory.as_bytes()].kind,
                NodeKind::Directory,
                "{directory}"
            );
        }
        assert!(
            nodes
                .values()
                .all(|node| (node.uid, node.gid, node.mtime) == (0, 0, (0, 0)))
        );
        assert!(
            nodes[&b"etc/passwd"[..]]
                .content()
                .starts_with(b"root:x:0:0:")
        );
    }

    #[test]
    fn the_same_agent_gives_the_same_bytes() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let first = fs::read(build_in(one.path(), &elf(&[1])).unwrap()).unwrap();
        assert!(first == fs::read(build_in(two.path(), &elf(&[1])).unwrap()).unwrap());
        // Over an older image too.
        let changed = fs::read(build_in(two.path(), &elf(&[1, 1])).unwrap()).unwrap();
        assert!(first != changed);
        assert!(first == fs::read(build_in(two.path(), &elf(&[1])).unwrap()).unwrap());
    }

    #[test]
    fn what_a_guest_cannot_start_is_refused_without_a_trace() {
        let mut cut = elf(&[1]);
        cut.truncate(80);
        let mut endless = elf(&[1]);
        endless[56..58].fill(0xff);
        let mut far = elf(&[1]);
        far[32..40].fill(0xff);
        for agent in [
            elf(&[1, 3]),
            b"#!/bin/sh\n".to_vec(),
            Vec::new(),
            b"\x7fELF\x02\x01".to_vec(),
            cut,
            endless,
            far,
        ] {
            let dir = tempfile::tempdir().unwrap();
            let error = build_in(dir.path(), &agent).unwrap_err();
            assert!(matches!(error, GuestImageError::Agent { .. }), "{error}");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        }
        let dir = tempfile::tempdir().unwrap();
        let missing = build(&dir.path().join("none"), &dir.path().join("image"));
        assert!(matches!(missing, Err(GuestImageError::Io { .. })));
        fs::write(dir.path().join("agent"), elf(&[1])).unwrap();
        let nowhere = build(
            &dir.path().join("agent"),
            &dir.path().join("no/such/directory/image"),
        );
        assert!(matches!(nowhere, Err(GuestImageError::Io { .. })));
    }
}
