//! Passwords, tokens, and who must not get them.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;

/// base64 of `user:secret`.
const BASIC: &str = "Basic dXNlcjpzZWNyZXQ=";

fn known(host: &str) -> serde_json::Value {
    json!({"auths": {host: {"auth": &BASIC["Basic ".len()..]}}})
}

/// Wants the password with each request.
fn with_password() -> Registry {
    let registry = Registry::start(|asked: &Asked| {
        (asked.header("authorization") != Some(BASIC)).then(|| {
            Reply::error(401, "authentication required")
                .header("WWW-Authenticate", "Basic realm=\"Registry\"")
        })
    });
    registry.put_image(Some("1"), &[b"one"]);
    registry
}

/// Wants tokens, whose service answers `token`.
fn with_tokens(token: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Registry {
    let registry = Registry::start(move |asked: &Asked| {
        if asked.path.starts_with("/token") {
            return Some(token(asked));
        }
        if asked.header("authorization") == Some("Bearer good") {
            return None;
        }
        let realm = format!("http://{}/token", asked.header("host").unwrap());
        let challenge = format!("Bearer realm=\"{realm}\",service=\"tests\"");
        Some(Reply::error(401, "token please").header("WWW-Authenticate", &challenge))
    });
    registry.put_image(Some("1"), &[b"one", b"two"]);
    registry
}

#[test]
fn passwords_are_asked_for_and_given() {
    let registry = with_password();
    let bench = Bench::new();
    let error = bench.refused(&registry).to_string();
    let advice = format!("caisson login {}", registry.host);
    assert!(error.contains(&advice), "{error}");
    bench.credentials(&known(&registry.host));
    bench.pull(&registry).unwrap();
}

#[test]
fn tokens_are_fetched_for_the_repository() {
    let registry = with_tokens(|_| Reply::new(200, r#"{"token": "good"}"#));
    Bench::new().pull(&registry).unwrap();
    let asked = registry.asked_for("/token");
    assert_eq!(asked.len(), 1);
    assert_eq!(
        asked[0].path,
        "/token?service=tests&scope=repository%3Alibrary%2Fapp%3Apull"
    );
    assert_eq!(asked[0].header("authorization"), None);

    let bench = Bench::new();
    bench.credentials(&known(&registry.host));
    bench.pull(&registry).unwrap();
    let asked = registry.asked_for("account=user");
    assert_eq!(asked[0].header("authorization"), Some(BASIC));
}

#[test]
fn identity_tokens_are_refreshed() {
    let registry = with_tokens(|asked| {
        assert_eq!(asked.method, "POST");
        Reply::new(200, r#"{"access_token": "good"}"#)
    });
    let bench = Bench::new();
    bench.credentials(&json!({"auths": {&registry.host: {"identitytoken": "long&lived"}}}));
    bench.pull(&registry).unwrap();
    let body = &registry.asked_for("/token")[0].body;
    assert!(
        body.contains("grant_type=refresh_token") && body.contains("refresh_token=long%26lived"),
        "{body}"
    );
}

#[test]
fn tokens_that_get_old_are_renewed() {
    let (tokens, requests) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let registry = Registry::start(move |asked: &Asked| {
        if asked.path.starts_with("/token") {
            let number = tokens.fetch_add(1, Ordering::SeqCst);
            return Some(Reply::new(200, format!(r#"{{"token": "t{number}"}}"#)));
        }
        // The first is good for two requests.
        let authorization = asked.header("authorization");
        let good = match authorization {
            Some("Bearer t0") => requests.fetch_add(1, Ordering::SeqCst) < 2,
            Some(other) => other.starts_with("Bearer t"),
            None => false,
        };
        let realm = format!("http://{}/token", asked.header("host").unwrap());
        let challenge = format!("Bearer realm=\"{realm}\"");
        (!good).then(|| Reply::error(401, "expired").header("WWW-Authenticate", &challenge))
    });
    registry.put_image(Some("1"), &[b"one", b"two", b"three"]);
    Bench::new().pull(&registry).unwrap();
    assert!(registry.asked_for("/token").len() >= 2);
}

#[test]
fn tokens_without_sense_are_refused() {
    for body in [
        "",
        "{}",
        r#"{"token": ""}"#,
        r#"{"token": "a\r\nb"}"#,
        r#"{"token": 7}"#,
    ] {
        let registry = with_tokens(move |_| Reply::new(200, body));
        let error = Bench::new().refused(&registry);
        assert!(matches!(error, Error::Protocol { .. }), "{body}: {error}");
    }
    let registry = with_tokens(|_| Reply::error(401, "who are you"));
    let error = Bench::new().refused(&registry).to_string();
    assert!(
        error.contains("caisson login") && error.contains("library/app"),
        "{error}"
    );
    let registry = with_tokens(|_| Reply::new(200, r#"{"token": "bad"}"#));
    let error = Bench::new().refused(&registry);
    assert!(matches!(error, Error::Unauthorized { .. }), "{error}");
}

#[test]
fn passwords_do_not_follow_redirects_to_others() {
    let elsewhere = Registry::plain();
    let (_, layers) = elsewhere.put_image(Some("1"), &[b"one"]);
    let target = elsewhere.host.clone();
    let registry = Registry::start(move |asked: &Asked| {
        if asked.header("authorization") != Some(BASIC) {
            let reply = Reply::error(401, "authentication required");
            return Some(reply.header("WWW-Authenticate", "Basic realm=\"Registry\""));
        }
        asked.path.contains("/blobs/").then(|| {
            Reply::new(307, "").header("Location", &format!("http://{target}{}", asked.path))
        })
    });
    registry.put_image(Some("1"), &[b"one"]);
    let bench = Bench::new();
    bench.credentials(&known(&registry.host));
    bench.pull(&registry).unwrap();
    let asked = elsewhere.asked_for(&layers[0].to_string());
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].header("authorization"), None);
}

#[test]
fn logging_in_tells_good_from_bad() {
    let good = |asked: &Asked| match asked.header("authorization") {
        Some(BASIC) => Reply::new(200, r#"{"token": "good"}"#),
        _ => Reply::error(401, "incorrect username or password"),
    };
    for registry in [with_password(), with_tokens(good)] {
        let client = Client::new(Bench::new().options.clone());
        client.log_in(&registry.host, "user", "secret").unwrap();
        let error = client.log_in(&registry.host, "user", "guess").unwrap_err();
        assert!(matches!(error, Error::BadCredentials { .. }), "{error}");
    }
}

#[test]
fn helpers_are_asked() {
    let registry = with_password();
    let bench = Bench::new();
    let name = format!("tests-{}", std::process::id());
    // There is none of that name on the PATH: what matters here is who asks it.
    bench.credentials(&json!({"credHelpers": {&registry.host: name}}));
    let error = bench.pull(&registry).unwrap_err().to_string();
    let program = format!("docker-credential-{name}");
    assert!(error.contains(&program), "{error}");
}
