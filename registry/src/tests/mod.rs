//! Pulls from a registry in this process, which mostly misbehaves.

mod authorization;
mod fake;
mod faults;

use std::cell::RefCell;
use std::time::Duration;

use caisson_rootfs_builder::{Digest, Reference, Store};
use serde_json::json;

use crate::{Access, Client, Error, LayerState, Options, Progress, Pulled, Result};
use fake::{Asked, Registry, Reply};

/// A store, docker's configuration, and a client with short times.
struct Bench {
    _directory: tempfile::TempDir,
    store: Store,
    options: Options,
}

#[derive(Default)]
struct Seen(RefCell<Vec<(Digest, LayerState)>>);

impl Progress for Seen {
    fn layer(&self, layer: &Digest, state: LayerState) {
        self.0.borrow_mut().push((*layer, state));
    }
    fn loading(&self) {}
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path().join("store")).unwrap();
        let mut options = Options::new(directory.path().join("config.json"));
        options.certificates = vec![directory.path().join("certs.d")];
        options.connect_timeout = Duration::from_secs(2);
        options.idle_timeout = Duration::from_secs(1);
        options.answer_timeout = Duration::from_secs(2);
        options.backoff = Duration::from_millis(1);
        Self {
            _directory: directory,
            store,
            options,
        }
    }

    fn credentials(&self, json: &serde_json::Value) {
        std::fs::write(&self.options.credentials, json.to_string()).unwrap();
    }

    fn pull_as(&self, reference: &str) -> Result<Pulled> {
        let reference: Reference = reference.parse().unwrap();
        let client = Client::new(self.options.clone());
        client.pull(&self.store, &reference, &Seen::default())
    }

    fn pull(&self, registry: &Registry) -> Result<Pulled> {
        self.pull_as(&format!("{}/library/app:1", registry.host))
    }

    /// A pull that must fail, and leave nothing.
    fn refused(&self, registry: &Registry) -> Error {
        let error = self.pull(registry).unwrap_err();
        assert!(self.store.images().unwrap().is_empty(), "{error}");
        let left = std::fs::read_dir(self.store.root().join("tmp")).unwrap();
        assert_eq!(left.count(), 0, "left behind after: {error}");
        assert!(error.to_string().contains(&registry.host), "{error}");
        error
    }
}

/// Bytes that do not compress.
fn noise(length: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()[0]
    };
    (0..length).map(|_| next()).collect()
}

#[test]
fn an_image_is_pulled_once_and_found_by_tag_and_digest() {
    let (bench, registry) = (Bench::new(), Registry::plain());
    let (manifest, layers) = registry.put_image(Some("1"), &[b"one", b"two", b"three", b"four"]);
    let pulled = bench.pull(&registry).unwrap();
    assert_eq!((pulled.digest, pulled.newer), (manifest, true));
    let image = bench
        .store
        .get(&format!("{}/library/app:1", registry.host))
        .unwrap();
    assert_eq!((image.id, image.layers.len()), (pulled.id, 4));
    assert_eq!(image.manifest_digest, Some(manifest));
    let by_digest = format!("{}/library/app@{manifest}", registry.host);
    assert_eq!(bench.store.get(&by_digest).unwrap().id, pulled.id);
    assert_eq!(image.digests[0].to_string(), by_digest);

    let again = bench.pull(&registry).unwrap();
    assert_eq!((again.id, again.newer), (pulled.id, false));
    for layer in layers {
        assert_eq!(registry.asked_for(&layer.to_string()).len(), 1);
    }
}

#[test]
fn of_several_platforms_ours_is_taken() {
    let (bench, registry) = (Bench::new(), Registry::plain());
    let (manifest, _) = registry.put_image(None, &[b"ours"]);
    let length =
        registry.content.lock().unwrap()[&format!("/v2/library/app/manifests/{manifest}")].len();
    let index = json!({
        "schemaVersion": 2,
        "manifests": [
            {"mediaType": "application/vnd.oci.image.manifest.v1+json", "size": 7,
             "digest": Digest::of(b"x"), "platform": {"os": "linux", "architecture": "arm64"}},
            {"mediaType": "application/vnd.oci.image.manifest.v1+json", "size": length,
             "digest": manifest, "platform": {"os": "linux", "architecture": "amd64"}},
        ],
    });
    let index = registry.put_manifest(Some("1"), &index);
    let pulled = bench.pull(&registry).unwrap();
    assert_eq!(pulled.digest, index);
    // Under the digest of either, as docker.
    for digest in [index, manifest] {
        let name = format!("{}/library/app@{digest}", registry.host);
        assert_eq!(bench.store.get(&name).unwrap().id, pulled.id);
    }
    let arm = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.list.v2+json",
        "manifests": [{"mediaType": "application/vnd.oci.image.manifest.v1+json", "size": 7,
             "digest": Digest::of(b"x"), "platform": {"os": "linux", "architecture": "arm64"}}],
    });
    registry.put_manifest(Some("arm"), &arm);
    let error = bench
        .pull_as(&format!("{}/library/app:arm", registry.host))
        .unwrap_err();
    assert!(error.to_string().contains("linux/arm64"), "{error}");
}

#[test]
fn layers_of_the_store_are_not_transferred() {
    let (bench, registry) = (Bench::new(), Registry::plain());
    let (_, first) = registry.put_image(Some("1"), &[b"base", b"one"]);
    bench.pull(&registry).unwrap();
    let (_, second) = registry.put_image(Some("1"), &[b"base", b"two"]);
    assert_eq!(first[0], second[0]);
    let reference: Reference = format!("{}/library/app:1", registry.host).parse().unwrap();
    let seen = Seen::default();
    let client = Client::new(bench.options.clone());
    let pulled = client.pull(&bench.store, &reference, &seen).unwrap();
    assert!(pulled.newer);
    assert_eq!(registry.asked_for(&first[0].to_string()).len(), 1);
    let seen = seen.0.into_inner();
    assert!(seen.contains(&(second[0], LayerState::Exists)), "{seen:?}");
    assert!(
        seen.contains(&(second[1], LayerState::Downloaded)),
        "{seen:?}"
    );
}

#[test]
fn a_digest_is_what_is_pulled_and_verified() {
    let (bench, registry) = (Bench::new(), Registry::plain());
    let (manifest, _) = registry.put_image(Some("1"), &[b"one"]);
    let name = format!("{}/library/app:ignored@{manifest}", registry.host);
    let pulled = bench.pull_as(&name).unwrap();
    let image = bench.store.get(&pulled.id.to_string()).unwrap();
    assert!(image.references.is_empty(), "{:?}", image.references);
    assert_eq!(bench.store.get(&name).unwrap().id, pulled.id);

    let other = Digest::of(b"other");
    let mut content = registry.content.lock().unwrap();
    let json = content[&format!("/v2/library/app/manifests/{manifest}")].clone();
    content.insert(format!("/v2/library/app/manifests/{other}"), json);
    drop(content);
    let name = format!("{}/library/app@{other}", registry.host);
    assert!(matches!(
        bench.pull_as(&name),
        Err(Error::Digest { expected, actual, .. }) if (expected, actual) == (other, manifest)
    ));
}

#[test]
fn mirrors_are_tried_first_and_all_are_told_of() {
    let mut bench = Bench::new();
    let broken = Registry::start(|_| Some(Reply::error(404, "nothing here")));
    let (mirror, registry) = (Registry::plain(), Registry::plain());
    mirror.put_image(Some("1"), &[b"one"]);
    let access = |mirrors: &[&Registry]| Access {
        mirrors: mirrors
            .iter()
            .map(|mirror| format!("http://{}", mirror.host))
            .collect(),
        insecure: false,
    };
    bench
        .options
        .registries
        .insert(registry.host.clone(), access(&[&broken, &mirror]));
    bench.pull(&registry).unwrap();
    assert!(registry.asked.lock().unwrap().is_empty());
    assert!(!broken.asked_for("/manifests/1").is_empty());

    let mut bench = Bench::new();
    bench
        .options
        .registries
        .insert(registry.host.clone(), access(&[&broken]));
    let error = bench.refused(&registry);
    let text = error.to_string();
    assert!(
        text.contains("nothing here") && text.contains(&broken.host),
        "{text}"
    );
}
