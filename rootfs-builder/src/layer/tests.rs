//! Layers to images and back.

use std::collections::BTreeMap;
use std::fs::File;

use proptest::prelude::*;

use super::*;
use crate::testing::{Item, Node, NodeKind, TarBuilder, fsck, read_image};

fn convert_with(tar: &[u8], limits: &Limits) -> Result<tempfile::NamedTempFile, LayerError> {
    let image = tempfile::NamedTempFile::new().unwrap();
    let spool = tempfile::tempfile().unwrap();
    convert(tar, image.as_file(), spool, &Digest::of(tar), limits)?;
    Ok(image)
}

fn layer(items: impl IntoIterator<Item = Item>) -> Result<BTreeMap<Vec<u8>, Node>, LayerError> {
    let image = convert_with(&TarBuilder::of(items), &Limits::default())?;
    fsck(image.path());
    Ok(read_image(image.path()))
}

fn entry_error(items: impl IntoIterator<Item = Item>) -> EntryError {
    match layer(items) {
        Err(LayerError::Entry { reason, .. }) => reason,
        other => panic!("expected an entry to be refused, got {other:?}"),
    }
}

fn paths(nodes: &BTreeMap<Vec<u8>, Node>) -> Vec<&str> {
    nodes
        .keys()
        .map(|path| std::str::from_utf8(path).unwrap())
        .collect()
}

#[test]
fn every_kind_of_entry_arrives() {
    let capability = [
        1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, b'\n',
    ];
    let nodes = layer([
        Item {
            mode: 0o1777,
            ..Item::dir("./")
        },
        Item::dir("bin/"),
        Item {
            mode: 0o4755,
            uid: 1000,
            gid: 4_000_000_000,
            ..Item::file("bin/su", "su")
        }
        .pax("SCHILY.xattr.security.capability", capability)
        .pax("mtime", "1234567890.987654321"),
        Item::hard_link("bin/sudo", "bin/su"),
        Item::symlink("bin/sh", "/does/not/exist"),
        Item {
            device: (1, 3),
            mode: 0o666,
            ..Item::new("dev/null", b'3')
        },
        Item {
            device: (259, 70_000),
            ..Item::new("dev/disk", b'4')
        },
        Item::new("dev/pipe", b'6'),
        Item::file("empty", ""),
        Item::file(format!("long/{}", "n".repeat(255)), "x"),
        Item::file("sizes/inline", [7; 2048]),
        Item::file("sizes/block", [8; 4096]),
        Item::file("sizes/odd", [9; 100_001]),
    ])
    .unwrap();
    let root = &nodes[&b""[..]];
    assert_eq!((root.mode, root.mtime), (0o1777, (1_700_000_000, 0)));
    let su = &nodes[&b"bin/su"[..]];
    assert_eq!(
        (su.mode, su.uid, su.gid, su.links),
        (0o4755, 1000, 4_000_000_000, 2)
    );
    assert_eq!(su.mtime, (1_234_567_890, 987_654_321));
    assert_eq!(su.xattrs[&b"security.capability"[..]], capability);
    assert_eq!(nodes[&b"bin/sudo"[..]].inode, su.inode);
    assert_eq!(
        nodes[&b"bin/sh"[..]].kind,
        NodeKind::Symlink(b"/does/not/exist".to_vec())
    );
    assert_eq!(nodes[&b"dev/null"[..]].kind, NodeKind::CharDevice(1, 3));
    assert_eq!(
        nodes[&b"dev/disk"[..]].kind,
        NodeKind::BlockDevice(259, 70_000)
    );
    assert_eq!(nodes[&b"dev/pipe"[..]].kind, NodeKind::Other);
    assert_eq!(nodes[&b"empty"[..]].content(), b"");
    assert_eq!(nodes[&b"sizes/inline"[..]].content(), [7; 2048]);
    assert_eq!(nodes[&b"sizes/block"[..]].content(), [8; 4096]);
    assert_eq!(nodes[&b"sizes/odd"[..]].content(), [9; 100_001]);
    // dev was implied: root's, 0755, time 0.
    let dev = &nodes[&b"dev"[..]];
    assert_eq!(
        (dev.mode, dev.uid, dev.mtime, dev.links),
        (0o755, 0, (0, 0), 2)
    );
    assert_eq!(nodes[&b""[..]].links, 2 + 4);
    assert!(nodes.contains_key(format!("long/{}", "n".repeat(255)).as_bytes()));
}

#[test]
fn whiteouts_become_those_of_overlayfs() {
    let nodes = layer([
        Item::file("a/.wh.gone", ""),
        Item::dir("b"),
        Item::file("b/.wh..wh..opq", ""),
        Item::file("b/new", ""),
        Item::file(".wh..wh.plnk/1.2", "aufs"),
        Item::file(".wh.c", ""),
    ])
    .unwrap();
    assert_eq!(paths(&nodes), ["", "a", "a/gone", "b", "b/new", "c"]);
    assert_eq!(nodes[&b"a/gone"[..]].kind, NodeKind::CharDevice(0, 0));
    assert_eq!(nodes[&b"c"[..]].kind, NodeKind::CharDevice(0, 0));
    assert_eq!(
        nodes[&b"b"[..]].xattrs[&b"trusted.overlay.opaque"[..]],
        b"y"
    );
    assert!(nodes[&b"a"[..]].xattrs.is_empty());
}

#[test]
fn an_entry_beats_a_whiteout_of_its_own_layer() {
    // In either order; a directory then hides what is below it.
    for flip in [false, true] {
        let mut items = vec![
            Item::file(".wh.file", ""),
            Item::file("file", "here"),
            Item::file(".wh.dir", ""),
            Item::dir("dir"),
            Item::file("dir/inner", "too"),
        ];
        if flip {
            items.reverse();
        }
        let nodes = layer(items).unwrap();
        assert_eq!(nodes[&b"file"[..]].content(), b"here");
        assert_eq!(
            nodes[&b"dir"[..]].xattrs[&b"trusted.overlay.opaque"[..]],
            b"y"
        );
        assert_eq!(nodes[&b"dir/inner"[..]].content(), b"too");
    }
}

#[test]
fn the_last_entry_of_a_path_wins() {
    let nodes = layer([
        Item::file("x", "old"),
        Item::file("x", "new"),
        Item::dir("d"),
        Item::file("d/kept", "k"),
        Item {
            mode: 0o700,
            ..Item::dir("d")
        },
        Item::dir("was-dir"),
        Item::file("was-dir/lost", "l"),
        Item::file("was-dir", "now a file"),
        Item::file("was-file", "f"),
        Item::dir("was-file"),
        Item::file("link-source", "s"),
        Item::hard_link("link", "link-source"),
        Item::file("link-source", "other"),
        Item::hard_link("link", "link"),
    ])
    .unwrap();
    assert_eq!(
        paths(&nodes),
        [
            "",
            "d",
            "d/kept",
            "link",
            "link-source",
            "was-dir",
            "was-file",
            "x"
        ]
    );
    assert_eq!(nodes[&b"x"[..]].content(), b"new");
    assert_eq!(nodes[&b"d"[..]].mode, 0o700);
    assert_eq!(nodes[&b"was-dir"[..]].content(), b"now a file");
    assert_eq!(nodes[&b"was-file"[..]].kind, NodeKind::Directory);
    assert_eq!(
        (nodes[&b"link"[..]].content(), nodes[&b"link"[..]].links),
        (&b"s"[..], 1)
    );
}

#[test]
fn parents_that_are_links_stay_within_the_layer() {
    let nodes = layer([
        Item::dir("usr/lib"),
        Item::symlink("lib", "usr/lib"),
        Item::file("lib/so", "so"),
        Item::symlink("out", "../../../../etc"),
        Item::file("out/passwd", "layer's own"),
        Item::symlink("abs", "/etc"),
        Item::file("abs/shadow", "layer's own"),
        Item::symlink("usr/dangling", "../made/here"),
        Item::file("usr/dangling/file", "f"),
        Item::hard_link("hard", "lib/so"),
        Item::hard_link("hard-abs", "/lib/so"),
    ])
    .unwrap();
    assert_eq!(nodes[&b"usr/lib/so"[..]].links, 3);
    assert_eq!(nodes[&b"etc/passwd"[..]].content(), b"layer's own");
    assert_eq!(nodes[&b"etc/shadow"[..]].content(), b"layer's own");
    assert_eq!(nodes[&b"made/here/file"[..]].content(), b"f");
    assert_eq!(
        nodes[&b"lib"[..]].kind,
        NodeKind::Symlink(b"usr/lib".to_vec())
    );
}

#[test]
fn hostile_entries_are_refused() {
    assert_eq!(
        entry_error([Item::file("../escape", "")]),
        EntryError::DotDot
    );
    assert_eq!(
        entry_error([Item::file("a/../../escape", "")]),
        EntryError::DotDot
    );
    assert_eq!(
        entry_error([Item::file("a", ""), Item::hard_link("b", "../a")]),
        EntryError::DotDot
    );
    assert!(matches!(
        entry_error([Item::hard_link("b", "/etc/passwd")]),
        EntryError::HardLinkMissing { .. }
    ));
    assert!(matches!(
        entry_error([Item::hard_link("b", "b")]),
        EntryError::HardLinkMissing { .. }
    ));
    assert!(matches!(
        entry_error([Item::hard_link("b", "")]),
        EntryError::HardLinkMissing { .. }
    ));
    assert!(matches!(
        entry_error([Item::file(".wh.w", ""), Item::hard_link("b", "w")]),
        EntryError::HardLinkMissing { .. }
    ));
    assert!(matches!(
        entry_error([Item::dir("d"), Item::hard_link("b", "d")]),
        EntryError::HardLinkToDirectory { .. }
    ));
    assert!(matches!(
        entry_error([Item::file("f", ""), Item::file("f/below", "")]),
        EntryError::ParentNotDirectory { .. }
    ));
    assert_eq!(
        entry_error([
            Item::symlink("a", "b"),
            Item::symlink("b", "a"),
            Item::file("a/x", "")
        ]),
        EntryError::LinkLoop
    );
    assert_eq!(
        entry_error([Item::symlink("l", "")]),
        EntryError::SymlinkTarget { length: 0 }
    );
    assert_eq!(entry_error([Item::file("", "")]), EntryError::NotRoot);
    assert_eq!(entry_error([Item::symlink("./", "x")]), EntryError::NotRoot);
    assert_eq!(
        entry_error([Item::file("a".repeat(256), "")]),
        EntryError::NameTooLong
    );
    assert_eq!(
        entry_error([Item::file(".wh..wh..opq", "")]),
        EntryError::OpaqueRoot
    );
    for whiteout in [".wh.", ".wh..", ".wh...", "d/.wh.", ".wh.d/file"] {
        assert_eq!(
            entry_error([Item::file(whiteout, "")]),
            EntryError::Whiteout,
            "{whiteout}"
        );
    }
    assert_eq!(
        entry_error([Item {
            device: (4096, 0),
            ..Item::new("dev", b'3')
        }]),
        EntryError::DeviceNumber {
            major: 4096,
            minor: 0
        }
    );
}

#[test]
fn limits_are_kept() {
    let check = |limits: Limits, items: Vec<Item>, what: &str| match convert_with(
        &TarBuilder::of(items),
        &limits,
    ) {
        Err(LayerError::Limit { what: found, .. }) => assert!(found.contains(what), "{found}"),
        Err(LayerError::Tar(TarError::Limit { what: found, .. })) => {
            assert!(found.contains(what), "{found}")
        }
        other => panic!("{what}: {other:?}"),
    };
    let limits = Limits::default;
    let many = (0..11)
        .map(|i| Item::file(format!("f{i}"), ""))
        .collect::<Vec<_>>();
    check(
        Limits {
            entries: 10,
            ..limits()
        },
        many.clone(),
        "entries",
    );
    check(
        Limits {
            metadata_bytes: 10,
            ..limits()
        },
        many,
        "names and attributes",
    );
    check(
        Limits {
            path_bytes: 9,
            ..limits()
        },
        vec![Item::file("0123456789", "")],
        "length of a path",
    );
    check(
        Limits {
            depth: 3,
            ..limits()
        },
        vec![Item::dir("a/b/c/d")],
        "depth",
    );
    let through_link = vec![Item::symlink("l", "a/b/c"), Item::file("l/d/e", "")];
    check(
        Limits {
            depth: 3,
            ..limits()
        },
        through_link,
        "depth",
    );
    check(
        Limits {
            file_bytes: 9,
            ..limits()
        },
        vec![Item::file("f", "0123456789")],
        "length of a file",
    );
    let attribute = Item::file("f", "").pax("SCHILY.xattr.user.a", [0; 100]);
    check(
        Limits {
            xattr_bytes: 99,
            ..limits()
        },
        vec![attribute.clone()],
        "extended attributes",
    );
    check(
        Limits {
            extended_header_bytes: 99,
            ..limits()
        },
        vec![attribute],
        "extended header",
    );
}

#[test]
fn overlay_attributes_and_unknown_kinds_are_left_out() {
    let nodes = layer([Item::dir("d")
        .pax("SCHILY.xattr.trusted.overlay.redirect", "/etc")
        .pax("SCHILY.xattr.trusted.overlay.opaque", "y")
        .pax("SCHILY.xattr.com.apple.quarantine", "q")
        .pax("SCHILY.xattr.user.kept", "k")])
    .unwrap();
    let xattrs = &nodes[&b"d"[..]].xattrs;
    assert_eq!(
        xattrs.keys().map(Vec::as_slice).collect::<Vec<_>>(),
        [b"user.kept"]
    );
}

#[test]
fn attributes_of_every_length_arrive() {
    let mut items = Vec::new();
    for length in [0, 1, 3, 4, 255, 3900, 4096, 30_000, 65_000] {
        let value = vec![length as u8; length];
        let item =
            Item::symlink(format!("link{length}"), "target").pax("SCHILY.xattr.user.v", &value);
        items.push(item);
        items.push(
            Item::file(format!("file{length}"), "content").pax("SCHILY.xattr.user.v", &value),
        );
        items.push(Item::dir(format!("dir{length}")).pax("SCHILY.xattr.user.v", &value));
    }
    let nodes = layer(items).unwrap();
    for length in [0, 1, 3, 4, 255, 3900, 4096, 30_000, 65_000] {
        for kind in ["link", "file", "dir"] {
            let node = &nodes[format!("{kind}{length}").as_bytes()];
            assert_eq!(node.xattrs[&b"user.v"[..]].len(), length);
        }
        assert_eq!(
            nodes[format!("file{length}").as_bytes()].content(),
            b"content"
        );
    }
}

#[test]
fn large_directories_are_sorted_for_the_kernels_search() {
    // Names on both sides of "." and "..".
    let names: Vec<String> = (0..3000)
        .map(|i| format!("d/{}{i}", ["!", "-", ".", "..", "a", "\u{fc}"][i % 6]))
        .collect();
    let nodes = layer(names.iter().map(|name| Item::file(name, name))).unwrap();
    assert_eq!(nodes.len(), 3002);
    for name in &names {
        assert_eq!(nodes[name.as_bytes()].content(), name.as_bytes());
    }
}

#[test]
fn holes_take_no_space() {
    const SIZE: u64 = 40 << 30;
    let sparse = Item::file("huge", [b'd'; 100])
        .pax("GNU.sparse.major", "0")
        .pax("GNU.sparse.minor", "1")
        .pax("GNU.sparse.realsize", SIZE.to_string())
        .pax("GNU.sparse.numblocks", "1")
        .pax("GNU.sparse.map", format!("{},100", SIZE - 100));
    let mut zeros = vec![0; 3 << 20];
    zeros[(2 << 20) + 5] = 1;
    let image = convert_with(
        &TarBuilder::of([
            sparse,
            Item::file("zeros", &zeros),
            Item::file("all-zero", vec![0; 50_000]),
        ]),
        &Limits::default(),
    )
    .unwrap();
    let nodes = read_image(image.path());
    assert_eq!(nodes[&b"huge"[..]].kind, NodeKind::File(None, SIZE));
    assert_eq!(nodes[&b"zeros"[..]].content(), zeros);
    assert_eq!(nodes[&b"all-zero"[..]].content(), vec![0; 50_000]);
    let allocated =
        std::os::unix::fs::MetadataExt::blocks(&image.as_file().metadata().unwrap()) * 512;
    assert!(allocated < 256 << 10, "{allocated} bytes on disk");
}

#[test]
fn truncation_anywhere_is_an_error() {
    let whole = TarBuilder::of([
        Item::file("a", [1; 700]),
        Item::dir("b"),
        Item::file("c", [2; 5000]),
    ]);
    let entries_end = whole.len() - 1024;
    for length in 0..entries_end {
        let at_entry = [0, 1536, 2048].contains(&length);
        let result = convert_with(&whole[..length], &Limits::default());
        assert_eq!(result.is_ok(), at_entry, "{length} of {entries_end} bytes");
    }
}

#[test]
fn the_same_layer_gives_the_same_image() {
    let tar = TarBuilder::of([
        Item::file("a/b", [5; 9000])
            .pax("SCHILY.xattr.user.z", "1")
            .pax("SCHILY.xattr.user.a", "2"),
        Item::hard_link("c", "a/b"),
        Item::symlink("d", "x".repeat(4000)),
    ]);
    let read = || std::fs::read(convert_with(&tar, &Limits::default()).unwrap().path()).unwrap();
    assert_eq!(read(), read());
}

#[test]
fn a_full_disk_is_a_write_error() {
    // /dev/full opened as the image answers ENOSPC to every write.
    let image = File::options()
        .read(true)
        .write(true)
        .open("/dev/full")
        .unwrap();
    let tar = TarBuilder::of([Item::file("a", [1; 9000])]);
    let result = convert(
        &tar[..],
        &image,
        tempfile::tempfile().unwrap(),
        &Digest::of(b""),
        &Limits::default(),
    );
    match result {
        Err(LayerError::Write(error)) => assert_eq!(error.kind(), io::ErrorKind::StorageFull),
        other => panic!("{other:?}"),
    }
}

/// What a random layer must look like once it is an image.
#[derive(Debug, Clone)]
enum Made {
    File(Vec<u8>),
    Dir,
    Symlink(Vec<u8>),
}

fn made() -> impl Strategy<Value = Made> {
    let sizes = prop_oneof![
        0..20usize,
        2040..2060usize,
        4090..4100usize,
        8190..8200usize,
        60_000..70_000usize
    ];
    prop_oneof![
        4 => (sizes, any::<u8>()).prop_map(|(size, seed)| {
            // Blocks of zeros among others.
            Made::File((0..size).map(|i| if (i / 4096) % 2 == 1 { 0 } else { (i as u8).wrapping_mul(seed) }).collect())
        }),
        1 => Just(Made::Dir),
        1 => (1..4095usize).prop_map(|length| Made::Symlink(vec![b't'; length])),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn random_layers_round_trip(
        entries in prop::collection::btree_map("[a-c]{1,2}(/[a-z.-]{3,12}){1,3}", (made(), 0..0o10000u64, any::<(u16, u16)>(), 0..4_000_000_000u64), 1..60)
    ) {
        // The last of a path and anything below it in conflict is left out of the input.
        let mut tree: BTreeMap<Vec<u8>, (Made, u64, u16, u16, u64)> = BTreeMap::new();
        for (path, (made, mode, (uid, gid), mtime)) in entries {
            let blocked = (1..path.len()).filter(|&i| path.as_bytes()[i] == b'/').any(|i| {
                matches!(tree.get(&path.as_bytes()[..i]), Some((Made::File(_) | Made::Symlink(_), ..)))
            });
            // Whiteouts mean something else, and have tests of their own.
            let special = |part: &str| part == ".." || part.starts_with(".wh.");
            if !blocked && !path.split('/').any(special) {
                tree.insert(path.into_bytes(), (made, mode, uid, gid, mtime));
            }
        }
        let items = tree.iter().map(|(path, (made, mode, uid, gid, mtime))| {
            let item = match made {
                Made::File(data) => Item::file(path, data),
                Made::Dir => Item::dir(path),
                Made::Symlink(target) => Item::symlink(path, target),
            };
            Item { mode: *mode, uid: u64::from(*uid), gid: u64::from(*gid), mtime: *mtime, ..item }
        });
        let nodes = layer(items).unwrap();
        for (path, (made, mode, uid, gid, mtime)) in &tree {
            let node = &nodes[path];
            let attributes = (u64::from(node.mode), node.uid, node.gid, node.mtime);
            prop_assert_eq!(attributes, (*mode, u32::from(*uid), u32::from(*gid), (*mtime as i64, 0)));
            match made {
                Made::File(data) => prop_assert_eq!(node.content(), data),
                Made::Dir => prop_assert_eq!(&node.kind, &NodeKind::Directory),
                Made::Symlink(target) => prop_assert_eq!(&node.kind, &NodeKind::Symlink(target.clone())),
            }
        }
        // Nothing but what was put in and its parents.
        for path in nodes.keys() {
            let expected = tree.keys().any(|other| other == path || other.starts_with(&[path.as_slice(), b"/"].concat()));
            prop_assert!(expected || path.is_empty());
        }
    }

    #[test]
    fn rubbish_never_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
        // Valid checksums let the rubbish reach the fields.
        for block in bytes.as_chunks_mut::<512>().0 {
            if block[0] % 2 == 0 {
                crate::testing::seal(block);
            }
        }
        let limits = Limits { file_bytes: 1 << 20, ..Limits::default() };
        if let Ok(image) = convert_with(&bytes, &limits) {
            read_image(image.path());
        }
    }

    #[test]
    fn damaged_layers_never_panic(position in 0..6000usize, value in any::<u8>()) {
        let mut tar = TarBuilder::of([
            Item::file("a/b", [5; 900]).pax("SCHILY.xattr.user.z", "1").pax("mtime", "1.5"),
            Item::hard_link("c", "a/b"),
            Item::symlink("d", "x"),
            Item::file("s", [1; 512]).pax("GNU.sparse.map", "0,512").pax("GNU.sparse.size", "9999"),
        ]);
        let position = position % tar.len();
        tar[position] = value;
        if let Some(header) = tar.as_chunks_mut::<512>().0.get_mut(position / 512) {
            crate::testing::seal(header);
        }
        let _ = convert_with(&tar, &Limits { file_bytes: 1 << 20, ..Limits::default() });
    }
}
