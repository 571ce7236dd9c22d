//! `caisson run -v`: host directories and files inside the container.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use caisson_tests::Host;

#[test]
fn a_directory_is_shared_both_ways() {
    let host = Host::claim();
    let shared = host.scratch().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("from-host"), "host\n").unwrap();
    let volume = format!("{}:/mnt/here", shared.display());
    host.sh(
        ["-v", &volume],
        "cat /mnt/here/from-host; echo guest >/mnt/here/from-guest; mkdir /mnt/here/d && mv /mnt/here/from-guest /mnt/here/d/",
    )
    .expect_stdout("host\n");
    assert_eq!(
        fs::read_to_string(shared.join("d/from-guest")).unwrap(),
        "guest\n"
    );
}

#[test]
fn a_read_only_volume_refuses_writes() {
    let host = Host::claim();
    let shared = host.scratch().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(shared.join("file"), "safe\n").unwrap();
    let volume = format!("{}:/data:ro", shared.display());
    host.sh(
        ["-v", &volume],
        "echo x >/data/file || echo refused; rm -f /data/file || echo refused; cat /data/file",
    )
    .expect_stdout("refused\nrefused\nsafe\n");
    // Not even a guest that may mount can write: the server itself refuses.
    host.sh(
        ["--cap-add", "SYS_ADMIN", "-v", &volume],
        "mount -o remount,rw /data; echo x >/data/file; cat /data/file",
    )
    .expect_stdout("safe\n");
    assert_eq!(fs::read_to_string(shared.join("file")).unwrap(), "safe\n");
}

#[test]
fn a_single_file_is_shared() {
    let host = Host::claim();
    let file = host.scratch().join("one.conf");
    fs::write(&file, "one\n").unwrap();
    fs::write(host.scratch().join("two.conf"), "two\n").unwrap();
    let volume = format!("{}:/etc/one.conf", file.display());
    host.sh(
        ["-v", &volume],
        "cat /etc/one.conf; echo more >>/etc/one.conf; ls /etc | grep -c two",
    )
    .expect_code(1)
    .expect_in_stdout("one\n0\n");
    assert_eq!(fs::read_to_string(&file).unwrap(), "one\nmore\n");
}

#[test]
fn several_volumes_keep_apart_and_nest() {
    let host = Host::claim();
    for name in ["a", "b"] {
        fs::create_dir(host.scratch().join(name)).unwrap();
        fs::write(host.scratch().join(name).join("name"), name).unwrap();
    }
    let a = format!("{}/a:/data", host.scratch().display());
    let b = format!("{}/b:/data/inner:ro", host.scratch().display());
    host.sh(["-v", &a, "-v", &b], "cat /data/name /data/inner/name")
        .expect_stdout("ab");
}

#[test]
fn a_link_made_inside_does_not_lead_out() {
    let host = Host::claim();
    let shared = host.scratch().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(host.scratch().join("secret"), "secret\n").unwrap();
    symlink("../secret", shared.join("by-host")).unwrap();
    let volume = format!("{}:/data", shared.display());
    let finished = host.sh(
        ["-v", &volume],
        "ln -s ../secret /data/by-guest; cat /data/by-host /data/by-guest /data/../secret",
    );
    assert!(!finished.stdout().contains("secret"), "{finished}");
}

#[test]
fn owners_and_modes_are_kept() {
    let host = Host::claim();
    let shared = host.scratch().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o777)).unwrap();
    let volume = format!("{}:/data", shared.display());
    host.sh(
        ["-v", &volume, "-u", "1000:1000"],
        "echo x >/data/mine; chmod 640 /data/mine; stat -c '%u %g %a' /data/mine",
    )
    .expect_stdout("1000 1000 640\n");
    let mode = fs::metadata(shared.join("mine"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o640);
    use std::os::unix::fs::MetadataExt;
    assert_eq!(fs::metadata(shared.join("mine")).unwrap().uid(), 1000);
}
