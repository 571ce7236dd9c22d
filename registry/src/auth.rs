//! What a registry asks for in `WWW-Authenticate` (RFC 7235; distribution's token authentication).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use serde::Deserialize;

use crate::credentials::Credential;

/// How a registry wants to know who we are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Challenge {
    /// User name and password with each request.
    Basic,
    /// A token from somewhere.
    Bearer {
        /// Where.
        realm: String,
        /// Told there.
        service: Option<String>,
    },
}

impl Challenge {
    /// The best of those in an answer.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let mut best = None;
        for value in headers.get_all(WWW_AUTHENTICATE) {
            let Ok(challenges) = http_auth::parse_challenges(value.to_str().ok()?) else {
                continue;
            };
            for challenge in challenges {
                if challenge.scheme.eq_ignore_ascii_case("basic") && best.is_none() {
                    best = Some(Self::Basic);
                } else if challenge.scheme.eq_ignore_ascii_case("bearer") {
                    let find = |name: &str| {
                        let mut params = challenge.params.iter();
                        let found = params.find(|(key, _)| key.eq_ignore_ascii_case(name));
                        found.map(|(_, value)| value.to_unescaped())
                    };
                    if let Some(realm) = find("realm") {
                        let service = find("service");
                        best = Some(Self::Bearer { realm, service });
                    }
                }
            }
        }
        best
    }
}

/// An `Authorization` header; `None` when the text cannot be in one.
fn header(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

/// RFC 7617.
pub fn basic(user: &str, password: &str) -> Option<HeaderValue> {
    header(&format!(
        "Basic {}",
        STANDARD.encode(format!("{user}:{password}"))
    ))
}

/// RFC 6750.
pub fn bearer(token: &str) -> Option<HeaderValue> {
    header(&format!("Bearer {token}"))
}

/// A token service's answer.
#[derive(Deserialize)]
pub struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
}

impl TokenAnswer {
    /// The token, if it has one.
    pub fn token(self) -> Option<String> {
        let given = self.token.or(self.access_token);
        given.filter(|token| !token.is_empty())
    }
}

/// Whether the credential can be used with each request.
pub fn basic_of(credential: Option<&Credential>) -> Option<HeaderValue> {
    match credential {
        Some(Credential::Password { user, password }) => basic(user, password),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn challenge(values: &[&str]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(WWW_AUTHENTICATE, value.parse().unwrap());
        }
        Challenge::of(&headers)
    }

    #[test]
    fn tokens_come_before_passwords() {
        let bearer = Challenge::Bearer {
            realm: "https://auth.example/token".into(),
            service: Some("registry.example".into()),
        };
        let text = r#"Bearer realm="https://auth.example/token",service="registry.example",scope="repository:a:pull""#;
        assert_eq!(challenge(&[text]), Some(bearer.clone()));
        assert_eq!(challenge(&[r#"basic realm="x""#, text]), Some(bearer));
        assert_eq!(
            challenge(&[r#"Basic realm="Registry Realm""#]),
            Some(Challenge::Basic)
        );
        for nothing in ["Bearer service=\"x\"", "Negotiate", "=,\"", ""] {
            assert_eq!(challenge(&[nothing]), None, "{nothing}");
        }
    }

    #[test]
    fn what_cannot_be_in_a_header_is_none() {
        assert_eq!(
            basic("Aladdin", "open sesame").unwrap(),
            "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="
        );
        assert!(bearer("a\r\nb").is_none());
    }
}
