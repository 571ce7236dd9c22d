//! `caisson cp`.

use std::fs::{self, Permissions};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

use caisson_tests::{Command, Finished, Host};

use crate::storage::SmallDisk;

/// A container that runs until it is removed.
fn base(host: &Host, flags: &[&str]) {
    let words = ["run", "-d", "--name", "base"].iter().chain(flags);
    host.caisson(words.chain(&[host.busybox(), "sleep", "1000"]))
        .ok();
}

fn sh(host: &Host, script: &str) -> Finished {
    host.caisson(["exec", "base", "sh", "-c", script]).ok()
}

fn cp(host: &Host, words: &[&str]) -> Finished {
    host.caisson(["cp"].iter().chain(words))
}

/// A directory "tree" with a file of each kind, and its path.
fn tree(host: &Host) -> PathBuf {
    let path = host.scratch().join("tree");
    fs::create_dir_all(path.join("deep")).unwrap();
    fs::write(path.join("deep/file"), "text").unwrap();
    fs::set_permissions(path.join("deep/file"), Permissions::from_mode(0o640)).unwrap();
    chown(path.join("deep/file"), Some(1000), Some(1001)).unwrap();
    symlink("deep/file", path.join("link")).unwrap();
    // More than what fits into the pipes on the way.
    let big: Vec<u8> = (0..3_000_000_u32)
        .flat_map(|n| n.to_le_bytes()[..1].to_vec())
        .collect();
    fs::write(path.join("big"), big).unwrap();
    path
}

fn text(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

#[test]
fn trees_go_in_and_come_out() {
    let host = Host::claim();
    let tree = tree(&host);
    let from = tree.to_str().unwrap();
    base(&host, &["--tmpfs", "/volatile"]);
    cp(&host, &[from, "base:/root"]).ok().expect_stdout("");
    let told =
        "stat -c '%a %u:%g %s %N' /root/tree/deep/file /root/tree/link; md5sum </root/tree/big";
    let sum = Command::new(["md5sum", tree.join("big").to_str().unwrap()])
        .run()
        .ok()
        .stdout();
    let sum = sum.split(' ').next().unwrap().to_owned();
    let expected = format!(
        "640 0:0 4 /root/tree/deep/file\n777 0:0 9 '/root/tree/link' -> 'deep/file'\n{sum}  -\n"
    );
    let told = sh(&host, told)
        .stdout()
        .replace("'/root/tree/deep/file'", "/root/tree/deep/file");
    assert_eq!(told, expected);
    // Owners with -a; by the name of the destination; into what is mounted in the container.
    cp(
        &host,
        &["-a", &format!("{from}/deep/file"), "base:/volatile/new"],
    )
    .ok();
    sh(&host, "stat -c '%a %u:%g' /volatile/new; cat /volatile/new")
        .expect_stdout("640 1000:1001\ntext");

    let back = host.scratch().join("back");
    cp(&host, &["base:/root/tree", back.to_str().unwrap()]).ok();
    assert_eq!(text(&back.join("deep/file")), "text");
    assert_eq!(
        fs::metadata(back.join("deep/file")).unwrap().mode() & 0o7777,
        0o640
    );
    assert_eq!(
        fs::read_link(back.join("link")).unwrap(),
        Path::new("deep/file")
    );
    assert_eq!(
        fs::read(back.join("big")).unwrap(),
        fs::read(tree.join("big")).unwrap()
    );
    let file = host.scratch().join("file");
    cp(
        &host,
        &["-L", "base:root/tree/link", file.to_str().unwrap()],
    )
    .ok();
    assert_eq!(text(&file), "text");
    host.caisson(["rm", "-f", "base"]).ok();
}

#[test]
fn streams_are_tars() {
    let host = Host::claim();
    let tree = tree(&host);
    let tar = host.scratch().join("tree.tar");
    let tar = tar.to_str().unwrap();
    let parent = tree.parent().unwrap().to_str().unwrap();
    Command::new(["tar", "-C", parent, "-cf", tar, "tree"])
        .run()
        .ok();
    base(&host, &[]);
    let into = |target: &str| {
        host.command(["cp", "-", target])
            .stdin(fs::read(tar).unwrap())
            .run()
    };
    into("base:/root").ok();
    let stream = cp(&host, &["base:/root/tree/deep", "-"]).ok();
    let unpacked = host.scratch().join("unpacked");
    fs::create_dir(&unpacked).unwrap();
    Command::new(["tar", "-xf", "-", "-C", unpacked.to_str().unwrap()])
        .stdin(stream.stdout_bytes())
        .run()
        .ok();
    assert_eq!(text(&unpacked.join("deep/file")), "text");
    into("base:/none").expect_error(&["/none", "no such directory"]);
    let broken = host
        .command(["cp", "-", "base:/root"])
        .stdin("no tar at all".repeat(100))
        .run();
    broken.expect_error(&["archive"]).expect_code(1);
    host.caisson(["rm", "-f", "base"]).ok();
}

#[test]
fn what_cannot_be_copied_is_told() {
    let host = Host::claim();
    let tree = tree(&host);
    let from = tree.to_str().unwrap();
    base(&host, &["--read-only"]);
    let fails = |words: &[&str], said: &[&str], code: i32| {
        cp(&host, words).expect_error(said).expect_code(code);
    };
    fails(
        &["base:/none", "/tmp/x"],
        &["base:/none", "No such file"],
        1,
    );
    fails(
        &["base:/etc", &format!("{from}/deep/file")],
        &["over a file"],
        1,
    );
    fails(
        &[&format!("{from}/deep/file"), "base:/none/file"],
        &["/none", "no such directory"],
        1,
    );
    fails(
        &[from, "base:/root"],
        &["base:/root", "Read-only file system"],
        1,
    );
    fails(
        &[&format!("{from}/none"), "base:/root"],
        &["none", "No such file"],
        1,
    );
    fails(&["base:/etc", "base:/tmp"], &["between containers"], 125);
    fails(&[from, "/tmp"], &["CONTAINER:PATH"], 125);
    fails(&["nobody:/etc", "/tmp"], &["nobody"], 1);
    // A disk that is full here.
    let disk = SmallDisk::mount(&host, 4);
    let full = format!("{}/", disk.path().display());
    let mut hog = fs::File::create(disk.path().join("hog")).unwrap();
    while hog.write_all(&[0; 65536]).is_ok() {}
    drop(hog);
    fails(
        &["base:/bin/busybox", &format!("{full}two")],
        &["two", "No space left"],
        1,
    );
    drop(disk);
    // The container is as it was.
    sh(&host, "echo fine").expect_stdout("fine\n");
    host.caisson(["kill", "base"]).ok();
    host.wait_for_status("base", "exited");
    fails(&["base:/etc", "/tmp/x"], &["not running"], 1);
    host.caisson(["rm", "base"]).ok();
}
