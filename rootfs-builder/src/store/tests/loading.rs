//! From sources to images.

use super::*;

#[test]
fn a_layout_becomes_an_image_of_erofs_layers() {
    let bench = Bench::new();
    let mut layout = bench.layout("busybox");
    let layers = [
        file_layer("lower"),
        TarBuilder::of([Item::file(".wh.file", ""), Item::dir("d")]),
        file_layer("lower"),
    ];
    let image = layout.image(&layers);
    layout
        .index(image.clone(), Some("quay.io/me/busybox:1.36"))
        .index(image.clone(), Some("stable"));
    let loaded = bench.load(&layout.path).unwrap();
    assert_eq!(loaded.len(), 1);
    assert!(loaded[0].new);
    assert_eq!(
        loaded[0].references,
        [name("quay.io/me/busybox:1.36"), name("busybox:stable")]
    );
    assert_eq!(loaded[0].display_name(), "quay.io/me/busybox:1.36");

    let image = bench.store.get("busybox:stable").unwrap();
    assert_eq!(image.id, loaded[0].id);
    assert_eq!(Digest::of(&image.config_json), image.id);
    assert_eq!(
        image
            .config
            .config()
            .as_ref()
            .unwrap()
            .cmd()
            .as_ref()
            .unwrap(),
        &["/bin/sh"]
    );
    assert_eq!(image.layers.len(), 3);
    assert_eq!(image.layers[0], image.layers[2]);
    for (layer, tar) in image.layers.iter().zip(&layers) {
        assert_eq!(layer.diff_id, Digest::of(tar));
        assert_eq!(fs::metadata(&layer.path).unwrap().len(), layer.size);
        fsck(&layer.path);
    }
    assert_eq!(
        read_image(&image.layers[0].path)[&b"file"[..]].content(),
        b"lower"
    );
    assert_eq!(
        read_image(&image.layers[1].path)[&b"file"[..]].kind,
        NodeKind::CharDevice(0, 0)
    );
    let created = image
        .created
        .unwrap()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap();
    assert_eq!(created, Duration::from_millis(1_714_979_289_500));
    assert!(
        bench
            .store
            .get(&format!(
                "quay.io/me/busybox@{}",
                image.manifest_digest.unwrap()
            ))
            .is_ok()
    );
    assert!(
        bench
            .store
            .get(&format!("other@{}", image.manifest_digest.unwrap()))
            .is_err()
    );

    let images = bench.store.images().unwrap();
    assert_eq!(images.len(), 1);
    assert_eq!((images[0].layers, images[0].size), (3, image.size));
    assert_eq!(
        fs::read_dir(bench.store.temporary_dir()).unwrap().count(),
        0
    );
}

#[test]
fn loading_again_changes_nothing() {
    let bench = Bench::new();
    let id = bench.load_simple("a", "x");
    let before = bench.files();
    assert_eq!(bench.load_simple("a", "x"), id);
    assert_eq!(bench.files(), before);
    assert!(!bench.load(&bench.path("layout-x")).unwrap()[0].new);
}

#[test]
fn every_kind_of_archive_is_the_same_image() {
    let bench = Bench::new();
    let id = bench.load_simple("a", "x");
    let tar = tar_of_directory(&bench.path("layout-x"));
    let zstd = zstd::encode_all(&tar[..], 1).unwrap();
    for (file, bytes) in [
        ("a.tar", tar.clone()),
        ("a.tar.gz", gzip(&tar)),
        ("a.tar.zst", zstd),
    ] {
        fs::write(bench.path(file), bytes).unwrap();
        let fresh = Store::open(bench.path(&format!("store-{file}"))).unwrap();
        let loaded = fresh.load(Source::Path(&bench.path(file)), None).unwrap();
        assert_eq!((loaded[0].id, loaded[0].new), (id, true), "{file}");
        assert_eq!(loaded[0].references.len(), 1);
        assert_eq!(fresh.get(&id.to_string()).unwrap().layers.len(), 1);
    }
    let mut stream = &gzip(&tar)[..];
    let loaded = bench
        .store
        .load(
            Source::Stream {
                reader: &mut stream,
                name: "standard input",
            },
            None,
        )
        .unwrap();
    assert_eq!(loaded[0].id, id);
}

#[test]
fn docker_archives_are_loaded_with_their_tags() {
    let bench = Bench::new();
    let layers = [file_layer("one"), file_layer("two"), file_layer("one")];
    let archive = docker_archive(&["busybox:1", "example.com/x:y"], &layers);
    fs::write(bench.path("saved.tar"), archive).unwrap();
    let loaded = bench.load(&bench.path("saved.tar")).unwrap();
    assert_eq!(
        loaded[0].references,
        [name("busybox:1"), name("example.com/x:y")]
    );
    let image = bench.store.get("busybox:1").unwrap();
    let diff_ids: Vec<Digest> = image.layers.iter().map(|layer| layer.diff_id).collect();
    assert_eq!(diff_ids, layers.map(|tar| Digest::of(&tar)));
    assert_eq!(image.manifest_digest, None);
}

#[test]
fn a_name_given_replaces_those_of_the_source() {
    let bench = Bench::new();
    let mut layout = bench.layout("l");
    let image = layout.image(&[file_layer("x")]);
    layout.index(image, Some("was:1"));
    let loaded = bench
        .store
        .load(Source::Path(&layout.path), Some(&name("now:2")))
        .unwrap();
    assert_eq!(loaded[0].references, [name("now:2")]);
    assert!(matches!(
        bench.store.get("was:1"),
        Err(Error::NotFound { .. })
    ));
    let other = layout.image(&[file_layer("y")]);
    layout.index(other, None);
    let error = bench
        .store
        .load(Source::Path(&layout.path), Some(&name("now:3")))
        .unwrap_err();
    assert!(
        matches!(error, Error::AmbiguousSource { count: 2, .. }),
        "{error}"
    );
    let loaded = bench.load(&layout.path).unwrap();
    assert!(loaded[1].references.is_empty());
    assert_eq!(loaded[1].display_name(), loaded[1].id.to_string());
}

#[test]
fn of_several_platforms_ours_is_chosen() {
    let bench = Bench::new();
    let mut layout = bench.layout("l");
    let mut arm = layout.image_for("linux", "arm64", &[file_layer("arm")]);
    arm["platform"] = json!({"os": "linux", "architecture": "arm64"});
    let mut ours = layout.image(&[file_layer("ours")]);
    ours["platform"] = json!({"os": "linux", "architecture": "amd64"});
    let mut demanding = layout.image(&[file_layer("v3")]);
    demanding["platform"] = json!({"os": "linux", "architecture": "amd64", "variant": "v3"});
    let mut attestation = layout.blob("application/vnd.oci.image.manifest.v1+json", b"{}");
    attestation["platform"] = json!({"os": "unknown", "architecture": "unknown"});
    attestation["annotations"] = json!({"vnd.docker.reference.type": "attestation-manifest"});
    let index = |manifests: serde_json::Value| {
        json!({"schemaVersion": 2, "manifests": manifests}).to_string()
    };
    const INDEX: &str = "application/vnd.oci.image.index.v1+json";
    let inner = layout.blob(
        INDEX,
        index(json!([attestation, arm, demanding, ours])).as_bytes(),
    );
    let outer = layout.blob(INDEX, index(json!([inner])).as_bytes());
    layout.index(outer, Some("multi:1"));
    bench.load(&layout.path).unwrap();
    let image = bench.store.get("multi:1").unwrap();
    assert_eq!(image.layers[0].diff_id, Digest::of(&file_layer("ours")));

    let mut foreign = bench.layout("foreign");
    let mut arm = foreign.image_for("linux", "arm64", &[file_layer("arm")]);
    arm["platform"] = json!({"os": "linux", "architecture": "arm64"});
    foreign.index(arm, Some("arm:1"));
    match bench.refused(&foreign.path) {
        Error::WrongPlatform { found, .. } => assert_eq!(found, ["linux/arm64"]),
        error => panic!("{error}"),
    }
    let mut lying = bench.layout("lying");
    let windows = lying.image_for("windows", "amd64", &[file_layer("w")]);
    lying.index(windows, Some("w:1"));
    assert!(matches!(
        bench.refused(&lying.path),
        Error::WrongPlatform { .. }
    ));
}

#[test]
fn directories_keep_the_attributes_that_a_layer_does_not_mention() {
    let bench = Bench::new();
    let mut layout = bench.layout("l");
    let base = TarBuilder::of([
        Item {
            mode: 0o1777,
            ..Item::dir("tmp")
        },
        Item {
            mode: 0o750,
            uid: 7,
            ..Item::dir("srv")
        },
        Item {
            mode: 0o700,
            gid: 8,
            ..Item::dir("srv/data")
        }
        .pax("SCHILY.xattr.user.k", "v"),
        Item::dir("usr"),
        Item {
            mode: 0o700,
            ..Item::dir("gone")
        },
        Item {
            mode: 0o700,
            ..Item::dir("opaque")
        },
        Item {
            mode: 0o700,
            ..Item::dir("opaque/in")
        },
        Item {
            mode: 0o700,
            ..Item::dir("said")
        },
    ]);
    let upper = TarBuilder::of([
        Item::file("tmp/new", "n"),
        Item::file("srv/data/deep/new", "n"),
        Item::file("usr/new", "n"),
        Item::file("fresh/new", "n"),
        Item::file(".wh.gone", ""),
        Item::file("opaque/.wh..wh..opq", ""),
        Item::file("opaque/in/new", ""),
        Item {
            mode: 0o711,
            ..Item::dir("said")
        },
        Item::file("said/new", ""),
    ]);
    let top = TarBuilder::of([
        Item::file("gone/new", ""),
        Item::file("srv/again", ""),
        Item::file("said/more", ""),
    ]);
    let image = layout.image(&[base.clone(), upper, top]);
    layout.index(image, Some("app:1"));
    let plain = layout.image(&[base.clone(), TarBuilder::of([Item::file("usr/x", "")])]);
    layout.index(plain, Some("plain:1"));
    bench.load(&layout.path).unwrap();

    let image = bench.store.get("app:1").unwrap();
    assert_eq!(image.layers.len(), 4);
    let mended = &image.layers[3];
    fsck(&mended.path);
    assert_eq!(Digest::of(&fs::read(&mended.path).unwrap()), mended.diff_id);
    let nodes = read_image(&mended.path);
    let attributes: Vec<_> = nodes
        .iter()
        .map(|(path, node)| {
            (
                std::str::from_utf8(path).unwrap(),
                node.mode,
                node.uid,
                node.gid,
                node.xattrs.len(),
            )
        })
        .collect();
    assert_eq!(
        attributes,
        [
            ("", 0o755, 0, 0, 0),
            ("said", 0o711, 0, 0, 0),
            ("srv", 0o750, 7, 0, 0),
            ("srv/data", 0o700, 0, 8, 1),
            ("tmp", 0o1777, 0, 0, 0),
        ]
    );
    // Where nothing is hidden there is no such layer.
    assert_eq!(bench.store.get("plain:1").unwrap().layers.len(), 2);
    bench.store.remove("app:1", false).unwrap();
    assert!(!mended.path.exists());
    bench.load(&layout.path).unwrap();
    assert_eq!(bench.store.get("app:1").unwrap().layers, image.layers);
}

#[test]
fn names_that_are_none_leave_an_image_nameless() {
    let bench = Bench::new();
    let mut layout = bench.layout("l");
    for (i, name) in ["Not/A:Name", "a/b@sha256:1", "+", "v1+build"]
        .iter()
        .enumerate()
    {
        let image = layout.image(&[file_layer(&format!("{i}"))]);
        layout.index(image, Some(name));
    }
    let loaded = bench.load(&layout.path).unwrap();
    assert_eq!(loaded.len(), 4);
    assert!(loaded.iter().all(|image| image.references.is_empty()));
}
