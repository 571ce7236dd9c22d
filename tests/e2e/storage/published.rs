//! Directories as kubelet publishes configMaps, secrets and tokens: `key -> ..data/key`,
//! `..data -> ..VERSION`.

use std::{fs, os::unix::fs::symlink, path::Path};

use caisson_tests::{Host, seconds, until};

use super::{shim_log, tools, volume};

/// Publishes the keys with the version as their contents; kubelet's order.
fn publish(directory: &Path, version: usize, keys: &[&str]) {
    let name = format!("..version_{version}");
    fs::create_dir_all(directory.join(&name)).unwrap();
    for key in keys {
        fs::write(directory.join(&name).join(key), format!("{version}\n")).unwrap();
    }
    symlink(&name, directory.join("..data_tmp")).unwrap();
    fs::rename(directory.join("..data_tmp"), directory.join("..data")).unwrap();
    for key in keys {
        if !directory.join(key).is_symlink() {
            symlink(format!("..data/{key}"), directory.join(key)).unwrap();
        }
    }
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_symlink() && !path.exists() {
            fs::remove_file(path).unwrap();
        }
    }
    if let Some(last) = version.checked_sub(1) {
        let _ = fs::remove_dir_all(directory.join(format!("..version_{last}")));
    }
}

/// Of the one shim.
fn inotify_instances(host: &Host) -> usize {
    let shims = host.processes_of("containerd-shim-caisson-v2");
    assert_eq!(shims.len(), 1, "one shim");
    fs::read_dir(format!("/proc/{}/fd", shims[0]))
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .filter(|target| target == Path::new("anon_inode:inotify"))
        .count()
}

/// A container that may only read it has a copy, which follows the host's: watches in the guest
/// see what they would see on the host, and no file server is needed.
#[test]
fn watches_see_a_swap() {
    let host = Host::claim();
    let (directory, flag) = volume(&host);
    publish(&directory, 1, &["key", "old"]);
    let script = include_str!("published.py");
    let read_only = format!("{flag}:ro");
    let second = host.scratch().join("second");
    publish(&second, 1, &["key"]);
    let second = format!("{}:/second:ro", second.display());
    let words = [
        "run",
        "--rm",
        "-v",
        &read_only,
        "-v",
        &second,
        tools(&host),
        "python3",
        "-c",
        script,
    ];
    let mut running = host.command(words).start();
    running.wait_for_stdout("watching 1");
    assert_eq!(host.processes_of("caisson-fs").len(), 0);
    assert_eq!(inotify_instances(&host), 1, "one for all volumes");
    publish(&directory, 2, &["key", "new"]);
    running.wait_for_stdout("watching 2");
    publish(&directory, 3, &["key", "new"]);
    let finished = running.finish().ok();
    let told = [
        "watching 1",
        "key: 2 of mode 644, and new",
        "watching 2",
        "key: 3 of mode 644, and new",
        "",
    ];
    finished.expect_stdout(&told.join("\n"));
}

/// Nothing of what the guest does to its copy reaches the host, or keeps the next version out.
#[test]
fn a_copy_is_the_guests_own() {
    let host = Host::claim();
    let (directory, flag) = volume(&host);
    publish(&directory, 1, &["key"]);
    let script =
        "mount -o remount,rw /data && echo bad >/data/..data/key && echo more >/data/more &&
        ln -sf /etc /data/..version_2 && echo ready &&
        until [ \"$(cat /data/key)\" = 3 ]; do sleep 0.1; done; ls /data";
    let read_only = format!("{flag}:ro");
    let words = [
        "run",
        "--rm",
        "--cap-add",
        "SYS_ADMIN",
        "-v",
        &read_only,
        host.busybox(),
        "sh",
        "-c",
        script,
    ];
    let mut running = host.command(words).start();
    running.wait_for_stdout("ready");
    assert_eq!(fs::read_to_string(directory.join("key")).unwrap(), "1\n");
    publish(&directory, 2, &["key"]);
    publish(&directory, 3, &["key"]);
    running.finish().expect_stdout("ready\nkey\n");
}

/// A version that cannot be copied (more than 3 MiB) is left out, and told, and the next one follows.
#[test]
fn a_version_that_is_too_large_is_left_out() {
    let host = Host::claim();
    let (directory, flag) = volume(&host);
    publish(&directory, 1, &["key"]);
    let script =
        "echo ready; until [ \"$(cat /data/key)\" != 1 ]; do sleep 0.1; done; cat /data/key";
    let read_only = format!("{flag}:ro");
    let words = ["run", "--name", "one", "-v", &read_only, host.busybox()];
    let words = words.into_iter().chain(["sh", "-c", script]);
    let mut running = host.command(words).start();
    running.wait_for_stdout("ready");
    fs::create_dir(directory.join("..version_2")).unwrap();
    fs::write(directory.join("..version_2/large"), vec![b'x'; 4 << 20]).unwrap();
    publish(&directory, 2, &["key"]);
    let told = until(seconds(10.0), || {
        let log = shim_log(&host, "one");
        log.contains("stays as it is for now").then_some(())
    });
    assert!(told.is_some(), "{}", shim_log(&host, "one"));
    publish(&directory, 3, &["key"]);
    running.finish().expect_stdout("ready\n3\n");
    host.caisson(["rm", "one"]).ok();
}

/// One that the container may write to is a share.
#[test]
fn a_directory_swapped_by_a_link_is_seen_at_once() {
    const VERSIONS: usize = 5;
    let host = Host::claim();
    let (directory, flag) = volume(&host);
    let keys = ["key", "other"];
    publish(&directory, 0, &keys);
    // Each round reads the version, so that the guest has it cached, and once more at once after
    // the host has said that there is another.
    let script = format!(
        "cd /data; for round in $(seq 1 {VERSIONS}); do
             ls -l >/dev/null; cat key other >/dev/null; : >/data/ready-$round
             until [ -e /data/go-$round ]; do :; done
             cat key other
         done"
    );
    let words = [
        "run",
        "--rm",
        "-v",
        &flag,
        host.busybox(),
        "sh",
        "-c",
        &script,
    ];
    let running = host.command(words).start();
    let mut expected = String::new();
    for version in 1..=VERSIONS {
        let ready = directory.join(format!("ready-{version}"));
        let seen = until(seconds(15.0), || ready.exists().then_some(()));
        assert!(seen.is_some(), "{}", running.finish());
        publish(&directory, version, &keys);
        fs::write(directory.join(format!("go-{version}")), "").unwrap();
        expected.push_str(&format!("{version}\n{version}\n"));
    }
    running.finish().expect_stdout(&expected);
}
