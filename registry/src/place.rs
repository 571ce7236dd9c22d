//! Where the images of a registry can be had: its mirrors, then the registry itself.

use std::net::IpAddr;

use crate::{Access, DOCKER_HUB, Options};

/// A host that may have a registry's images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Host and port.
    pub host: String,
    /// Tried in this order.
    pub schemes: &'static [&'static str],
    /// Whether its certificate has to be good.
    pub verify: bool,
}

const SECURE: &[&str] = &["https"];
const PLAIN: &[&str] = &["http"];
const EITHER: &[&str] = &["https", "http"];

impl Place {
    /// The places of a registry, the first to be tried first; the last is the registry itself.
    pub fn of(registry: &str, options: &Options) -> Vec<Self> {
        let access = options.registries.get(registry);
        let mirrors = access.map(|access| access.mirrors.as_slice());
        let mut places: Vec<Self> = mirrors
            .unwrap_or_default()
            .iter()
            .map(|url| Self::mirror(url, options))
            .collect();
        places.push(Self::itself(registry, access));
        places
    }

    /// The registry, not its mirrors.
    pub fn itself(registry: &str, access: Option<&Access>) -> Self {
        let insecure = access.is_some_and(|access| access.insecure);
        let host = match registry {
            DOCKER_HUB => "registry-1.docker.io",
            other => other,
        };
        Self {
            host: host.to_owned(),
            // On the way to this machine itself nobody listens.
            schemes: if insecure || is_loopback(registry) {
                EITHER
            } else {
                SECURE
            },
            verify: !insecure,
        }
    }

    fn mirror(url: &str, options: &Options) -> Self {
        let (schemes, host) = match url.strip_prefix("http://") {
            Some(host) => (PLAIN, host),
            None => (SECURE, url.strip_prefix("https://").unwrap_or(url)),
        };
        let host = host.trim_end_matches('/');
        let access = options.registries.get(host);
        Self {
            host: host.to_owned(),
            schemes,
            verify: !access.is_some_and(|access| access.insecure),
        }
    }
}

/// Whether a host and port are of this machine only.
pub fn is_loopback(authority: &str) -> bool {
    let host = match authority.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => authority.split(':').next().unwrap_or(authority),
    };
    host == "localhost"
        || host
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_http_is_for_this_machine_and_by_configuration() {
        for (registry, schemes) in [
            ("docker.io", SECURE),
            ("quay.io", SECURE),
            ("10.0.0.1:5000", SECURE),
            ("localhost.example", SECURE),
            ("localhost", EITHER),
            ("localhost:5000", EITHER),
            ("127.0.0.2:5000", EITHER),
            ("[::1]:5000", EITHER),
        ] {
            assert_eq!(Place::itself(registry, None).schemes, schemes, "{registry}");
        }
        let insecure = Access {
            insecure: true,
            ..Access::default()
        };
        let place = Place::itself("10.0.0.1:5000", Some(&insecure));
        assert_eq!((place.schemes, place.verify), (EITHER, false));
    }

    #[test]
    fn mirrors_come_first() {
        let mut options = Options::new("/nowhere".into());
        options.registries.insert(
            "docker.io".into(),
            Access {
                mirrors: vec!["http://a:5000/".into(), "https://b".into()],
                insecure: false,
            },
        );
        let places = Place::of("docker.io", &options);
        let seen: Vec<_> = places
            .iter()
            .map(|place| (place.host.as_str(), place.schemes))
            .collect();
        assert_eq!(
            seen,
            [
                ("a:5000", PLAIN),
                ("b", SECURE),
                ("registry-1.docker.io", SECURE)
            ]
        );
    }
}
