//! Archives of all formats, and broken ones.

use std::io::Read;

use super::*;
use crate::testing::{Item, TarBuilder, seal};

fn bounds() -> Bounds {
    Bounds::from(&Limits::default())
}

/// All entries with their stored data.
fn read(tar: &[u8]) -> Result<Vec<(Entry, Vec<u8>)>, TarError> {
    let mut reader = Reader::new(Streamed(tar), bounds());
    let mut entries = Vec::new();
    while let Some(entry) = reader.next_entry()? {
        let mut data = Vec::new();
        let mut buffer = [0; 1000];
        loop {
            match reader.read(&mut buffer)? {
                0 => break,
                n => data.extend_from_slice(&buffer[..n]),
            }
        }
        entries.push((entry, data));
    }
    Ok(entries)
}

fn read_one(item: Item) -> Result<(Entry, Vec<u8>), TarError> {
    Ok(read(&TarBuilder::of([item]))?.remove(0))
}

/// A GNU long name or link before an entry.
fn gnu_long(kind: u8, text: &[u8]) -> Item {
    Item {
        data: [text, b"\0"].concat(),
        gnu_sparse: Some(Vec::new()),
        ..Item::new("././@LongLink", kind)
    }
}

#[test]
fn what_gnu_tar_writes_is_read_in_every_format() {
    // The real tool on real files, with a sparse one, a long name, links and an old time.
    let dir = tempfile::tempdir().unwrap();
    let long = format!("{}/{}", "d".repeat(120), "f".repeat(140));
    std::fs::create_dir(dir.path().join("d".repeat(120))).unwrap();
    std::fs::write(dir.path().join(&long), "long").unwrap();
    std::os::unix::fs::symlink("t".repeat(150), dir.path().join("link")).unwrap();
    std::fs::hard_link(dir.path().join(&long), dir.path().join("hard")).unwrap();
    let sparse = std::fs::File::create(dir.path().join("sparse")).unwrap();
    for block in 0..30u32 {
        std::os::unix::fs::FileExt::write_all_at(
            &sparse,
            &[block as u8 + 1; 4096],
            u64::from(block) << 20,
        )
        .unwrap();
    }
    sparse.set_len(1 << 30).unwrap();
    for format in [
        &["--format=gnu", "--sparse"][..],
        &["--format=pax", "--sparse", "--sparse-version=0.0"],
        &["--format=pax", "--sparse", "--sparse-version=0.1"],
        &["--format=pax", "--sparse", "--sparse-version=1.0"],
    ] {
        let output = std::process::Command::new("tar")
            .args(format)
            .args([
                "--sort=name",
                "--mtime=@1234567890.25",
                "--owner=:3000000",
                "--group=:7",
                "-cC",
            ])
            .arg(dir.path())
            .arg(".")
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{format:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let entries = read(&output.stdout).unwrap();
        let find = |path: &str| {
            entries
                .iter()
                .find(|(entry, _)| entry.path == path.as_bytes())
                .unwrap()
        };
        let (entry, data) = find("./sparse");
        assert_eq!(
            (entry.size, entry.uid, entry.gid),
            (1 << 30, 3_000_000, 7),
            "{format:?}"
        );
        assert_eq!(entry.mtime.seconds, 1_234_567_890);
        let segments = entry.sparse.as_ref().unwrap();
        assert_eq!(segments.len(), 30, "{format:?}");
        for (i, segment) in segments.iter().enumerate() {
            assert_eq!(
                *segment,
                Segment {
                    offset: (i as u64) << 20,
                    length: 4096
                }
            );
            assert!(
                data[i * 4096..][..4096]
                    .iter()
                    .all(|&byte| byte == i as u8 + 1)
            );
        }
        assert_eq!(data.len(), 30 * 4096);
        assert_eq!(find("./link").0.link, "t".repeat(150).as_bytes());
        let (first, second) = (find("./hard"), find(&format!("./{long}")));
        let kinds = [first.0.kind, second.0.kind];
        assert!(
            kinds.contains(&EntryKind::File) && kinds.contains(&EntryKind::HardLink),
            "{kinds:?}"
        );
    }
}

#[test]
fn pax_records_win_over_the_header() {
    let item = Item::file("short", "12345")
        .pax("path", "the/real/name")
        .pax("uid", "70000")
        .pax("mtime", "-0.5")
        .pax("comment", "ignored");
    let (entry, data) = read_one(item).unwrap();
    assert_eq!(
        (entry.path.as_slice(), entry.uid, data.as_slice()),
        (&b"the/real/name"[..], 70_000, &b"12345"[..])
    );
    assert_eq!(
        entry.mtime,
        Timestamp {
            seconds: -1,
            nanoseconds: 500_000_000
        }
    );
    // The size too: else what follows would be read at the wrong place (CVE-2025-62518).
    let mut builder = TarBuilder::new();
    builder.push(
        &Item {
            size: Some(0),
            ..Item::file("a", [b'x'; 512])
        }
        .pax("size", "512"),
    );
    builder.push(&Item::file("b", "b"));
    let entries = read(&builder.finish()).unwrap();
    assert_eq!(entries.len(), 2);
    assert_eq!(
        (
            entries[0].0.size,
            entries[0].1.len(),
            entries[1].0.path.as_slice()
        ),
        (512, 512, &b"b"[..])
    );
}

#[test]
fn gnu_names_and_ustar_prefixes() {
    let long = vec![b'n'; 300];
    let entries = read(&TarBuilder::of([
        gnu_long(b'L', &long),
        gnu_long(b'K', &long),
        Item::symlink("x", "y"),
    ]))
    .unwrap();
    assert_eq!((&entries[0].0.path, &entries[0].0.link), (&long, &long));
    let mut builder = TarBuilder::new();
    builder.push(&Item::file("name", ""));
    let mut tar = builder.finish();
    tar[345..351].copy_from_slice(b"prefix");
    seal((&mut tar[..512]).try_into().unwrap());
    assert_eq!(read(&tar).unwrap()[0].0.path, b"prefix/name");
    // Old archives mark directories by a slash only, and have no prefix.
    tar[257..265].fill(0);
    tar[156] = 0;
    tar[4] = b'/';
    seal((&mut tar[..512]).try_into().unwrap());
    let entry = &read(&tar).unwrap()[0].0;
    assert_eq!(
        (entry.path.as_slice(), entry.kind),
        (&b"name/"[..], EntryKind::Directory)
    );
}

#[test]
fn sizes_beyond_8_gib_are_base_256() {
    let mut builder = TarBuilder::new();
    builder.push(&Item {
        size: Some(9 << 30),
        ..Item::file("big", "")
    });
    let tar = builder.unfinished();
    let mut reader = Reader::new(Streamed(tar.as_slice().chain(std::io::repeat(1))), bounds());
    assert_eq!(reader.next_entry().unwrap().unwrap().size, 9 << 30);
}

#[test]
fn anything_but_a_file_has_no_data() {
    let mut builder = TarBuilder::new();
    builder.push(&Item {
        size: Some(512),
        ..Item::dir("d")
    });
    builder.push(&Item {
        size: Some(9999),
        ..Item::symlink("l", "t")
    });
    builder.push(&Item::file("f", "f"));
    let paths: Vec<_> = read(&builder.finish())
        .unwrap()
        .into_iter()
        .map(|(entry, _)| entry.path)
        .collect();
    assert_eq!(paths, [&b"d"[..], b"l", b"f"]);
}

#[test]
fn global_headers_are_passed_over() {
    let mut builder = TarBuilder::new();
    builder.push(&Item {
        data: b"16 path=evil/xx\n".to_vec(),
        ..Item::new("pax_global_header", b'g')
    });
    builder.push(&Item::file("f", "f"));
    assert_eq!(read(&builder.finish()).unwrap()[0].0.path, b"f");
}

#[test]
fn broken_headers_are_refused() {
    let refused = |item: Item| read_one(item).unwrap_err();
    assert!(matches!(
        refused(Item::new("x", b'V')),
        TarError::UnknownType { kind: 'V', .. }
    ));
    assert!(matches!(
        refused(Item::file("x", "").pax("path", "a\0b")),
        TarError::Header { .. }
    ));
    assert!(matches!(
        refused(Item {
            uid: u64::MAX >> 8,
            ..Item::file("x", "")
        }),
        TarError::Header { .. }
    ));
    assert!(matches!(
        refused(Item::file("x", "").pax("size", "18446744073709551615")),
        TarError::Header { .. }
    ));
    let mut wrong = TarBuilder::of([Item::file("x", "")]);
    wrong[0] = b'y';
    assert!(matches!(
        read(&wrong),
        Err(TarError::Checksum { offset: 0 })
    ));
    let mut builder = TarBuilder::new();
    builder.raw(&[0; 512]);
    builder.push(&Item::file("hidden", ""));
    assert!(matches!(
        read(&builder.finish()),
        Err(TarError::Header { .. })
    ));
    // An extended header and then nothing.
    let mut builder = TarBuilder::new();
    builder.push(&Item {
        data: b"9 path=a\n".to_vec(),
        ..Item::new("pax", b'x')
    });
    assert!(read(&builder.finish()).unwrap().is_empty());
}

#[test]
fn headers_larger_than_the_bounds_are_not_read() {
    let mut builder = TarBuilder::new();
    builder.push(&Item {
        size: Some(10 << 30),
        ..gnu_long(b'L', b"x")
    });
    assert!(matches!(
        read(&builder.finish()),
        Err(TarError::Limit { .. })
    ));
}

#[test]
fn impossible_sparse_maps_are_refused() {
    let sparse = |map: &str, size: &str| {
        read_one(
            Item::file("s", [1; 100])
                .pax("GNU.sparse.map", map)
                .pax("GNU.sparse.size", size),
        )
    };
    assert!(sparse("0,50,60,50", "110").is_ok());
    for (map, size) in [
        ("0,50,40,50", "110"),
        ("60,50,0,50", "110"),
        ("0,50,60,50", "109"),
        ("0,100,18446744073709551615,1", "110"),
        ("18446744073709551615,100", "110"),
        ("0,99", "110"),
        ("0,101", "110"),
        ("0,100", "9223372036854775808"),
    ] {
        assert!(
            matches!(sparse(map, size), Err(TarError::Header { .. })),
            "{map} of {size}"
        );
    }
    let v1 = |data: &[u8]| {
        read_one(
            Item::file("s", data)
                .pax("GNU.sparse.major", "1")
                .pax("GNU.sparse.minor", "0")
                .pax("GNU.sparse.name", "real")
                .pax("GNU.sparse.realsize", "1000"),
        )
    };
    let mut map = b"1\n900\n100\n".to_vec();
    map.resize(512, 0);
    map.extend([3; 100]);
    let (entry, data) = v1(&map).unwrap();
    assert_eq!(
        (entry.path.as_slice(), entry.size, data),
        (&b"real"[..], 1000, vec![3; 100])
    );
    assert!(v1(b"1\n").is_err());
    assert!(v1(&[b'9'; 600]).is_err());
    assert!(v1(&[b"99999999\n".as_slice(), &[0; 600]].concat()).is_err());
    assert!(matches!(
        read_one(
            Item::file("s", "")
                .pax("GNU.sparse.major", "2")
                .pax("GNU.sparse.minor", "0")
        ),
        Err(TarError::Header { .. })
    ));
    // The old format, its map going on in a block that is not there.
    let mut fields = vec![b'0'; 96];
    fields.resize(109, 0);
    fields[96] = 1;
    let mut builder = TarBuilder::new();
    builder.push(&Item {
        gnu_sparse: Some(fields),
        ..Item::new("s", b'S')
    });
    assert!(matches!(
        read(&builder.unfinished()),
        Err(TarError::Truncated { .. })
    ));
}
