use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use tar::{Builder, EntryType, Header};
use tempfile::TempDir;

use super::*;

const PLAIN: Attributes = Attributes {
    owners: false,
    set_id: false,
    devices: false,
};

fn copy(source: &Path, destination: &Path) -> Result<(), Error> {
    let mut stream = Vec::new();
    pack(source, false, &mut stream)?;
    let destination = Destination::Path(destination.to_owned());
    unpack(stream.as_slice(), &destination, PLAIN)
}

/// A directory "dir" with a file, a directory, links and a pipe.
fn tree() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join("dir").join(name);
    fs::create_dir_all(path("deep/er")).unwrap();
    fs::write(path("deep/er/file"), "text").unwrap();
    fs::write(path("set-id"), "x").unwrap();
    fs::set_permissions(path("set-id"), fs::Permissions::from_mode(0o6755)).unwrap();
    fs::set_permissions(path("deep"), fs::Permissions::from_mode(0o555)).unwrap();
    fs::hard_link(path("deep/er/file"), path("same")).unwrap();
    symlink("deep/er/file", path("link")).unwrap();
    symlink("/nowhere", path("dangling")).unwrap();
    // Longer than a tar header has room for.
    let long = "n".repeat(120);
    fs::write(path(&long), "long").unwrap();
    let old = File::open(path("deep")).unwrap();
    old.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000))
        .unwrap();
    directory
}

fn read(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap()
}

#[test]
fn a_tree_arrives_as_it_was() {
    let (from, to) = (tree(), tempfile::tempdir().unwrap());
    copy(&from.path().join("dir"), to.path()).unwrap();
    let at = |name: &str| to.path().join("dir").join(name);
    assert_eq!(read(at("deep/er/file")), "text");
    assert_eq!(read(at(&"n".repeat(120))), "long");
    assert_eq!(
        fs::read_link(at("dangling")).unwrap(),
        Path::new("/nowhere")
    );
    assert_eq!(
        fs::read_link(at("link")).unwrap(),
        Path::new("deep/er/file")
    );
    let inode = |name: &str| fs::metadata(at(name)).unwrap().ino();
    assert_eq!(inode("same"), inode("deep/er/file"));
    let deep = fs::metadata(at("deep")).unwrap();
    assert_eq!((deep.mode() & 0o7777, deep.mtime()), (0o555, 1_000_000_000));
    let set_id = fs::metadata(at("set-id")).unwrap();
    assert_eq!(
        set_id.mode() & 0o7777,
        0o755,
        "set-id bits come only when asked for"
    );
}

#[test]
fn the_destination_means_what_it_means_to_cp() {
    let (from, to) = (tree(), tempfile::tempdir().unwrap());
    let source = |name: &str| from.path().join("dir").join(name);
    let target = |name: &str| to.path().join(name);
    // A file: under a new name, into a directory, over a file, through a link.
    copy(&source("deep/er/file"), &target("new")).unwrap();
    assert_eq!(read(target("new")), "text");
    fs::create_dir(target("in")).unwrap();
    copy(&source("deep/er/file"), &target("in")).unwrap();
    assert_eq!(read(target("in/file")), "text");
    copy(&source("set-id"), &target("new")).unwrap();
    assert_eq!(read(target("new")), "x");
    symlink("new", target("to-new")).unwrap();
    copy(&source("deep/er/file"), &target("to-new")).unwrap();
    assert_eq!(read(target("new")), "text");
    assert!(fs::symlink_metadata(target("to-new")).unwrap().is_symlink());
    // A directory: under a new name, its contents.
    copy(&source("deep"), &target("renamed")).unwrap();
    assert_eq!(read(target("renamed/er/file")), "text");
    copy(&source("deep/."), &target("in")).unwrap();
    assert_eq!(read(target("in/er/file")), "text");
    copy(&source("deep/."), &target("made")).unwrap();
    assert_eq!(read(target("made/er/file")), "text");
    // What does not fit.
    let fails = |name: &str, destination: PathBuf, word: &str| {
        let text = copy(&source(name), &destination).unwrap_err().to_string();
        assert!(text.contains(word), "{text}");
    };
    fails("deep", target("new"), "over a file");
    fails("set-id", target("none/"), "no such directory");
    fails("set-id", target("none/file"), "no such directory");
    fails("set-id", target("new/"), "not a directory");
    fails("none", target("x"), "No such file");
    fs::create_dir_all(target("in/set-id")).unwrap();
    fails("set-id", target("in"), "over a directory");
}

fn header(kind: EntryType, name: &str, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(0o644);
    header.set_size(size);
    header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
    header
}

/// A stream with names that a well-meaning maker would not write.
fn stream(entries: &[(EntryType, &str, &str)]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (kind, name, text) in entries {
        let link = matches!(kind, EntryType::Symlink | EntryType::Link);
        let data = if link { "" } else { text };
        let mut header = header(*kind, name, data.len() as u64);
        if link {
            header.as_old_mut().linkname[..text.len()].copy_from_slice(text.as_bytes());
        }
        header.set_cksum();
        builder.append(&header, data.as_bytes()).unwrap();
    }
    builder.into_inner().unwrap()
}

#[test]
fn a_hostile_stream_does_not_leave_the_destination() {
    use EntryType::{Char, Directory, Link, Regular, Symlink};
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    let secret = outside.path().join("secret");
    let (place, secret) = (outside.path().to_str().unwrap(), secret.to_str().unwrap());
    let cases: [&[(EntryType, &str, &str)]; 9] = [
        &[(Directory, "a/", ""), (Regular, "a/../../escaped", "x")],
        &[(Directory, "a/", ""), (Regular, "/escaped", "x")],
        &[(Directory, "a/", ""), (Regular, "b/escaped", "x")],
        &[
            (Directory, "a/", ""),
            (Symlink, "a/out", place),
            (Regular, "a/out/escaped", "x"),
        ],
        &[
            (Directory, "a/", ""),
            (Symlink, "a/up", "../.."),
            (Directory, "a/up/escaped/", ""),
        ],
        &[(Directory, "a/", ""), (Link, "a/hard", secret)],
        &[(Directory, "a/", ""), (Link, "a/hard", "a/../../secret")],
        &[(Directory, "a/", ""), (Char, "a/device", "")],
        &[(Regular, "../a", "x")],
    ];
    for (number, entries) in cases.into_iter().enumerate() {
        let to = tempfile::tempdir_in(outside.path()).unwrap();
        let into = to.path().join("into");
        fs::create_dir(&into).unwrap();
        let destination = Destination::Path(into.clone());
        let failed = unpack(stream(entries).as_slice(), &destination, PLAIN);
        assert!(failed.is_err(), "case {number}");
        assert_eq!(fs::read_dir(to.path()).unwrap().count(), 1, "case {number}");
        let names: Vec<_> = fs::read_dir(outside.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .filter(|name| name == "escaped")
            .collect();
        assert!(names.is_empty(), "case {number}");
        assert_eq!(fs::metadata(secret).unwrap().nlink(), 1, "case {number}");
    }
    // A link that is replaced by a file is not written through.
    let to = tempfile::tempdir().unwrap();
    let entries = stream(&[
        (Directory, "a/", ""),
        (Symlink, "a/x", secret),
        (Regular, "a/x", "overwritten"),
    ]);
    let destination = Destination::Path(to.path().to_owned());
    unpack(entries.as_slice(), &destination, PLAIN).unwrap();
    assert_eq!(read(secret), "secret");
    assert_eq!(read(to.path().join("a/x")), "overwritten");
}

#[test]
fn a_stream_that_breaks_off_is_told() {
    let from = tree();
    let mut bytes = Vec::new();
    pack(&from.path().join("dir"), false, &mut bytes).unwrap();
    let to = tempfile::tempdir().unwrap();
    let destination = Destination::Directory(to.path().to_owned());
    for length in [0, 100, 512 * 3 + 2] {
        let failed = unpack(&bytes[..length], &destination, PLAIN);
        assert!(
            matches!(failed, Err(Error::Stream(_))),
            "{length}: {failed:?}"
        );
    }
    let text = unpack(&[b'x'; 2048][..], &destination, PLAIN).unwrap_err();
    assert!(text.to_string().starts_with("the archive: "), "{text}");
    let missing = Destination::Directory(to.path().join("none"));
    assert!(unpack(bytes.as_slice(), &missing, PLAIN).is_err());
}

#[test]
fn a_reader_that_has_gone_is_told() {
    struct Gone;
    impl Write for Gone {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let from = tree();
    let failed = pack(from.path(), false, Gone);
    assert!(matches!(failed, Err(Error::Output(_))), "{failed:?}");
}
