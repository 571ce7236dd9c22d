//! What is saved is what was loaded.

use std::collections::BTreeMap;
use std::io::{self, Write};

use super::*;

fn saved(store: &Store, names: &[&str]) -> Vec<u8> {
    let mut archive = Vec::new();
    store.save(names, &mut archive).unwrap();
    archive
}

fn members(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let mut reader = tar::Archive::new(archive);
    let entries = reader.entries().unwrap();
    entries
        .map(|entry| {
            let mut entry = entry.unwrap();
            let mut bytes = Vec::new();
            io::copy(&mut entry, &mut bytes).unwrap();
            (entry.path().unwrap().display().to_string(), bytes)
        })
        .collect()
}

fn blobs(bench: &Bench) -> usize {
    fs::read_dir(bench.store.root().join("blobs"))
        .unwrap()
        .count()
}

/// An image of a gzip, a zstd and an uncompressed layer, of which the last repeats the first.
fn mixed(bench: &Bench) -> Digest {
    let mut layout = bench.layout("mixed");
    let tars = [
        file_layer("one"),
        file_layer("two"),
        file_layer("three"),
        file_layer("one"),
    ];
    let diff_ids: Vec<Digest> = tars.iter().map(|tar| Digest::of(tar)).collect();
    let media_type = |kind: &str| format!("application/vnd.oci.image.layer.v1.{kind}");
    let zstd = zstd::encode_all(&tars[1][..], 3).unwrap();
    let descriptors = vec![
        layout.blob(&media_type("tar+gzip"), &gzip(&tars[0])),
        layout.blob(&media_type("tar+zstd"), &zstd),
        layout.blob(&media_type("tar"), &tars[2]),
        layout.blob(&media_type("tar+gzip"), &gzip(&tars[0])),
    ];
    let image = layout.manifest(config("linux", "amd64", &diff_ids), descriptors);
    layout.index(image, Some("mixed:1"));
    bench.load(&layout.path).unwrap()[0].id
}

#[test]
fn an_archive_has_the_same_image_and_two_indexes() {
    let bench = Bench::new();
    let id = mixed(&bench);
    let archive = saved(&bench.store, &["mixed:1"]);
    let members = members(&archive);
    assert!(members.contains_key("oci-layout") && members.contains_key("index.json"));
    let docker: serde_json::Value = serde_json::from_slice(&members["manifest.json"]).unwrap();
    assert_eq!(docker[0]["RepoTags"], json!(["mixed:1"]));
    assert_eq!(docker[0]["Layers"].as_array().unwrap().len(), 4);
    // Everything is named by its digest.
    for (name, bytes) in &members {
        if let Some(hex) = name
            .strip_prefix("blobs/sha256/")
            .filter(|hex| !hex.is_empty())
        {
            assert_eq!(Digest::of(bytes).hex(), hex);
        }
    }

    let diff_ids = |bench: &Bench| {
        let image = bench.store.get("mixed:1").unwrap();
        let layers = image.layers.iter().map(|layer| layer.diff_id);
        (image.id, layers.collect::<Vec<_>>())
    };
    let other = Bench::new();
    fs::write(other.path("archive"), &archive).unwrap();
    assert_eq!(other.load(&other.path("archive")).unwrap()[0].id, id);
    assert_eq!(diff_ids(&other), diff_ids(&bench));
    assert_eq!(saved(&other.store, &["mixed:1"]), archive);

    // As a docker archive alone, which is what older readers see.
    let old = Bench::new();
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in members
        .iter()
        .filter(|(name, _)| !name.ends_with('/') && *name != "oci-layout" && *name != "index.json")
    {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        builder.append_data(&mut header, name, &bytes[..]).unwrap();
    }
    fs::write(old.path("archive"), builder.into_inner().unwrap()).unwrap();
    old.load(&old.path("archive")).unwrap();
    assert_eq!(diff_ids(&old), diff_ids(&bench));
}

#[test]
fn names_are_those_given() {
    let bench = Bench::new();
    let id = bench.load_simple("app:1", "x");
    bench.store.tag("app:1", &name("app:2")).unwrap();
    bench.load_simple("other:1", "y");
    let tags = |names: &[&str]| {
        let members = members(&saved(&bench.store, names));
        let docker: serde_json::Value = serde_json::from_slice(&members["manifest.json"]).unwrap();
        let images = docker.as_array().unwrap().iter();
        images
            .map(|image| image["RepoTags"].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(tags(&["app:1"]), [json!(["app:1"])]);
    assert_eq!(tags(&["app:1", "app:2"]), [json!(["app:1", "app:2"])]);
    assert_eq!(tags(&[&id.short()]), [serde_json::Value::Null]);
    assert_eq!(
        tags(&["other:1", "app:2", &id.short()]),
        [json!(["other:1"]), json!(["app:2"])]
    );
    let mut nothing = Vec::new();
    let error = bench.store.save(&["app:1", "no:1"], &mut nothing);
    assert!(matches!(error, Err(Error::NotFound { .. })));
    assert!(nothing.is_empty());
}

#[test]
fn blobs_go_with_the_last_image_that_has_them() {
    let bench = Bench::new();
    let mut layout = bench.layout("l");
    let base = file_layer("base");
    let app = layout.image(&[base.clone(), file_layer("app")]);
    let plain = layout.image(std::slice::from_ref(&base));
    layout
        .index(app, Some("app:1"))
        .index(plain, Some("base:1"));
    bench.load(&layout.path).unwrap();
    assert_eq!(blobs(&bench), 2);
    bench.store.remove("app:1", false).unwrap();
    assert_eq!(blobs(&bench), 1);
    saved(&bench.store, &["base:1"]);
    let pruned = bench.store.prune(Prune::Unused).unwrap();
    assert_eq!(pruned.untagged, [name("base:1")]);
    assert!(pruned.freed >= 8192, "{}", pruned.freed);
    assert_eq!(blobs(&bench), 0);
    assert_eq!(bench.files(), ["references.json"]);
}

#[test]
fn images_of_before_blobs_were_kept_are_mended_by_loading_again() {
    let bench = Bench::new();
    let id = bench.load_simple("app:1", "x");
    let record = bench
        .store
        .root()
        .join("images")
        .join(id.hex())
        .join("record.json");
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    json["layers"][0].as_object_mut().unwrap().remove("blob");
    fs::write(&record, json.to_string()).unwrap();
    for blob in fs::read_dir(bench.store.root().join("blobs")).unwrap() {
        fs::remove_file(blob.unwrap().path()).unwrap();
    }
    let error = bench.store.save(&["app:1"], &mut Vec::new()).unwrap_err();
    assert!(matches!(error, Error::NotKept { .. }), "{error}");
    bench.load(&bench.path("layout-x")).unwrap();
    saved(&bench.store, &["app:1"]);
}

#[test]
fn damaged_blobs_and_full_outputs_are_told() {
    struct Full(usize);
    impl Write for Full {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            let n = buf.len().min(self.0);
            self.0 -= n;
            if n == 0 {
                Err(io::ErrorKind::StorageFull.into())
            } else {
                Ok(n)
            }
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let bench = Bench::new();
    bench.load_simple("app:1", "x");
    let error = bench.store.save(&["app:1"], &mut Full(3000)).unwrap_err();
    assert!(matches!(error, Error::Output { .. }), "{error}");
    let blob = fs::read_dir(bench.store.root().join("blobs"))
        .unwrap()
        .next();
    let blob = blob.unwrap().unwrap().path();
    fs::remove_file(&blob).unwrap();
    fs::write(&blob, "short").unwrap();
    let error = bench.store.save(&["app:1"], &mut Vec::new()).unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error}");
    assert!(
        fs::read_dir(bench.store.root().join("tmp"))
            .unwrap()
            .next()
            .is_none()
    );
}
