//! Images that the other tests do not make, and the kernel's own reading of them.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use super::*;
use crate::tar::Segment;
use crate::testing::{NodeKind, fsck, read_image};

fn image(build: impl FnOnce(&mut ContentWriter<'_>, &mut Tree)) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut writer = ContentWriter::new(file.as_file(), tempfile::tempfile().unwrap());
    let mut tree = Tree::new(Attributes {
        mode: 0o755,
        ..Attributes::default()
    });
    build(&mut writer, &mut tree);
    writer.finish(&tree, Uuid::FromContent).unwrap();
    file
}

fn add(tree: &mut Tree, name: &str, kind: Kind) -> NodeId {
    let id = tree
        .add(
            Attributes {
                mode: 0o644,
                ..Attributes::default()
            },
            kind,
        )
        .unwrap();
    assert!(tree.link(Tree::ROOT, name.as_bytes(), id));
    id
}

#[test]
fn an_empty_image_is_two_blocks() {
    let file = image(|_, _| {});
    assert_eq!(file.as_file().metadata().unwrap().len(), 2 * 4096);
    fsck(file.path());
    assert_eq!(read_image(file.path()).len(), 1);
}

#[test]
fn the_uuid_is_that_of_the_content() {
    let one = |content: &'static [u8]| {
        let file = image(|writer, tree| {
            let content = writer
                .file(content.len() as u64, &mut &content[..])
                .unwrap();
            add(tree, "f", Kind::File(content));
        });
        let mut uuid = [0; 16];
        file.as_file().read_exact_at(&mut uuid, 1024 + 48).unwrap();
        uuid
    };
    assert_eq!(one(b"a"), one(b"a"));
    assert_ne!(one(b"a"), one(b"b"));
    // Version and variant.
    assert_eq!((one(b"a")[6] >> 4, one(b"a")[8] >> 6), (8, 2));
}

#[test]
fn nodes_that_nothing_leads_to_are_not_written() {
    let file = image(|_, tree| {
        let lost = add(tree, "name", Kind::Directory(Default::default()));
        let below = tree.add(Attributes::default(), Kind::Fifo).unwrap();
        tree.link(lost, b"below", below);
        add(tree, "name", Kind::Fifo);
    });
    let nodes = read_image(file.path());
    assert_eq!(nodes.len(), 2);
    assert_eq!(nodes[&b"name"[..]].kind, NodeKind::Other);
}

#[test]
fn data_that_ends_early_is_a_read_error() {
    let file = tempfile::tempfile().unwrap();
    let mut writer = ContentWriter::new(&file, tempfile::tempfile().unwrap());
    for size in [10, 5000, 5 << 20] {
        assert!(
            matches!(
                writer.file(size, &mut &b"short"[..]),
                Err(ErofsError::Read(_))
            ),
            "{size}"
        );
    }
}

#[test]
fn more_blocks_than_32_bits_count_are_refused() {
    let file = tempfile::tempfile().unwrap();
    let mut writer = ContentWriter::new(&file, tempfile::tempfile().unwrap());
    writer.next_block = u64::from(u32::MAX) - 3;
    let data = [1; 4 * 4096];
    assert!(matches!(
        writer.file(data.len() as u64, &mut &data[..]),
        Err(ErofsError::TooLarge)
    ));
}

/// Files of every length around the borders of blocks and chunks, with data and holes.
fn borders(writer: &mut ContentWriter<'_>, tree: &mut Tree) -> Vec<(String, Vec<u8>)> {
    let mut files = Vec::new();
    for size in [
        1,
        2047,
        2048,
        2049,
        4095,
        4096,
        4097,
        (1 << 20) - 1,
        1 << 20,
        (1 << 20) + 1,
        (3 << 20) + 4097,
    ] {
        for hole in [None, Some(0..size / 2), Some(size / 3..size)] {
            let name = format!("{size}-{hole:?}");
            let mut content: Vec<u8> = (0..size).map(|i| (i % 251) as u8 + 1).collect();
            let mut segments = vec![Segment {
                offset: 0,
                length: size as u64,
            }];
            let mut data = content.clone();
            if let Some(hole) = hole {
                content[hole.clone()].fill(0);
                data.drain(hole.clone());
                segments = vec![
                    Segment {
                        offset: 0,
                        length: hole.start as u64,
                    },
                    Segment {
                        offset: hole.end as u64,
                        length: (size - hole.end) as u64,
                    },
                ];
            }
            let stored = writer
                .sparse_file(size as u64, &segments, &mut &data[..])
                .unwrap();
            add(tree, &name, Kind::File(stored));
            files.push((name, content));
        }
    }
    files
}

#[test]
fn files_of_all_lengths_and_holes_arrive() {
    let mut files = Vec::new();
    let file = image(|writer, tree| files = borders(writer, tree));
    fsck(file.path());
    let nodes = read_image(file.path());
    for (name, content) in files {
        assert!(nodes[name.as_bytes()].content() == content, "{name}");
    }
}

#[test]
fn our_own_reader_finds_what_was_written() {
    let attributes = |mode: u32| {
        let mut xattrs = Xattrs::default();
        xattrs.insert(b"user.a", &[b'v'; 5000]).unwrap();
        xattrs.insert(b"system.posix_acl_default", b"acl").unwrap();
        let mtime = crate::tar::Timestamp {
            seconds: -5,
            nanoseconds: 999_999_999,
        };
        Attributes {
            mode,
            uid: 4_000_000_000,
            gid: 3,
            mtime,
            xattrs,
        }
    };
    let file = image(|_, tree| {
        *tree.attributes_mut(Tree::ROOT) = attributes(0o1755);
        for i in 0..2000 {
            let kind = if i % 2 == 0 {
                Kind::Directory(Default::default())
            } else {
                Kind::Fifo
            };
            let id = tree.add(attributes(i % 0o1000), kind).unwrap();
            tree.link(
                Tree::ROOT,
                format!("{}{i}", ["!", ".", "..", "z"][i as usize % 4]).as_bytes(),
                id,
            );
        }
    });
    let image = Image::open(file.as_file()).unwrap();
    assert_eq!(image.length(), file.as_file().metadata().unwrap().len());
    let root = image.root().unwrap();
    assert_eq!(root.attributes, attributes(0o1755));
    let mut found = std::collections::BTreeMap::new();
    image
        .entries(&root, &mut |name, entry| {
            assert!(found.insert(name.to_vec(), entry).is_none())
        })
        .unwrap();
    assert_eq!(found.len(), 2000);
    for i in 0..2000 {
        match found[format!("{}{i}", ["!", ".", "..", "z"][i as usize % 4]).as_bytes()] {
            DirectoryEntry::Directory(number) => {
                assert_eq!(
                    image.directory(number).unwrap().attributes,
                    attributes(i % 0o1000)
                );
            }
            DirectoryEntry::Other => assert_eq!(i % 2, 1),
        }
    }
}

#[test]
fn our_own_reader_survives_damage() {
    let file = image(|_, tree| {
        for i in 0..300 {
            add(
                tree,
                &format!("directory-{i}"),
                Kind::Directory(Default::default()),
            );
        }
    });
    let whole = std::fs::read(file.path()).unwrap();
    for (i, position) in (4096..whole.len()).step_by(7).enumerate() {
        let mut bytes = whole.clone();
        bytes[position] ^= [0xff, 0x01, 0x80][i % 3];
        let mut damaged = tempfile::tempfile().unwrap();
        std::io::Write::write_all(&mut damaged, &bytes).unwrap();
        let image = Image::open(&damaged).unwrap();
        let Ok(root) = image.root() else { continue };
        let mut numbers = Vec::new();
        let _ = image.entries(&root, &mut |_, entry| {
            if let DirectoryEntry::Directory(number) = entry {
                numbers.push(number);
            }
        });
        for number in numbers {
            let _ = image.directory(number);
        }
    }
    let mut superblock = whole.clone();
    superblock[1024 + 40] ^= 1;
    std::fs::write(file.path(), superblock).unwrap();
    assert!(Image::open(&std::fs::File::open(file.path()).unwrap()).is_err());
}

/// Mounted as long as it lives.
struct Mount(tempfile::TempDir);

impl Mount {
    fn new(image: &Path) -> Mount {
        let dir = tempfile::tempdir().unwrap();
        let status = Command::new("mount")
            .args(["-t", "erofs", "-o", "ro,loop"])
            .arg(image)
            .arg(dir.path())
            .status()
            .unwrap();
        assert!(
            status.success(),
            "cannot mount: this test needs root, loop devices and a kernel with EROFS"
        );
        Mount(dir)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
#[ignore = "needs root, loop devices and a kernel with EROFS; the end-to-end tests mount images in guests"]
fn the_kernel_reads_what_was_written() {
    let mut files = Vec::new();
    let file = image(|writer, tree| {
        files = borders(writer, tree);
        add(tree, "long-link", Kind::Symlink(vec![b'l'; 4095].into()));
        add(tree, "device", Kind::BlockDevice(259, 70_000));
        let many = add(tree, "many", Kind::Directory(Default::default()));
        for i in 0..5000 {
            let prefix = ["!", "-", ".x", "..x", "a"][i % 5];
            let id = tree.add(Attributes::default(), Kind::Fifo).unwrap();
            tree.link(many, format!("{prefix}{i}").as_bytes(), id);
        }
        let mut xattrs = Xattrs::default();
        xattrs.insert(b"user.long", &[b'v'; 60_000]).unwrap();
        xattrs.insert(b"trusted.overlay.opaque", b"y").unwrap();
        tree.attributes_mut(many).xattrs = xattrs;
        // A hole of which the table alone could not be held at 4 KiB a piece.
        let data = [b'd'; 100];
        let segments = [Segment {
            offset: (1 << 40) - 100,
            length: 100,
        }];
        let huge = writer
            .sparse_file(1 << 40, &segments, &mut &data[..])
            .unwrap();
        add(tree, "huge", Kind::File(huge));
    });
    let mount = Mount::new(file.path());
    let root = mount.0.path();
    for (name, content) in files {
        assert!(
            std::fs::read(root.join(&name)).unwrap() == content,
            "{name}"
        );
    }
    assert_eq!(
        std::fs::read_link(root.join("long-link"))
            .unwrap()
            .as_os_str()
            .len(),
        4095
    );
    let device = std::fs::symlink_metadata(root.join("device"))
        .unwrap()
        .rdev();
    assert_eq!(
        (rustix::fs::major(device), rustix::fs::minor(device)),
        (259, 70_000)
    );
    assert_eq!(std::fs::read_dir(root.join("many")).unwrap().count(), 5000);
    for i in 0..5000 {
        let prefix = ["!", "-", ".x", "..x", "a"][i % 5];
        std::fs::symlink_metadata(root.join("many").join(format!("{prefix}{i}"))).unwrap();
    }
    let mut value = vec![0; 65_536];
    let length =
        rustix::fs::getxattr(root.join("many"), "user.long", value.as_mut_slice()).unwrap();
    assert_eq!(value[..length], [b'v'; 60_000]);
    let length = rustix::fs::getxattr(
        root.join("many"),
        "trusted.overlay.opaque",
        value.as_mut_slice(),
    )
    .unwrap();
    assert_eq!(value[..length], *b"y");
    let huge = std::fs::File::open(root.join("huge")).unwrap();
    assert_eq!(huge.metadata().unwrap().len(), 1 << 40);
    let mut end = [0; 200];
    huge.read_exact_at(&mut end, (1 << 40) - 200).unwrap();
    assert_eq!(
        (&end[..100], &end[100..]),
        (&[0; 100][..], &[b'd'; 100][..])
    );
    assert!(file.as_file().metadata().unwrap().blocks() * 512 < 64 << 20);
}
