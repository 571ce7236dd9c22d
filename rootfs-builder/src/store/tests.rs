//! The store as its users see it.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::json;
use tempfile::TempDir;

use super::*;
use crate::error::Error;
use crate::layer::{EntryError, LayerError};
use crate::testing::{
    Item, Layout, NodeKind, TarBuilder, config, docker_archive, fsck, gzip, read_image,
    tar_of_directory,
};

/// A store and a place for sources.
struct Bench {
    dir: TempDir,
    store: Store,
}

impl Bench {
    fn new() -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("store")).unwrap();
        Bench { dir, store }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn layout(&self, name: &str) -> Layout {
        Layout::new(&self.path(name))
    }

    fn load(&self, source: &Path) -> Result<Vec<LoadedImage>> {
        self.store.load(Source::Path(source), None)
    }

    /// An image of one file, loaded under `name`.
    fn load_simple(&self, name: &str, content: &str) -> Digest {
        let mut layout = self.layout(&format!("layout-{content}"));
        let image = layout.image(&[file_layer(content)]);
        layout.index(image, Some(&self::name(name).to_string()));
        self.load(&layout.path).unwrap()[0].id
    }

    /// Every file of the store but the lock and the version.
    fn files(&self) -> Vec<String> {
        let mut files = Vec::new();
        let mut pending = vec![self.store.root().to_owned()];
        while let Some(dir) = pending.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    pending.push(path.clone());
                }
                files.push(
                    path.strip_prefix(self.store.root())
                        .unwrap()
                        .to_str()
                        .unwrap()
                        .to_owned(),
                );
            }
        }
        files.retain(|file| {
            !["lock", "version", "layers", "images", "leases", "tmp"].contains(&file.as_str())
        });
        files.sort();
        files
    }

    /// Loads something that must be refused, and checks that nothing of it stays.
    fn refused(&self, source: &Path) -> Error {
        let before = self.files();
        let error = self.load(source).unwrap_err();
        assert_eq!(self.files(), before, "left behind after: {error}");
        error
    }
}

fn file_layer(content: &str) -> Vec<u8> {
    TarBuilder::of([Item::file("file", content)])
}

fn name(text: &str) -> Reference {
    text.parse().unwrap()
}

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
fn damaged_blobs_are_refused() {
    let bench = Bench::new();
    let tar = file_layer("content");
    let build = |dir: &str| {
        let mut layout = bench.layout(dir);
        let image = layout.image(std::slice::from_ref(&tar));
        layout.index(image.clone(), Some("a"));
        (layout, image)
    };
    let flip = |path: &Path| {
        let mut bytes = fs::read(path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(path, bytes).unwrap();
    };

    let (layout, _) = build("layer");
    let layer = Digest::of(&gzip(&tar));
    flip(&layout.blob_path(&layer));
    assert!(
        matches!(bench.refused(&layout.path), Error::DigestMismatch { expected, .. } if expected == layer)
    );

    let (layout, image) = build("manifest");
    let manifest = image["digest"].as_str().unwrap().parse().unwrap();
    flip(&layout.blob_path(&manifest));
    assert!(
        matches!(bench.refused(&layout.path), Error::DigestMismatch { expected, .. } if expected == manifest)
    );

    let (layout, _) = build("config");
    let config = Digest::of(
        config("linux", "amd64", &[Digest::of(&tar)])
            .to_string()
            .as_bytes(),
    );
    flip(&layout.blob_path(&config));
    assert!(
        matches!(bench.refused(&layout.path), Error::DigestMismatch { expected, .. } if expected == config)
    );

    let (layout, _) = build("cut");
    let bytes = fs::read(layout.blob_path(&layer)).unwrap();
    fs::write(layout.blob_path(&layer), &bytes[..bytes.len() - 1]).unwrap();
    assert!(matches!(
        bench.refused(&layout.path),
        Error::SizeMismatch { .. }
    ));

    let (layout, _) = build("missing");
    fs::remove_file(layout.blob_path(&layer)).unwrap();
    assert!(matches!(
        bench.refused(&layout.path),
        Error::MissingBlob { what: "layer", .. }
    ));
}

#[test]
fn an_image_that_contradicts_itself_is_refused() {
    let bench = Bench::new();
    const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
    let refuse = |dir: &str, make: &dyn Fn(&Layout) -> serde_json::Value| {
        let mut layout = bench.layout(dir);
        let image = make(&layout);
        layout.index(image, Some("a"));
        bench.refused(&layout.path)
    };
    let one = file_layer("one");
    let other = Digest::of(&file_layer("two"));
    let error = refuse("diff-id", &|layout| {
        layout.manifest(
            config("linux", "amd64", &[other]),
            vec![layout.blob(LAYER, &gzip(&one))],
        )
    });
    assert!(
        matches!(error, Error::DigestMismatch { expected, .. } if expected == other),
        "{error}"
    );
    let error = refuse("count", &|layout| {
        layout.manifest(config("linux", "amd64", &[other]), Vec::new())
    });
    assert!(matches!(error, Error::InvalidImage { .. }), "{error}");
    let error = refuse("type", &|layout| {
        let mut image = layout.image(&[]);
        image["mediaType"] = json!("application/x-surprise");
        image
    });
    assert!(matches!(error, Error::UnknownMediaType { .. }), "{error}");
    let error = refuse("layer-type", &|layout| {
        let layer = layout.blob("application/vnd.oci.image.layer.v1.tar+encrypted", b"x");
        layout.manifest(config("linux", "amd64", &[other]), vec![layer])
    });
    assert!(matches!(error, Error::UnknownMediaType { .. }), "{error}");
    for kind in [
        "oci.image.layer.nondistributable.v1.tar+gzip",
        "docker.image.rootfs.foreign.diff.tar.gzip",
    ] {
        let error = refuse(&kind[..6], &|layout| {
            let layer = layout.blob(&format!("application/vnd.{kind}"), b"x");
            layout.manifest(config("linux", "amd64", &[other]), vec![layer])
        });
        assert!(matches!(error, Error::ForeignLayer { .. }), "{error}");
    }
    let error = refuse("entry", &|layout| {
        layout.image(&[TarBuilder::of([Item::file("../escape", "")])])
    });
    let escape = |error: &Error| {
        matches!(
            error,
            Error::Layer {
                source: LayerError::Entry {
                    reason: EntryError::DotDot,
                    ..
                },
                ..
            }
        )
    };
    assert!(escape(&error), "{error}");
    assert!(!bench.path("escape").exists());
    let error = refuse("rubbish", &|layout| layout.image(&[vec![b'x'; 2048]]));
    assert!(
        matches!(
            error,
            Error::Layer {
                source: LayerError::Tar(_),
                ..
            }
        ),
        "{error}"
    );
    let error = refuse("json", &|layout| {
        layout.blob("application/vnd.oci.image.manifest.v1+json", b"[[[[")
    });
    assert!(matches!(error, Error::InvalidImage { .. }), "{error}");
    let error = refuse("sha512", &|_| {
        json!({"mediaType": "application/vnd.oci.image.manifest.v1+json", "size": 1,
               "digest": format!("sha512:{}", "0".repeat(128))})
    });
    assert!(matches!(error, Error::InvalidDigest(_)), "{error}");
}

#[test]
fn what_is_no_image_is_refused() {
    let bench = Bench::new();
    fs::create_dir(bench.path("empty")).unwrap();
    assert!(matches!(
        bench.refused(&bench.path("empty")),
        Error::NotAnImage { .. }
    ));
    assert!(matches!(
        bench.refused(&bench.path("nothing")),
        Error::Io { action: "open", .. }
    ));
    for (file, bytes) in [
        ("empty-file", Vec::new()),
        ("text", b"hello".repeat(300)),
        ("short", b"hello".to_vec()),
        ("zeros", vec![0; 4096]),
        ("tar", file_layer("no manifest")),
        ("cut.gz", gzip(&file_layer("x"))[..60].to_vec()),
        ("xz", b"\xfd7zXZ\0\0\0".to_vec()),
    ] {
        fs::write(bench.path(file), bytes).unwrap();
        let error = bench.refused(&bench.path(file));
        assert!(matches!(error, Error::NotAnImage { .. }), "{file}: {error}");
    }
    let whole = docker_archive(&["a:1"], &[file_layer("x")]);
    fs::write(bench.path("cut.tar"), &whole[..whole.len() - 4096]).unwrap();
    assert!(
        bench
            .refused(&bench.path("cut.tar"))
            .to_string()
            .contains("cut off")
    );
}

#[test]
fn a_layout_cannot_point_out_of_itself_or_block() {
    let bench = Bench::new();
    let mut layout = bench.layout("l");
    let tar = file_layer("x");
    let image = layout.image(std::slice::from_ref(&tar));
    layout.index(image, Some("a"));
    let blob = layout.blob_path(&Digest::of(&gzip(&tar)));
    fs::rename(&blob, bench.path("outside")).unwrap();
    std::os::unix::fs::symlink(bench.path("outside"), &blob).unwrap();
    assert!(matches!(
        bench.refused(&layout.path),
        Error::Io { action: "open", .. }
    ));
    fs::remove_file(&blob).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &blob,
        rustix::fs::FileType::Fifo,
        0o600.into(),
        0,
    )
    .unwrap();
    assert!(matches!(
        bench.refused(&layout.path),
        Error::InvalidImage { .. }
    ));
    let error = bench.refused(&blob);
    assert!(matches!(error, Error::NotAnImage { .. }), "{error}");
}

#[test]
fn bombs_are_refused() {
    let mut bench = Bench::new();
    let mut layout = bench.layout("l");
    let image = layout.image(&[TarBuilder::of([Item::file("zeros", vec![0; 4 << 20])])]);
    layout.index(image, Some("a"));
    for limits in [
        Limits {
            ratio: 10,
            ratio_from: 1 << 20,
            ..Limits::default()
        },
        Limits {
            layer_bytes: 1 << 20,
            ..Limits::default()
        },
        Limits {
            image_bytes: 1 << 20,
            ..Limits::default()
        },
        Limits {
            layers: 0,
            ..Limits::default()
        },
        Limits {
            manifest_bytes: 10,
            ..Limits::default()
        },
        Limits {
            config_bytes: 10,
            ..Limits::default()
        },
    ] {
        bench.store = bench.store.clone().with_limits(limits.clone());
        let error = bench.refused(&layout.path);
        assert!(matches!(error, Error::Limit { .. }), "{limits:?}: {error}");
    }
    let archive = gzip(&tar_of_directory(&layout.path));
    fs::write(bench.path("a.tar.gz"), archive).unwrap();
    for limits in [
        Limits {
            archive_bytes: 4096,
            ..Limits::default()
        },
        Limits {
            archive_members: 2,
            ..Limits::default()
        },
    ] {
        bench.store = bench.store.clone().with_limits(limits);
        let error = bench.refused(&bench.path("a.tar.gz"));
        assert!(matches!(error, Error::Limit { .. }), "{error}");
    }
    bench.store = bench.store.clone().with_limits(Limits::default());
    bench.load(&layout.path).unwrap();
}

#[test]
fn images_are_found_by_name_and_id() {
    let bench = Bench::new();
    let id = bench.load_simple("busybox", "x");
    for name in [
        "busybox",
        "busybox:latest",
        "docker.io/library/busybox",
        &id.to_string(),
        &id.hex(),
        &id.hex()[..5],
        &id.short(),
    ] {
        assert_eq!(bench.store.get(name).unwrap().id, id, "{name}");
    }
    for name in [
        "alpine",
        "busybox:1",
        "",
        "../busybox",
        "sha256:",
        &"0".repeat(64),
        "BUSYBOX",
        &"f".repeat(65),
    ] {
        assert!(
            matches!(bench.store.get(name), Err(Error::NotFound { .. })),
            "{name}"
        );
    }
    // 17 images have two ids that start alike.
    for i in 0..17 {
        bench.load_simple(&format!("n{i}"), &format!("content {i}"));
    }
    let ambiguous = (0..16).filter(|digit| {
        matches!(bench.store.get(&format!("{digit:x}")), Err(Error::AmbiguousId { matches, .. }) if matches.len() > 1)
    });
    assert!(ambiguous.count() > 0);
}

#[test]
fn a_name_moves_to_what_is_loaded_last() {
    let bench = Bench::new();
    let first = bench.load_simple("app:1", "one");
    let second = bench.load_simple("app:1", "two");
    assert_eq!(bench.store.get("app:1").unwrap().id, second);
    assert!(bench.store.get(&first.hex()).unwrap().references.is_empty());
    let pruned = bench.store.prune().unwrap();
    assert_eq!(
        (pruned.deleted, pruned.deleted_layers.len()),
        (vec![first], 1)
    );
    assert!(pruned.freed >= 4096);
    assert!(matches!(
        bench.store.get(&first.hex()),
        Err(Error::NotFound { .. })
    ));
}

#[test]
fn removing_takes_names_first_and_shared_layers_last() {
    let bench = Bench::new();
    let mut layout = bench.layout("l");
    let base = file_layer("base");
    let app = layout.image(&[base.clone(), file_layer("app")]);
    let plain = layout.image(std::slice::from_ref(&base));
    layout
        .index(app, Some("app:1"))
        .index(plain, Some("base:1"));
    bench.load(&layout.path).unwrap();
    bench.store.tag("app:1", &name("app:2")).unwrap();
    let app = bench.store.get("app:1").unwrap();

    let error = bench.store.remove(&app.id.short(), false).unwrap_err();
    assert!(matches!(error, Error::SeveralReferences { .. }), "{error}");
    let removed = bench.store.remove("app:1", false).unwrap();
    assert_eq!(
        removed,
        Removed {
            untagged: vec![name("app:1")],
            ..Removed::default()
        }
    );
    let removed = bench.store.remove("app:2", false).unwrap();
    assert_eq!(removed.deleted, [app.id]);
    assert_eq!(removed.deleted_layers, [app.layers[1].diff_id]);
    assert!(app.layers[0].path.exists() && !app.layers[1].path.exists());
    assert!(matches!(
        bench.store.remove("app:2", false),
        Err(Error::NotFound { .. })
    ));
    bench.store.remove("base:1", false).unwrap();
    assert_eq!(bench.files(), ["references.json"]);
}

#[test]
fn an_image_in_use_stays() {
    let bench = Bench::new();
    let id = bench.load_simple("app", "x");
    let image = bench.store.lease("web-1", "app").unwrap();
    bench.store.lease("web-1", &id.hex()).unwrap();
    let error = bench.store.remove("app", false).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("image {} is in use by container web-1", id.short())
    );
    assert!(matches!(
        bench.store.remove(&id.hex(), true),
        Err(Error::InUse { .. })
    ));
    // Force takes the name only.
    let removed = bench.store.remove("app", true).unwrap();
    assert_eq!((removed.untagged.len(), removed.deleted.len()), (1, 0));
    assert!(bench.store.prune().unwrap().deleted.is_empty());
    assert!(image.layers[0].path.exists());
    assert_eq!(
        bench.store.leases().unwrap(),
        [Lease {
            container: "web-1".to_owned(),
            image: id
        }]
    );

    bench.load_simple("other", "y");
    assert!(matches!(
        bench.store.lease("web-1", "other"),
        Err(Error::LeaseExists { .. })
    ));
    bench.store.release("web-1").unwrap();
    bench.store.release("web-1").unwrap();
    assert_eq!(bench.store.prune().unwrap().deleted, [id]);
    assert!(!image.layers[0].path.exists());
    for bad in ["", "../x", "a/b", ".x", "-x", &"x".repeat(129)] {
        assert!(
            matches!(
                bench.store.lease(bad, "other"),
                Err(Error::InvalidContainerId { .. })
            ),
            "{bad:?}"
        );
    }
}

#[test]
fn what_a_dead_load_left_is_swept_and_a_live_one_is_not() {
    let bench = Bench::new();
    let id = bench.load_simple("app", "x");
    // One that died half way: its directory, and a layer that no image has.
    let dead = bench.store.temporary_dir().join("load-dead");
    fs::create_dir(&dead).unwrap();
    fs::write(dead.join("half.erofs"), "half").unwrap();
    fs::write(bench.store.layer_path(&Digest::of(b"orphan")), "orphan").unwrap();
    let live = bench.store.work_dir().unwrap();
    fs::write(live.path().join("part.erofs"), "part").unwrap();
    let store = Store::open(bench.store.root()).unwrap();
    assert!(!dead.exists());
    assert!(!bench.store.layer_path(&Digest::of(b"orphan")).exists());
    assert!(live.path().join("part.erofs").exists());
    assert_eq!(store.get("app").unwrap().id, id);
    let path = live.path().to_owned();
    drop(live);
    assert!(!path.exists());
}

#[test]
fn loads_and_removals_at_once_leave_whole_images() {
    let bench = Bench::new();
    let mut layout = bench.layout("l");
    let layers: Vec<Vec<u8>> = (0..4)
        .map(|i| file_layer(&format!("{i}").repeat(5000)))
        .collect();
    let image = layout.image(&layers);
    layout.index(image, Some("app:1"));
    std::thread::scope(|scope| {
        for worker in 0..6 {
            let (root, source) = (bench.store.root(), &layout.path);
            scope.spawn(move || {
                for _ in 0..8 {
                    let store = Store::open(root).unwrap();
                    store.load(Source::Path(source), None).unwrap();
                    if worker % 3 == 0 {
                        match store.remove("app:1", true) {
                            Ok(_) | Err(Error::NotFound { .. }) => {}
                            Err(error) => panic!("{error}"),
                        }
                    }
                }
            });
        }
    });
    bench.load(&layout.path).unwrap();
    let image = bench.store.get("app:1").unwrap();
    for layer in &image.layers {
        read_image(&layer.path);
    }
    assert_eq!(fs::read_dir(bench.store.layers_dir()).unwrap().count(), 4);
    assert_eq!(
        fs::read_dir(bench.store.temporary_dir()).unwrap().count(),
        0
    );
}

#[test]
fn damage_is_told_and_mended_by_loading_again() {
    let bench = Bench::new();
    let id = bench.load_simple("app", "x");
    let layer = bench.store.get("app").unwrap().layers[0].path.clone();
    fs::remove_file(&layer).unwrap();
    let error = bench.store.get("app").unwrap_err();
    assert!(
        matches!(error, Error::Corrupt { .. }) && error.to_string().contains("missing"),
        "{error}"
    );
    bench.load_simple("app", "x");
    assert_eq!(bench.store.get("app").unwrap().id, id);
    fs::remove_file(&layer).unwrap();
    fs::write(&layer, "cut").unwrap();
    assert!(matches!(bench.store.get("app"), Err(Error::Corrupt { .. })));
    bench.store.remove("app", false).unwrap();
    bench.load_simple("app", "x");
    assert_eq!(bench.store.get("app").unwrap().id, id);
    fs::write(bench.store.root().join("references.json"), "{").unwrap();
    assert!(matches!(bench.store.get("app"), Err(Error::Corrupt { .. })));
}

#[test]
fn a_store_of_another_version_is_left_alone() {
    let bench = Bench::new();
    fs::write(bench.store.root().join("version"), "2\n").unwrap();
    assert!(matches!(
        Store::open(bench.store.root()),
        Err(Error::StoreVersion { .. })
    ));
}

#[test]
fn a_held_lock_is_busy_after_its_time() {
    let bench = Bench::new();
    bench.load_simple("app", "x");
    let _held = bench.store.lock().unwrap();
    let impatient = bench
        .store
        .clone()
        .with_lock_timeout(Duration::from_millis(50));
    assert!(matches!(
        impatient.remove("app", false),
        Err(Error::Busy { .. })
    ));
    // Readers do not wait.
    assert!(impatient.get("app").is_ok());
    assert!(Store::open(bench.store.root()).is_ok());
}
