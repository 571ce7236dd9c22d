//! What must not be loaded.

use super::*;

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
