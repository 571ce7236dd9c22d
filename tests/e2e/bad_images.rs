//! Broken and hostile images, full disks and interrupted loads: refused, and nothing stays.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use caisson_tests::{Command, Finished, Host, Image, Layer, seconds, until};
use rustix::process::{Pid, Signal, kill_process};

const STORE: &str = "/var/lib/caisson/images";

/// All files of the store with their sizes.
fn store() -> Vec<(PathBuf, u64)> {
    fn walk(directory: &Path, found: &mut Vec<(PathBuf, u64)>) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let path = entry.path();
            match entry.metadata() {
                Ok(data) if data.is_dir() => walk(&path, found),
                Ok(data) if data.len() > 0 => found.push((path, data.len())),
                _ => {}
            }
        }
    }
    let mut found = Vec::new();
    walk(Path::new(STORE), &mut found);
    found.sort();
    found
}

/// Loads a layout that must be refused and leave the store as it was.
fn refused(host: &Host, layout: &Path) -> Finished {
    host.busybox();
    let before = store();
    let finished = host
        .caisson([OsStr::new("load"), OsStr::new("-i"), layout.as_os_str()])
        .expect_error(&[]);
    assert_eq!(store(), before, "the store has changed\n{finished}");
    let listed = host.caisson(["images"]).ok().stdout();
    assert!(!listed.contains("caisson.test/bad"), "{listed}");
    finished
}

fn bad(layer: Layer) -> Image {
    Image::new("caisson.test/bad:1").layer(layer)
}

/// Bytes that do not compress.
fn noise(length: u32) -> Vec<u8> {
    (0..length)
        .scan(1u32, |state, _| {
            // Marsaglia's xorshift.
            *state ^= *state << 13;
            *state ^= *state >> 17;
            *state ^= *state << 5;
            Some(*state as u8)
        })
        .collect()
}

#[test]
fn a_wrong_digest_is_refused() {
    let host = Host::claim();
    let layout = host.scratch().join("layout");
    bad(Layer::new().file("a", 0o644, "contents")).write_layout(&layout);
    let blobs = layout.join("blobs/sha256");
    let layer = fs::read_dir(&blobs)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| fs::read(path).unwrap().starts_with(&[0x1f, 0x8b]))
        .unwrap();
    let mut bytes = fs::read(&layer).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&layer, bytes).unwrap();
    refused(&host, &layout).expect_error(&["digest"]);
}

#[test]
fn a_missing_layer_is_refused() {
    let host = Host::claim();
    let layout = host.scratch().join("layout");
    bad(Layer::new().file("a", 0o644, "contents")).write_layout(&layout);
    for entry in fs::read_dir(layout.join("blobs/sha256")).unwrap() {
        let path = entry.unwrap().path();
        if fs::read(&path).unwrap().starts_with(&[0x1f, 0x8b]) {
            fs::remove_file(path).unwrap();
        }
    }
    refused(&host, &layout);
}

#[test]
fn names_that_lead_out_are_refused() {
    let host = Host::claim();
    for (n, layer) in [
        Layer::new().file("../outside", 0o644, "x"),
        Layer::new().file("a/../../outside", 0o644, "x"),
        Layer::new().hard_link("link", "../../etc/passwd"),
        Layer::new().hard_link("link", "nothing"),
    ]
    .into_iter()
    .enumerate()
    {
        let layout = host.scratch().join(n.to_string());
        bad(layer).write_layout(&layout);
        refused(&host, &layout);
    }
    assert!(!Path::new("/outside").exists());
}

#[test]
fn what_is_no_image_is_refused() {
    let host = Host::claim();
    let file = host.scratch().join("file");
    fs::write(&file, b"this is not an archive").unwrap();
    refused(&host, &file);
    fs::write(&file, []).unwrap();
    refused(&host, &file);
    let empty = host.scratch().join("empty");
    fs::create_dir(&empty).unwrap();
    refused(&host, &empty);
    refused(&host, Path::new("/no/such/file")).expect_error(&["/no/such/file"]);
}

#[test]
fn a_truncated_archive_is_refused() {
    let host = Host::claim();
    let file = host.scratch().join("archive");
    Image::busybox("caisson.test/bad:1").write_docker_archive(&file);
    let whole = fs::read(&file).unwrap();
    fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    refused(&host, &file);
}

#[test]
fn a_full_disk_is_told_and_nothing_is_left() {
    let host = Host::claim();
    let layout = host.scratch().join("layout");
    // 8 MiB on a disk of 4.
    bad(Layer::new().file("noise", 0o644, noise(8 << 20))).write_layout(&layout);
    // A small disk in the place of the state directory, seen by this command alone.
    let script = format!(
        "mkdir -p /var/lib/caisson && mount -t tmpfs -o size=4m tmpfs /var/lib/caisson &&
         '{caisson}' load -i '{layout}'; echo code $?; find /var/lib/caisson -type f -size +8; '{caisson}' images",
        caisson = host.program().display(),
        layout = layout.display(),
    );
    let finished = Command::new(["unshare", "-m", "sh", "-c", &script])
        .run()
        .ok();
    assert!(!finished.stdout().contains("code 0"), "{finished}");
    assert!(
        finished.stderr().to_lowercase().contains("no space"),
        "{finished}"
    );
    assert!(
        !finished.stdout().contains("/var/lib/caisson/"),
        "{finished}"
    );
    assert!(
        !finished.stdout().contains("caisson.test/bad"),
        "{finished}"
    );
}

#[test]
fn an_interrupted_load_leaves_nothing_and_can_be_repeated() {
    let host = Host::claim();
    host.busybox();
    let before = store();
    let file = host.scratch().join("archive");
    Image::new("caisson.test/interrupted:1")
        .layer(Layer::new().file("noise", 0o644, noise(8 << 20)))
        .write_docker_archive(&file);
    let archive = fs::read(&file).unwrap();
    for signal in [Signal::KILL, Signal::TERM, Signal::INT] {
        let mut load = std::process::Command::new(host.program())
            .arg("load")
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        // Half of it, and then nothing: it is in the middle, however fast it is.
        let mut pipe = load.stdin.take().unwrap();
        pipe.write_all(&archive[..archive.len() / 2]).unwrap();
        // What it has written has no name, but its directory has.
        let works = || fs::read_dir(Path::new(STORE).join("tmp")).unwrap().next();
        assert!(until(seconds(2.0), works).is_some());
        kill_process(Pid::from_child(&load), signal).unwrap();
        let ended = until(seconds(10.0), || load.try_wait().unwrap());
        let number = signal.as_raw();
        assert!(
            ended.is_some_and(
                |status| status.signal() == Some(number) || status.code() == Some(128 + number)
            ),
            "{signal:?}: {ended:?}"
        );
        // The next command cleans up after one that was killed.
        host.caisson(["images"]).ok();
        assert_eq!(store(), before, "after {signal:?}");
    }
    let load = [OsStr::new("load"), OsStr::new("-i"), file.as_os_str()];
    host.caisson(load).ok();
    host.caisson(["rmi", "caisson.test/interrupted:1"]).ok();
    assert_eq!(store(), before);
}

#[test]
fn the_same_image_can_be_loaded_by_many_at_once() {
    let host = Host::claim();
    let layout = host.scratch().join("layout");
    Image::busybox("caisson.test/many:1").write_layout(&layout);
    let running: Vec<_> = (0..4)
        .map(|_| {
            host.command([OsStr::new("load"), OsStr::new("-i"), layout.as_os_str()])
                .start()
        })
        .collect();
    for running in running {
        running.finish().ok();
    }
    host.caisson(["run", "--rm", "caisson.test/many:1", "echo", "whole"])
        .expect_stdout("whole\n");
    host.caisson(["rmi", "caisson.test/many:1"]).ok();
}

#[test]
fn rmi_of_an_unknown_image_is_refused() {
    let host = Host::claim();
    host.caisson(["rmi", "caisson.test/nothing:1"])
        .expect_error(&["no such image", "caisson.test/nothing:1"])
        .expect_code(1);
}
