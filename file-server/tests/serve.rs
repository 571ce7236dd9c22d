//! The server as the guest sees it: a small FUSE client on a vhost-user front
//! end talks to a real, jailed caisson-fs. Needs root, as the server does.

// Helpers outside of test functions; a failure is the test's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod client;

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use caisson_fs::{Error, FileServer, ReadOnly, Share};
use client::{Client, ROOT};

const DEADLINE: Duration = Duration::from_secs(20);
const READ_WRITE: Share = Share {
    recursive: true,
    read_only: ReadOnly::Nothing,
    set_id: false,
};

struct Fixture {
    server: FileServer,
    client: Client,
    directory: tempfile::TempDir,
}

impl Fixture {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Shares the directory, or a name within, and looks it up.
    fn share(&mut self, index: u32, name: &str, share: Share) -> u64 {
        self.server.share(index, &self.path(name), share).unwrap();
        self.client.lookup(ROOT, &index.to_string()).unwrap()
    }
}

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_caisson-fs"))
}

fn start() -> Fixture {
    assert!(
        rustix::process::geteuid().is_root(),
        "the file server needs root, and so do its tests"
    );
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let (server, stream) = FileServer::spawn(program(), Stdio::inherit(), DEADLINE).unwrap();
    Fixture {
        server,
        client: Client::connect(stream),
        directory,
    }
}

#[test]
fn a_directory_is_read_and_written_as_its_users() {
    let mut fixture = start();
    fs::write(fixture.path("greeting"), "hello").unwrap();
    let share = fixture.share(0, "", READ_WRITE);
    let client = &mut fixture.client;
    let file = client.lookup(share, "greeting").unwrap();
    assert_eq!(client.read(file).unwrap(), b"hello");

    client.act_as(1000, 1000);
    let new = client.create(share, "new", 0o640).unwrap();
    client.write(new, b"from the guest").unwrap();
    client.act_as(0, 0);
    let path = fixture.path("new");
    assert_eq!(fs::read(&path).unwrap(), b"from the guest");
    let status = fs::metadata(&path).unwrap();
    assert_eq!((status.uid(), status.gid()), (1000, 1000));
    assert_eq!(status.mode() & 0o7777, 0o640);
}

#[test]
fn a_single_file_is_shared() {
    let mut fixture = start();
    fs::write(fixture.path("hosts"), "127.0.0.1").unwrap();
    let file = fixture.share(7, "hosts", READ_WRITE);
    assert_eq!(fixture.client.read(file).unwrap(), b"127.0.0.1");
    let names = fixture.client.list(ROOT).unwrap();
    assert_eq!(names, ["7"]);
}

#[test]
fn read_only_shares_cannot_be_changed() {
    let mut fixture = start();
    fs::write(fixture.path("file"), "old").unwrap();
    let share = fixture.share(
        0,
        "",
        Share {
            read_only: ReadOnly::Tree,
            ..READ_WRITE
        },
    );
    let client = &mut fixture.client;
    assert_eq!(client.create(share, "new", 0o600).unwrap_err(), libc::EROFS);
    let file = client.lookup(share, "file").unwrap();
    assert_eq!(client.read(file).unwrap(), b"old");
    assert_eq!(client.open(file, libc::O_RDWR).unwrap_err(), libc::EROFS);
    assert_eq!(client.chmod(file, 0o777).unwrap_err(), libc::EROFS);
    assert_eq!(client.unlink(share, "file").unwrap_err(), libc::EROFS);
    assert_eq!(fs::read(fixture.path("file")).unwrap(), b"old");
    // Neither can the root that the shares lie in.
    let client = &mut fixture.client;
    assert_eq!(client.create(ROOT, "new", 0o600).unwrap_err(), libc::EROFS);
}

/// A copy of a mount, not the mount: the host's own goes when the host wants it to go.
#[test]
fn mounts_below_a_share_come_and_go() {
    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
    let mut fixture = start();
    let (point, elsewhere) = (fixture.path("point"), fixture.path("elsewhere"));
    fs::create_dir(&point).unwrap();
    fs::create_dir(&elsewhere).unwrap();
    symlink("elsewhere", fixture.path("link")).unwrap();
    let only_itself = Share {
        recursive: false,
        ..READ_WRITE
    };
    let share = fixture.share(0, "", only_itself);
    mount("x", &point, "tmpfs", MountFlags::empty(), None).unwrap();
    fs::write(point.join("new"), "x").unwrap();
    let root = fs::File::open(&point).unwrap();
    let add = |index, path| {
        let path = Path::new(path);
        fixture
            .server
            .mount_below(index, path, std::os::fd::AsFd::as_fd(&root), READ_WRITE)
    };
    for path in ["link", "nowhere", "../0/point", "/point"] {
        assert!(add(0, path).is_err(), "{path}");
    }
    assert!(matches!(add(7, "point"), Err(Error::Missing(7))));
    let added = add(0, "point").unwrap();
    drop(root);
    let inside = fixture.client.lookup(share, "point").unwrap();
    fixture.client.lookup(inside, "new").unwrap();
    unmount(&point, UnmountFlags::empty()).expect("the host's own is not busy");
    fixture.server.unmount_below(added).unwrap();
    let outside = fixture.client.lookup(share, "point").unwrap();
    assert_eq!(fixture.client.lookup(outside, "new"), Err(libc::ENOENT));
}

/// As mount(8) has it: `ro` is of one mount.
#[test]
fn what_is_mounted_below_a_read_only_share_can_be_written() {
    let mut fixture = start();
    let below = fixture.path("below");
    fs::create_dir(&below).unwrap();
    let tmpfs = rustix::mount::mount(
        "x",
        &below,
        "tmpfs",
        rustix::mount::MountFlags::empty(),
        None,
    );
    tmpfs.unwrap();
    let mut created = |index, read_only| {
        let share = Share {
            read_only,
            ..READ_WRITE
        };
        let share = fixture.share(index, "", share);
        let client = &mut fixture.client;
        let below = client.lookup(share, "below").unwrap();
        (
            client.create(share, "new", 0o600).err(),
            client.create(below, &format!("new{index}"), 0o600).err(),
        )
    };
    let mount = created(0, ReadOnly::Mount);
    let tree = created(1, ReadOnly::Tree);
    rustix::mount::unmount(&below, rustix::mount::UnmountFlags::DETACH).unwrap();
    assert_eq!(mount, (Some(libc::EROFS), None));
    assert_eq!(tree, (Some(libc::EROFS), Some(libc::EROFS)));
}

#[test]
fn the_guest_stays_within_its_shares() {
    let mut fixture = start();
    symlink("/etc", fixture.path("link")).unwrap();
    fs::create_dir(fixture.path("inner")).unwrap();
    let share = fixture.share(0, "inner", READ_WRITE);
    let whole = fixture.share(1, "", READ_WRITE);
    let client = &mut fixture.client;
    for name in ["../greeting", "/etc/passwd", "a/b"] {
        client.lookup(share, name).unwrap_err();
    }
    client.lookup(share, "..").unwrap_err();
    // A link is served as a link and not followed.
    let link = client.lookup(whole, "link").unwrap();
    assert!(client.list(link).is_err());
    assert!(client.lookup(link, "passwd").is_err());
    // Neither the server's /proc nor anything else is in its root.
    assert_eq!(client.list(ROOT).unwrap(), ["0", "1"]);
}

#[test]
fn set_id_programs_are_for_shares_that_allow_them() {
    let mut fixture = start();
    fs::create_dir(fixture.path("volume")).unwrap();
    fs::create_dir(fixture.path("root")).unwrap();
    let volume = fixture.share(0, "volume", READ_WRITE);
    let root = fixture.share(
        1,
        "root",
        Share {
            set_id: true,
            ..READ_WRITE
        },
    );
    let client = &mut fixture.client;
    assert_eq!(client.create(volume, "a", 0o4755).unwrap_err(), libc::EPERM);
    client.create(volume, "b", 0o755).unwrap();
    let file = client.lookup(volume, "b").unwrap();
    assert_eq!(client.chmod(file, 0o4755).unwrap_err(), libc::EPERM);
    assert_eq!(client.chmod(file, 0o2755).unwrap_err(), libc::EPERM);
    assert_eq!(
        client.set_xattr(file, "security.capability", &[0; 20]),
        Err(libc::EPERM)
    );
    client.set_xattr(file, "user.name", b"value").unwrap();
    let mode = |path: PathBuf| fs::metadata(path).unwrap().mode() & 0o7777;
    assert_eq!(mode(fixture.path("volume/b")), 0o755);
    assert!(!fixture.path("volume/a").exists());
    // A directory's group is inherited, which gives nobody rights.
    let client = &mut fixture.client;
    client.chmod(volume, 0o2775).unwrap();

    let program = client.create(root, "a", 0o4755).unwrap();
    assert_eq!(mode(fixture.path("root/a")), 0o4755);
    let client = &mut fixture.client;
    client.write(program, b"another program").unwrap();
    assert_eq!(mode(fixture.path("root/a")), 0o755);
    // Device nodes are for no share.
    let client = &mut fixture.client;
    for mode in [libc::S_IFCHR, libc::S_IFBLK] {
        let made = client.mknod(root, "device", mode | 0o666, 0x0103);
        assert_eq!(made.unwrap_err(), libc::EPERM);
    }
    client
        .mknod(root, "fifo", libc::S_IFIFO | 0o666, 0)
        .unwrap();
}

/// A path in the place of a name would lead past the rules of the share that it begins in.
#[test]
fn a_name_stays_in_its_directory() {
    let mut fixture = start();
    for name in ["volume", "volume/empty", "root"] {
        fs::create_dir(fixture.path(name)).unwrap();
    }
    fs::write(fixture.path("volume/file"), "x").unwrap();
    let volume = fixture.share(0, "volume", READ_WRITE);
    let root = fixture.share(
        1,
        "root",
        Share {
            set_id: true,
            ..READ_WRITE
        },
    );
    let client = &mut fixture.client;
    let file = client.lookup(volume, "file").unwrap();
    let program = libc::S_IFREG | 0o4755;
    for name in ["../0/evil", "../0/empty", "/0/evil", "evil/", "..", ".", ""] {
        let answers = [
            client.lookup(root, name).map(drop),
            client.mknod(root, name, program, 0).map(drop),
            client.create(root, name, 0o4755).map(drop),
            client.mkdir(root, name).map(drop),
            client.symlink(root, name, "target").map(drop),
            client.link(file, volume, name).map(drop),
            client.rename(volume, "file", name).map(drop),
            client.rename(volume, name, "new").map(drop),
            client.unlink(volume, name).map(drop),
            client.rmdir(volume, name).map(drop),
        ];
        assert_eq!(client.list(volume).unwrap(), ["empty", "file"], "{name:?}");
        assert_eq!(client.list(root).unwrap(), Vec::<String>::new(), "{name:?}");
        assert_eq!(answers, [Err(libc::EINVAL); 10], "{name:?}");
    }
    // Names that only look like it are names.
    client.mkdir(root, "..data").unwrap();
    client.symlink(root, "link", "../0/empty").unwrap();
    client.mknod(root, "...", program, 0).unwrap();
    client.link(file, volume, "again").unwrap();
    client.rename(volume, "again", ".hidden").unwrap();
    client.unlink(volume, ".hidden").unwrap();
    client.rmdir(volume, "empty").unwrap();
    assert_eq!(client.list(root).unwrap(), ["...", "..data", "link"]);
    assert_eq!(client.list(volume).unwrap(), ["file"]);
}

#[test]
fn shares_come_and_go_and_mount_nothing_on_the_host() {
    let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap();
    let before = mounts();
    let mut fixture = start();
    fs::write(fixture.path("file"), "x").unwrap();
    fixture.share(0, "", READ_WRITE);
    fixture.share(1, "file", READ_WRITE);
    let again = fixture.server.share(0, &fixture.path(""), READ_WRITE);
    assert!(matches!(again, Err(Error::Exists(0))));
    let absent = fixture.server.share(2, &fixture.path("absent"), READ_WRITE);
    let message = absent.unwrap_err().to_string();
    assert!(message.contains("absent"), "{message}");
    let device = fixture.server.share(2, Path::new("/dev/null"), READ_WRITE);
    assert!(device.unwrap_err().to_string().contains("/dev/null"));
    assert_eq!(fixture.client.list(ROOT).unwrap(), ["0", "1"]);
    fixture.server.unshare(0).unwrap();
    fixture.server.unshare(1).unwrap();
    assert!(matches!(fixture.server.unshare(1), Err(Error::Missing(1))));
    assert!(fixture.client.list(ROOT).unwrap().is_empty());
    assert_eq!(mounts(), before);
}

#[test]
fn the_server_is_jailed() {
    let fixture = start();
    let pid = fixture.server.pid();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace()
            .skip(1)
            .collect::<Vec<_>>()
            .join(" ")
    };
    // chown, dac_override, fowner, fsetid, setgid, setuid, setfcap.
    let expected = 1 | 1 << 1 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 7 | 1 << 31;
    for set in ["CapEff:", "CapPrm:", "CapBnd:"] {
        let held = u64::from_str_radix(&field(set), 16).unwrap();
        assert_eq!(held & !expected, 0, "{set} {held:x}");
    }
    assert_eq!(field("CapAmb:").trim_start_matches('0'), "");
    assert_eq!(field("NoNewPrivs:"), "1");
    assert_eq!(field("Seccomp:"), "2");
    // Its own pid namespace: it is process 1 there.
    assert!(field("NSpid:").ends_with(" 1"), "{}", field("NSpid:"));
    for namespace in ["mnt", "net", "ipc", "uts", "cgroup", "pid"] {
        let of = |who: &str| fs::read_link(format!("/proc/{who}/ns/{namespace}")).unwrap();
        assert_ne!(of("self"), of(&pid.to_string()), "{namespace}");
    }
}

#[test]
fn it_ends_with_the_vmm_and_with_the_parent() {
    let mut fixture = start();
    drop(fixture.client);
    let start = Instant::now();
    let status = loop {
        if let Some(status) = fixture.server.try_wait().unwrap() {
            break status;
        }
        assert!(start.elapsed() < DEADLINE, "it goes on without a VMM");
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(status.success(), "{status}");

    let (server, _stream) = FileServer::spawn(program(), Stdio::inherit(), DEADLINE).unwrap();
    let pid = server.pid();
    drop(server);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn a_program_that_does_not_get_ready_is_reported() {
    let spawn = |path: &str| {
        let deadline = Duration::from_millis(300);
        FileServer::spawn(Path::new(path), Stdio::null(), deadline)
            .map(drop)
            .unwrap_err()
            .to_string()
    };
    let absent = spawn("/nonexistent/caisson-fs");
    assert!(absent.contains("/nonexistent/caisson-fs"), "{absent}");
    let other = spawn("/bin/true");
    assert!(other.contains("did not get ready"), "{other}");
}
