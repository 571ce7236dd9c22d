//! One repository at one place: requests with whatever authorization it asks for.

use std::cell::RefCell;
use std::time::Duration;

use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderValue, RANGE, RETRY_AFTER};
use reqwest::redirect::Policy;
use reqwest::{Response, StatusCode, Url};

use crate::auth::{self, Challenge, TokenAnswer};
use crate::certificates::Certificates;
use crate::credentials::Credential;
use crate::error::{Error, Result, root_cause};
use crate::place::{Place, is_loopback};
use crate::{Client, Options};

/// Longest answer of a token service, and longest text of an error that is read, in bytes.
const MOST_TEXT: u64 = 1 << 20;
/// Redirects that are followed for one request.
const MOST_REDIRECTS: usize = 10;
/// Who we are.
const USER_AGENT: &str = concat!("caisson/", env!("CARGO_PKG_VERSION"));

/// An open way to a repository.
#[derive(Debug)]
pub struct Session<'a> {
    /// Host and port, for messages.
    pub host: String,
    options: &'a Options,
    http: reqwest::Client,
    base: String,
    scope: Option<String>,
    credential: Option<Credential>,
    authorization: RefCell<Option<HeaderValue>>,
}

/// Sensitive to what an error means for the credentials.
enum Purpose {
    Pull,
    LogIn,
}

impl Client {
    /// Finds out how the place speaks, and gets authorization for `repository` if it wants any.
    pub(crate) async fn connect(
        &self,
        place: &Place,
        repository: Option<&str>,
        credential: Option<Credential>,
    ) -> Result<Session<'_>> {
        let certificates = Certificates::of(&place.host, &self.options.certificates)?;
        let mut last = None;
        for scheme in place.schemes {
            let http = http_client(place, scheme, &certificates, &self.options)?;
            let session = Session {
                host: place.host.clone(),
                options: &self.options,
                http,
                base: format!("{scheme}://{}/v2/", place.host),
                scope: repository.map(|repository| format!("repository:{repository}:pull")),
                credential: credential.clone(),
                authorization: RefCell::new(None),
            };
            match session.ping().await {
                Ok(Some(challenge)) => {
                    let purpose = match repository {
                        Some(_) => Purpose::Pull,
                        None => Purpose::LogIn,
                    };
                    session.authorize(&challenge, &purpose).await?;
                    return Ok(session);
                }
                Ok(None) => return Ok(session),
                // A server that cannot be trusted is no reason to speak to it in the clear.
                Err(error @ Error::Tls { .. }) => return Err(error),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| Error::Connect {
            registry: place.host.clone(),
            reason: "there is no way to it".to_owned(),
        }))
    }
}

fn http_client(
    place: &Place,
    scheme: &str,
    certificates: &Certificates,
    options: &Options,
) -> Result<reqwest::Client> {
    // Whoever came first has set it; they are the same.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let builder = || {
        let secure = scheme == "https" && place.verify;
        let mut builder = reqwest::Client::builder()
            .user_agent(USER_AGENT)
            .connect_timeout(options.connect_timeout)
            .read_timeout(options.idle_timeout)
            .redirect(Policy::custom(move |attempt| {
                if attempt.previous().len() > MOST_REDIRECTS
                    || (secure && attempt.url().scheme() != "https")
                {
                    attempt.error("redirect")
                } else {
                    attempt.follow()
                }
            }))
            .danger_accept_invalid_certs(!place.verify);
        // No proxy has this machine's own registries.
        if is_loopback(&place.host) {
            builder = builder.no_proxy();
        }
        if let Some(identity) = &certificates.identity {
            builder = builder.identity(identity.clone());
        }
        builder
    };
    let authorities = || certificates.authorities.iter().cloned();
    let built = builder().tls_certs_merge(authorities()).build();
    match built {
        Ok(client) => Ok(client),
        // A host without any certificates of authorities trusts nobody else.
        Err(_) => builder().tls_certs_only(authorities()).build(),
    }
    .map_err(|error| Error::Tls {
        registry: place.host.clone(),
        reason: root_cause(&error),
    })
}

impl Session<'_> {
    /// What the registry asks for, if anything.
    async fn ping(&self) -> Result<Option<Challenge>> {
        let request = self.http.get(&self.base);
        let response = self.answer("/v2/", async { request.send().await }).await?;
        match response.status() {
            StatusCode::UNAUTHORIZED => Challenge::of(response.headers())
                .map(Some)
                .ok_or_else(|| self.senseless("/v2/", "401 without a known way to log in")),
            // Some have nothing at their root, and still images.
            StatusCode::NOT_FOUND => Ok(None),
            status if status.is_success() => Ok(None),
            _ => Err(self.refusal("/v2/", response).await),
        }
    }

    /// The wait before a second try.
    pub fn backoff(&self) -> Duration {
        self.options.backoff
    }

    /// The next bytes of a transfer.
    pub async fn chunk(
        &self,
        response: &mut Response,
        what: &str,
    ) -> Result<Option<impl std::ops::Deref<Target = [u8]> + use<>>> {
        let timeout = self.options.idle_timeout;
        let chunk = response.chunk().await;
        chunk.map_err(|error| Error::http(&self.host, what, timeout, &error))
    }

    fn senseless(&self, what: &str, reason: &str) -> Error {
        Error::Protocol {
            registry: self.host.clone(),
            what: what.to_owned(),
            reason: reason.to_owned(),
        }
    }

    /// Runs a request up to its answer's head, within the time for answers.
    async fn answer(
        &self,
        what: &str,
        request: impl Future<Output = reqwest::Result<Response>>,
    ) -> Result<Response> {
        let timeout = self.options.answer_timeout;
        match tokio::time::timeout(timeout, request).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(error)) => Err(Error::http(
                &self.host,
                what,
                self.options.idle_timeout,
                &error,
            )),
            Err(_) => Err(self.late(what)),
        }
    }

    fn late(&self, what: &str) -> Error {
        Error::Timeout {
            registry: self.host.clone(),
            what: what.to_owned(),
            timeout: self.options.answer_timeout,
        }
    }

    /// Gets what the challenge asks for.
    async fn authorize(&self, challenge: &Challenge, purpose: &Purpose) -> Result<()> {
        let header = match (challenge, &self.credential) {
            (_, Some(Credential::RegistryToken(token))) => auth::bearer(token),
            (Challenge::Basic, credential) => match auth::basic_of(credential.as_ref()) {
                Some(header) => Some(header),
                None => return Err(self.unauthorized("it", String::new())),
            },
            (Challenge::Bearer { realm, service }, _) => {
                let token = self.token(realm, service.as_deref(), purpose).await?;
                auth::bearer(&token)
            }
        };
        let header = header.ok_or_else(|| self.senseless("a token", "it cannot be used"))?;
        *self.authorization.borrow_mut() = Some(header);
        Ok(())
    }

    fn unauthorized(&self, what: &str, reason: String) -> Error {
        Error::Unauthorized {
            registry: self.host.clone(),
            what: match &self.scope {
                Some(scope) if what == "it" => scope
                    .trim_start_matches("repository:")
                    .trim_end_matches(":pull")
                    .to_owned(),
                _ => what.to_owned(),
            },
            reason,
        }
    }

    /// A token of the service that the registry trusts.
    async fn token(&self, realm: &str, service: Option<&str>, purpose: &Purpose) -> Result<String> {
        let what = "a token";
        let url = Url::parse(realm)
            .ok()
            .filter(|url| matches!(url.scheme(), "http" | "https"))
            .ok_or_else(|| self.senseless(what, "its token service has no http address"))?;
        // Who listens on the way to us must not get a password that the registry itself gets encrypted.
        if url.scheme() == "http" && self.base.starts_with("https:") && self.credential.is_some() {
            return Err(self.senseless(
                what,
                "its token service wants a password without encryption",
            ));
        }
        let mut query: Vec<(&str, &str)> = Vec::new();
        query.extend(service.map(|service| ("service", service)));
        query.extend(self.scope.as_deref().map(|scope| ("scope", scope)));
        let request = match &self.credential {
            Some(Credential::IdentityToken(token)) => {
                query.extend([
                    ("grant_type", "refresh_token"),
                    ("client_id", "caisson"),
                    ("refresh_token", token),
                ]);
                self.http.post(url).form(&query)
            }
            Some(Credential::Password { user, password }) => {
                query.push(("account", user));
                self.http
                    .get(url)
                    .query(&query)
                    .basic_auth(user, Some(password))
            }
            _ => self.http.get(url).query(&query),
        };
        let response = self.answer(what, async { request.send().await }).await?;
        let status = response.status();
        if !status.is_success() {
            return Err(match self.refusal("it", response).await {
                Error::Unauthorized {
                    registry, reason, ..
                } if matches!(purpose, Purpose::LogIn) => {
                    Error::BadCredentials { registry, reason }
                }
                other => other,
            });
        }
        let body = self.body(response, what, MOST_TEXT).await?;
        let answer: TokenAnswer = serde_json::from_slice(&body)
            .map_err(|error| self.senseless(what, &error.to_string()))?;
        answer
            .token()
            .ok_or_else(|| self.senseless(what, "there is none in the answer"))
    }

    /// `GET /v2/<path>`, authorized; an answer that is no success is an error. `what` is asked for.
    pub async fn get(
        &self,
        path: &str,
        what: &str,
        accept: Option<&'static str>,
        from: Option<u64>,
    ) -> Result<Response> {
        let mut renewed = false;
        loop {
            let mut headers = HeaderMap::new();
            if let Some(accept) = accept {
                headers.insert(ACCEPT, HeaderValue::from_static(accept));
            }
            if let Some(from) = from {
                let range = HeaderValue::from_str(&format!("bytes={from}-"));
                headers.extend(range.ok().map(|range| (RANGE, range)));
            }
            if let Some(authorization) = &*self.authorization.borrow() {
                headers.insert(AUTHORIZATION, authorization.clone());
            }
            let request = self
                .http
                .get(format!("{}{path}", self.base))
                .headers(headers);
            let response = self.answer(what, async { request.send().await }).await?;
            if response.status().is_success() {
                return Ok(response);
            }
            // Tokens get old during long transfers.
            if response.status() == StatusCode::UNAUTHORIZED
                && !renewed
                && let Some(challenge @ Challenge::Bearer { .. }) =
                    Challenge::of(response.headers())
            {
                self.authorize(&challenge, &Purpose::Pull).await?;
                renewed = true;
                continue;
            }
            return Err(self.refusal(what, response).await);
        }
    }

    /// Whether the registry takes the credential at its root.
    pub async fn check(&self) -> Result<()> {
        match self.get("", "/v2/", None, None).await {
            Ok(_) => Ok(()),
            Err(Error::Unauthorized {
                registry, reason, ..
            }) => Err(Error::BadCredentials { registry, reason }),
            Err(error) => Err(error),
        }
    }

    /// The whole of a small answer.
    pub async fn body(&self, mut response: Response, what: &str, limit: u64) -> Result<Vec<u8>> {
        let too_large = |found| Error::TooLarge {
            registry: self.host.clone(),
            what: what.to_owned(),
            found,
            limit,
        };
        if let Some(length) = response.content_length().filter(|&length| length > limit) {
            return Err(too_large(length));
        }
        let reading = async {
            let mut body = Vec::new();
            loop {
                match response.chunk().await {
                    Ok(Some(chunk)) => {
                        body.extend_from_slice(&chunk);
                        if body.len() as u64 > limit {
                            return Err(too_large(body.len() as u64));
                        }
                    }
                    Ok(None) => return Ok(body),
                    Err(error) => {
                        return Err(Error::http(
                            &self.host,
                            what,
                            self.options.idle_timeout,
                            &error,
                        ));
                    }
                }
            }
        };
        match tokio::time::timeout(self.options.answer_timeout, reading).await {
            Ok(body) => body,
            Err(_) => Err(self.late(what)),
        }
    }

    /// What an answer that is no success means.
    async fn refusal(&self, what: &str, response: Response) -> Error {
        let status = response.status();
        let after = response.headers().get(RETRY_AFTER);
        let after = after.and_then(|value| value.to_str().ok()?.parse().ok());
        let body = self.body(response, what, MOST_TEXT).await;
        let reason = body.map(|body| words(&body)).unwrap_or_default();
        let registry = self.host.clone();
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => self.unauthorized(what, reason),
            StatusCode::NOT_FOUND => Error::NotFound {
                registry,
                what: what.to_owned(),
                reason,
            },
            StatusCode::TOO_MANY_REQUESTS => Error::RateLimited {
                registry,
                reason,
                after: after.map(Duration::from_secs),
            },
            status => Error::Status {
                registry,
                what: what.to_owned(),
                status: status.as_u16(),
                reason,
            },
        }
    }
}

/// The words of an error (distribution specification, "Error Codes"), shortened.
fn words(body: &[u8]) -> String {
    let json: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let first = json.get("errors").and_then(|errors| errors.get(0));
    let message = first
        .and_then(|error| error.get("message"))
        .or_else(|| json.get("details"))
        .and_then(|message| message.as_str());
    message
        .unwrap_or_default()
        .chars()
        .take(200)
        .flat_map(char::escape_debug)
        .collect()
}
