//! What registries and networks do wrong.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

#[test]
fn a_broken_transfer_is_resumed() {
    let content = noise(300_000);
    let source = Registry::plain();
    let (_, layers) = source.put_image(Some("1"), &[&content]);
    let path = format!("/v2/library/app/blobs/{}", layers[0]);
    let whole = source.content.lock().unwrap()[&path].clone();
    let cutter = Registry::start(move |asked| {
        (asked.path == path && asked.header("range").is_none()).then(|| {
            let mut reply = Reply::new(200, whole.clone());
            reply.cut = Some(100_000);
            reply
        })
    });
    cutter.put_image(Some("1"), &[&content]);
    let bench = Bench::new();
    bench.pull(&cutter).unwrap();
    let asked = cutter.asked_for(&layers[0].to_string());
    assert_eq!(asked.len(), 2);
    assert_eq!(asked[1].header("range"), Some("bytes=100000-"));
}

#[test]
fn a_registry_without_ranges_sends_all_again() {
    let content = noise(200_000);
    let tries = AtomicUsize::new(0);
    let source = Registry::plain();
    let (_, layers) = source.put_image(Some("1"), &[&content]);
    let path = format!("/v2/library/app/blobs/{}", layers[0]);
    let whole = source.content.lock().unwrap()[&path].clone();
    let registry = Registry::start(move |asked| {
        (asked.path == path).then(|| {
            let mut reply = Reply::new(200, whole.clone());
            reply.cut = (tries.fetch_add(1, Ordering::SeqCst) < 2).then_some(50_000);
            reply
        })
    });
    registry.put_image(Some("1"), &[&content]);
    Bench::new().pull(&registry).unwrap();
    assert_eq!(registry.asked_for(&layers[0].to_string()).len(), 3);
}

#[test]
fn a_transfer_that_always_breaks_ends() {
    let registry = Registry::start(|asked| {
        asked.path.contains("/blobs/").then(|| {
            let mut reply = Reply::new(200, "only a part");
            reply.length = Some(1000);
            reply
        })
    });
    registry.put_image(Some("1"), &[b"one"]);
    let error = Bench::new().refused(&registry);
    assert!(matches!(error, Error::Broken { .. }), "{error}");
}

#[test]
fn other_content_is_refused() {
    let source = Registry::plain();
    let (_, layers) = source.put_image(Some("1"), &[b"one"]);
    let length = source.blob_len(&layers[0]);
    let layer = layers[0].to_string();
    let registry = Registry::start(move |asked| {
        asked
            .path
            .ends_with(&layer)
            .then(|| Reply::new(200, vec![7; length]))
    });
    registry.put_image(Some("1"), &[b"one"]);
    let error = Bench::new().refused(&registry);
    assert!(
        matches!(error, Error::Digest { expected, .. } if expected == layers[0]),
        "{error}"
    );
}

#[test]
fn other_lengths_are_refused_before_they_are_read() {
    let source = Registry::plain();
    let (_, layers) = source.put_image(Some("1"), &[b"one"]);
    for (length, endless) in [(Some(u64::MAX / 2), true), (None, true), (Some(3), false)] {
        let layer = layers[0].to_string();
        let registry = Registry::start(move |asked| {
            asked.path.ends_with(&layer).then(|| {
                let mut reply = Reply::new(200, vec![7; 3]);
                (reply.length, reply.endless) = (length, endless);
                reply
            })
        });
        registry.put_image(Some("1"), &[b"one"]);
        let error = Bench::new().refused(&registry);
        assert!(matches!(error, Error::Size { .. }), "{length:?}: {error}");
    }
}

#[test]
fn large_manifests_are_refused() {
    for length in [Some(1 << 40), None] {
        let registry = Registry::start(move |asked| {
            asked.path.contains("/manifests/").then(|| {
                let mut reply = Reply::new(200, vec![b' '; 1 << 16]);
                (reply.length, reply.endless) = (length, true);
                reply
            })
        });
        let error = Bench::new().refused(&registry);
        assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    }
}

#[test]
fn refusals_say_what_to_do() {
    for (status, words, requests) in [
        (404, vec!["has no", "app:1", "gone away"], 1),
        (403, vec!["caisson login", "gone away"], 1),
        (
            429,
            vec!["limits the rate", "in 17 seconds", "caisson login"],
            1,
        ),
        (500, vec!["answers 500", "gone away"], 3),
        (418, vec!["answers 418"], 1),
    ] {
        let registry = Registry::start(move |asked| {
            let reply = Reply::error(status, "gone away").header("Retry-After", "17");
            asked.path.contains("/manifests/").then_some(reply)
        });
        let error = Bench::new().refused(&registry).to_string();
        for word in words {
            assert!(error.contains(word), "{status}: {error}");
        }
        assert_eq!(
            registry.asked_for("/manifests/").len(),
            requests,
            "{status}"
        );
    }
}

#[test]
fn a_bad_moment_is_waited_for() {
    let tries = AtomicUsize::new(0);
    let registry = Registry::start(move |asked| {
        let again = asked.path.contains("/manifests/") && tries.fetch_add(1, Ordering::SeqCst) < 2;
        again.then(|| Reply::error(503, "starting"))
    });
    registry.put_image(Some("1"), &[b"one"]);
    Bench::new().pull(&registry).unwrap();
}

#[test]
fn endless_redirects_end() {
    let registry = Registry::start(|asked| {
        asked
            .path
            .contains("/manifests/")
            .then(|| Reply::new(307, "").header("Location", &format!("{}x", asked.path)))
    });
    let error = Bench::new().refused(&registry);
    assert!(matches!(error, Error::Redirect { .. }), "{error}");
}

#[test]
fn slow_registries_have_a_deadline() {
    let registry = Registry::start(|asked| {
        asked.path.contains("/manifests/").then(|| {
            let mut reply = Reply::new(200, "{}");
            reply.delay = Duration::from_secs(30);
            reply
        })
    });
    let mut bench = Bench::new();
    bench.options.idle_timeout = Duration::from_millis(200);
    let start = std::time::Instant::now();
    let error = bench.refused(&registry);
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn nobody_there_is_told_at_once() {
    let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = unused.local_addr().unwrap().to_string();
    drop(unused);
    let bench = Bench::new();
    let error = bench.pull_as(&format!("{host}/library/app:1")).unwrap_err();
    assert!(matches!(error, Error::Connect { .. }), "{error}");
    assert!(error.to_string().contains("refused"), "{error}");
}

#[test]
fn answers_without_sense_are_refused() {
    for body in [
        "",
        "[]",
        "{\"schemaVersion\": 1, \"fsLayers\": []}",
        "{\"schemaVersion\": 2, \"mediaType\": \"text/html\"}",
        "{\"schemaVersion\": 2, \"mediaType\": \"application/vnd.oci.image.manifest.v1+json\"}",
        "<html>",
    ] {
        let registry = Registry::start(move |asked| {
            asked
                .path
                .contains("/manifests/")
                .then(|| Reply::new(200, body))
        });
        let error = Bench::new().refused(&registry).to_string();
        assert!(error.contains("app:1"), "{body}: {error}");
    }
    // The manifest and the configuration contradict each other.
    let registry = Registry::plain();
    let config = b"{\"architecture\":\"amd64\",\"os\":\"linux\",\"rootfs\":{\"type\":\"layers\",\"diff_ids\":[]}}";
    let manifest = json!({
        "schemaVersion": 2,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json",
                   "digest": registry.put_blob(config), "size": config.len()},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar",
                    "digest": registry.put_blob(b"x"), "size": 1}],
    });
    registry.put_manifest(Some("1"), &manifest);
    let error = Bench::new().refused(&registry).to_string();
    assert!(error.contains("1 layers"), "{error}");
}

#[test]
fn images_beyond_the_limits_are_refused_before_the_transfer() {
    let registry = Registry::plain();
    let (_, layers) = registry.put_image(Some("1"), &[&noise(100_000)]);
    let mut bench = Bench::new();
    let limits = caisson_rootfs_builder::Limits {
        layer_bytes: 1000,
        ..Default::default()
    };
    bench.store = bench.store.with_limits(limits);
    let error = bench.refused(&registry);
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    assert!(registry.asked_for(&layers[0].to_string()).is_empty());
}
