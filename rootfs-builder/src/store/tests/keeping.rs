//! Finding, naming, using and removing images; several processes at once.

use super::*;

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
    let pruned = bench.store.prune(Prune::Dangling).unwrap();
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
fn a_layer_that_is_held_outlives_its_image() {
    let bench = Bench::new();
    let mut layout = bench.layout("l");
    let (base, top) = (file_layer("base"), file_layer("top"));
    let old = layout.image(std::slice::from_ref(&base));
    layout.index(old, Some("old:1"));
    bench.load(&layout.path).unwrap();
    let new = layout.image(&[base.clone(), top.clone()]);
    let manifest: Digest = new["digest"].as_str().unwrap().parse().unwrap();

    let mut staging = bench.store.stage().unwrap();
    assert!(staging.hold_layer(&Digest::of(&base)).unwrap());
    assert!(!staging.hold_layer(&Digest::of(&top)).unwrap());
    bench.store.remove("old:1", false).unwrap();
    // As from a registry: all but the blob of what is held.
    let held = layout.blob_path(&Digest::of(&gzip(&base)));
    for entry in fs::read_dir(layout.path.join("blobs/sha256")).unwrap() {
        let path = entry.unwrap().path();
        let name = format!("sha256:{}", path.file_name().unwrap().to_str().unwrap());
        if path != held {
            fs::copy(&path, staging.blob_path(&name.parse().unwrap())).unwrap();
        }
    }
    staging.load(&manifest, vec![name("new:1")]).unwrap();
    assert_eq!(bench.store.get("new:1").unwrap().layers.len(), 2);
    bench.store.save(&["new:1"], &mut Vec::new()).unwrap();
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
    assert!(
        bench
            .store
            .prune(Prune::Dangling)
            .unwrap()
            .deleted
            .is_empty()
    );
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
    assert_eq!(bench.store.prune(Prune::Dangling).unwrap().deleted, [id]);
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
