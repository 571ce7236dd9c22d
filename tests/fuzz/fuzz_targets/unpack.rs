//! A hostile tar stream: whatever it says, nothing outside the destination changes.

#![no_main]

use std::{fs, os::unix::fs::symlink, path::Path};

use arbitrary::Arbitrary;
use caisson_archive::{Attributes, Destination, unpack};
use libfuzzer_sys::fuzz_target;
use tar::{EntryType, Header};

/// Parts of names, so that entries meet.
const PARTS: [&str; 8] = ["a", "b", "new", "link", "..", ".", "/", "outside/file"];

#[derive(Debug, Arbitrary)]
struct Name(Vec<u8>);

#[derive(Debug, Arbitrary)]
struct Entry {
    kind: u8,
    name: Name,
    link: Name,
    mode: u32,
    data: Vec<u8>,
    /// Said to be as long, whatever there is.
    size: Option<u64>,
}

#[derive(Debug, Arbitrary)]
struct Input {
    entries: Vec<Entry>,
    /// Without its end.
    cut: bool,
}

impl Name {
    /// At most a hundred bytes, as the header has.
    fn bytes(&self) -> Vec<u8> {
        let parts = self
            .0
            .iter()
            .map(|part| PARTS[usize::from(*part) % PARTS.len()]);
        let mut name = parts.collect::<Vec<_>>().join("/").into_bytes();
        name.truncate(100);
        name
    }
}

fn stream(input: &Input) -> Vec<u8> {
    let mut stream = Vec::new();
    for entry in &input.entries {
        let mut header = Header::new_ustar();
        let kinds = [
            b'0', b'1', b'2', b'3', b'4', b'5', b'6', b'g', b'x', b'L', b'K', b'S',
        ];
        header.set_entry_type(EntryType::new(kinds[usize::from(entry.kind) % kinds.len()]));
        header.set_mode(entry.mode);
        header.set_size(entry.size.unwrap_or(entry.data.len() as u64));
        let fields = header.as_old_mut();
        let (name, link) = (entry.name.bytes(), entry.link.bytes());
        fields.name[..name.len()].copy_from_slice(&name);
        fields.linkname[..link.len()].copy_from_slice(&link);
        header.set_cksum();
        stream.extend(header.as_bytes());
        stream.extend(&entry.data);
        stream.resize(stream.len().next_multiple_of(512), 0);
    }
    if !input.cut {
        stream.resize(stream.len() + 1024, 0);
    }
    stream
}

fn names(directory: &Path) -> Vec<std::ffi::OsString> {
    let entries = fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    names
}

/// Unpacks at `inside/at`, or else into `inside`.
fn attack(stream: &[u8], at: Option<&str>) {
    let ground = tempfile::tempdir().unwrap();
    let (outside, inside) = (ground.path().join("outside"), ground.path().join("inside"));
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), "untouched").unwrap();
    fs::create_dir(&inside).unwrap();
    // What a stream's names might follow.
    symlink("../outside", inside.join("a")).unwrap();
    symlink("../outside/file", inside.join("b")).unwrap();
    let destination = match at {
        Some(name) => Destination::Path(inside.join(name)),
        None => Destination::Directory(inside),
    };
    let attributes = Attributes {
        owners: false,
        set_id: false,
        devices: false,
    };
    let _ = unpack(stream, &destination, attributes);
    assert_eq!(names(&outside), ["file"]);
    assert_eq!(
        fs::read_to_string(outside.join("file")).unwrap(),
        "untouched"
    );
    assert_eq!(names(ground.path()), ["inside", "outside"]);
}

fuzz_target!(|input: Input| {
    let stream = stream(&input);
    attack(&stream, None);
    attack(&stream, Some("new"));
});
