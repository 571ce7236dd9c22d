//! Volumes of the command line: `volume`, `-v NAME:…`, `--mount`.

use caisson_tests::{Host, Image, Layer};
use serde_json::Value;

/// An image with a directory that is somebody's.
fn image(host: &Host) -> Image {
    let image = Image::busybox("caisson.test/volumes:1").layer(
        Layer::new()
            .owner(1000, 1001)
            .dir("data", 0o750)
            .file("data/from-image", 0o640, "image\n")
            .symlink("data/link", "from-image"),
    );
    host.load(&image);
    image
}

const IMAGE: &str = "caisson.test/volumes:1";

/// Runs a script in a container that goes with its end.
fn run(host: &Host, flags: &[&str], script: &str) -> String {
    let words = [&["run", "--rm"], flags, &[IMAGE, "sh", "-c", script]].concat();
    host.caisson(words).ok().stdout()
}

#[test]
fn a_volume_outlives_its_containers() {
    let host = Host::claim();
    image(&host);
    // Made by its first use, with what the image has there.
    let seen = run(
        &host,
        &["-v", "kept:/data"],
        "cat /data/link; stat -c '%u %g %a' /data /data/from-image; echo more >/data/more",
    );
    assert_eq!(seen, "image\n1000 1001 750\n1000 1001 640\n");
    // The next one finds it as it is, wherever it is mounted.
    let change = "cat /x/more /x/from-image; rm /x/from-image /x/link";
    assert_eq!(run(&host, &["-v", "kept:/x"], change), "more\nimage\n");
    // One that is new and read-only stays empty.
    let read_only = ["-v", "kept:/data:ro", "-v", "new:/new:ro"];
    assert_eq!(
        run(&host, &read_only, "ls /data /new"),
        "/data:\nmore\n\n/new:\n"
    );
    let written = host.caisson([
        "run",
        "--rm",
        "-v",
        "kept:/data:ro",
        IMAGE,
        "touch",
        "/data/x",
    ]);
    written.expect_error(&["Read-only file system"]);
    assert_eq!(
        run(
            &host,
            &["-v", "bare:/data:nocopy"],
            "ls -A /data; stat -c %a /data"
        ),
        "755\n"
    );

    // Two containers at a time, and nobody takes it from them.
    let id = host
        .caisson([
            "run",
            "-d",
            "--name",
            "user",
            "-v",
            "kept:/data",
            IMAGE,
            "sleep",
            "1000",
        ])
        .ok()
        .line();
    run(
        &host,
        &["--mount", "source=kept,target=/data"],
        "echo shared >/data/shared",
    );
    host.caisson(["exec", "user", "cat", "/data/shared"])
        .expect_stdout("shared\n");
    let mounts = &host.inspect(&id)["Mounts"][0];
    assert_eq!(
        (&mounts["Type"], &mounts["Name"]),
        (&"volume".into(), &"kept".into())
    );
    host.caisson(["volume", "rm", "kept"])
        .expect_error(&["kept", "in use by user"]);
    host.caisson(["volume", "prune", "-a", "-f"])
        .expect_in_stdout("bare");
    host.caisson(["rm", "-f", "user"]).ok();

    let listed = host.caisson(["volume", "ls", "-q"]).ok().stdout();
    assert_eq!(listed, "kept\n");
    let known: Value = host.caisson(["volume", "inspect", "kept"]).ok().json();
    let place = known[0]["Mountpoint"].as_str().unwrap().to_owned();
    assert_eq!(
        std::fs::read_to_string(format!("{place}/shared")).unwrap(),
        "shared\n"
    );
    host.caisson(["volume", "rm", "kept"])
        .expect_stdout("kept\n");
    assert!(!std::path::Path::new(&place).exists());
    host.caisson(["volume", "rm", "kept"])
        .expect_error(&["no such volume: kept"]);
    host.caisson(["volume", "rm", "-f", "kept"]).ok();
    host.caisson(["rmi", IMAGE]).ok();
}

#[test]
fn volumes_without_a_name_go_with_their_container() {
    let host = Host::claim();
    image(&host);
    let count = || {
        let listed = host.caisson(["volume", "ls", "-q"]).ok().stdout();
        listed.lines().count()
    };
    assert_eq!(run(&host, &["-v", "/data"], "cat /data/link"), "image\n");
    assert_eq!(count(), 0, "with --rm");
    for (flags, left) in [(&["rm"][..], 1), (&["rm", "-v"], 1)] {
        host.caisson(["run", "--name", "one", "-v", "/data", IMAGE, "true"])
            .ok();
        host.caisson([flags, &["one"]].concat()).ok();
        assert_eq!(count(), left, "{flags:?}");
    }
    host.caisson(["volume", "prune", "-f"]).ok();
    assert_eq!(count(), 0);
    // One that was refused leaves none.
    host.caisson(["run", "--rm", "-v", "/data", IMAGE, "/not/there"])
        .expect_code(127);
    assert_eq!(count(), 0);
    host.caisson(["rmi", IMAGE]).ok();
}

#[test]
fn mounts_in_words() {
    let host = Host::claim();
    image(&host);
    let shared = host.scratch().join("shared");
    let bind = format!("type=bind,source={},target=/s,readonly", shared.display());
    // Not made, as -v would.
    host.caisson(["run", "--rm", "--mount", &bind, IMAGE, "true"])
        .expect_code(125)
        .expect_error(&["does not exist", "shared"]);
    std::fs::create_dir(&shared).unwrap();
    std::fs::write(shared.join("file"), "of the host\n").unwrap();
    let tmpfs = "type=tmpfs,target=/t,tmpfs-size=1m,tmpfs-mode=700";
    let seen = run(
        &host,
        &["--mount", &bind, "--mount", tmpfs],
        "cat /s/file; touch /s/x || stat -c %a /t; df -k /t | tail -1 | awk '{ print $2 }'",
    );
    assert_eq!(seen, "of the host\n700\n1024\n");
    for (flags, words) in [
        (
            &["--mount", "target=/a,size=3"][..],
            &["size", "not supported"][..],
        ),
        (
            &["-v", "ab:/x", "--tmpfs", "/x"],
            &["Duplicate mount point", "/x"],
        ),
        (&["-v", "x:/a"], &["x", "no name of a volume"]),
    ] {
        let words_of = [&["run", "--rm"], flags, &[IMAGE, "true"]].concat();
        host.caisson(words_of).expect_code(125).expect_error(words);
    }
    host.caisson(["rmi", IMAGE]).ok();
}
