//! The file itself. What we do not know in it stays as it is.

use std::fs::{self, DirBuilder};
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Value, json};

use super::helper::Helper;
use super::{Credential, CredentialError};
use crate::server_name;

/// docker's configuration of one user.
#[derive(Debug)]
pub struct DockerConfig {
    path: PathBuf,
    json: Map<String, Value>,
}

/// Where credentials were put.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kept {
    /// In the file, which anybody who can read it can use.
    File(PathBuf),
    /// In a helper's keeping; its program.
    Helper(String),
}

impl DockerConfig {
    /// `$DOCKER_CONFIG/config.json`, or `.docker/config.json` in the home directory.
    pub fn locate() -> PathBuf {
        let directory = std::env::var_os("DOCKER_CONFIG").filter(|value| !value.is_empty());
        let directory = directory.map_or_else(
            || {
                let home = std::env::var_os("HOME").filter(|home| !home.is_empty());
                PathBuf::from(home.unwrap_or_else(|| "/root".into())).join(".docker")
            },
            PathBuf::from,
        );
        directory.join("config.json")
    }

    /// Reads the file; that there is none is as if it were empty.
    ///
    /// # Errors
    /// [`CredentialError::File`], [`CredentialError::Malformed`].
    pub fn read(path: &Path) -> Result<Self, CredentialError> {
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(source) => {
                return Err(CredentialError::File {
                    action: "read",
                    path: path.to_owned(),
                    source,
                });
            }
        };
        let json = if text.trim_ascii().is_empty() {
            Map::new()
        } else {
            serde_json::from_slice(&text).map_err(|error| CredentialError::Malformed {
                path: path.to_owned(),
                reason: error.to_string(),
            })?
        };
        Ok(Self {
            path: path.to_owned(),
            json,
        })
    }

    /// The credential for a registry, by its name in references.
    ///
    /// # Errors
    /// [`CredentialError`].
    pub fn credential(&self, registry: &str) -> Result<Option<Credential>, CredentialError> {
        let server = server_name(registry);
        match self.helper(registry)? {
            // As docker: what the helper has not may be in the file.
            Some(helper) => match helper.get(server)? {
                Some(found) => Ok(Some(found)),
                None => self.entry_credential(registry),
            },
            None => self.entry_credential(registry),
        }
    }

    /// Keeps a password for a registry.
    ///
    /// # Errors
    /// [`CredentialError`].
    pub fn store(
        &mut self,
        registry: &str,
        user: &str,
        password: &str,
    ) -> Result<Kept, CredentialError> {
        let server = server_name(registry).to_owned();
        let helper = self.helper(registry)?;
        let entry = match &helper {
            Some(helper) => {
                helper.store(&server, user, password)?;
                json!({})
            }
            None => json!({ "auth": STANDARD.encode(format!("{user}:{password}")) }),
        };
        self.remove_entries(registry);
        self.auths_mut()?.insert(server, entry);
        self.write()?;
        Ok(match helper {
            Some(helper) => Kept::Helper(helper.program().to_owned()),
            None => Kept::File(self.path.clone()),
        })
    }

    /// Forgets a registry; whether there was anything to forget.
    ///
    /// # Errors
    /// [`CredentialError`].
    pub fn erase(&mut self, registry: &str) -> Result<bool, CredentialError> {
        let mut found = false;
        if let Some(helper) = self.helper(registry)?
            && helper.get(server_name(registry))?.is_some()
        {
            helper.erase(server_name(registry))?;
            found = true;
        }
        if self.remove_entries(registry) {
            self.write()?;
            found = true;
        }
        Ok(found)
    }

    /// The helper that is set for a registry, or for all.
    fn helper(&self, registry: &str) -> Result<Option<Helper>, CredentialError> {
        let own = self.json.get("credHelpers");
        let own = own.and_then(|helpers| {
            helpers
                .get(registry)
                .or_else(|| helpers.get(server_name(registry)))
        });
        let name = own.or_else(|| self.json.get("credsStore"));
        match name.map(|name| name.as_str()) {
            None | Some(Some("")) => Ok(None),
            Some(Some(name)) => Helper::new(name).map(Some),
            Some(None) => Err(self.malformed("the name of a credential helper is no text")),
        }
    }

    fn malformed(&self, reason: &str) -> CredentialError {
        CredentialError::Malformed {
            path: self.path.clone(),
            reason: reason.to_owned(),
        }
    }

    fn entry_credential(&self, registry: &str) -> Result<Option<Credential>, CredentialError> {
        let auths = self.json.get("auths").and_then(Value::as_object);
        let Some(auths) = auths else { return Ok(None) };
        let exact = auths.get(server_name(registry));
        let alike = || auths.iter().find(|(key, _)| is_entry_of(key, registry));
        let Some(entry) = exact.or_else(|| alike().map(|(_, entry)| entry)) else {
            return Ok(None);
        };
        let text = |key: &str| {
            let value = entry.get(key).and_then(Value::as_str);
            value.filter(|value| !value.is_empty()).map(str::to_owned)
        };
        if let Some(token) = text("identitytoken") {
            return Ok(Some(Credential::IdentityToken(token)));
        }
        if let Some(token) = text("registrytoken") {
            return Ok(Some(Credential::RegistryToken(token)));
        }
        if let (Some(user), Some(password)) = (text("username"), text("password")) {
            return Ok(Some(Credential::Password { user, password }));
        }
        let Some(encoded) = text("auth") else {
            return Ok(None);
        };
        let decoded = STANDARD.decode(encoded.trim()).ok();
        let decoded = decoded.and_then(|bytes| String::from_utf8(bytes).ok());
        let pair = decoded.as_deref().and_then(|pair| pair.split_once(':'));
        match pair {
            Some((user, password)) => Ok(Some(Credential::Password {
                user: user.to_owned(),
                password: password.trim_end_matches('\0').to_owned(),
            })),
            None => Err(self.malformed(&format!(
                "auth of {registry} is not the base64 of NAME:PASSWORD"
            ))),
        }
    }

    fn auths_mut(&mut self) -> Result<&mut Map<String, Value>, CredentialError> {
        let path = self.path.clone();
        let auths = self.json.entry("auths").or_insert_with(|| json!({}));
        auths.as_object_mut().ok_or(CredentialError::Malformed {
            path,
            reason: "auths is no object".to_owned(),
        })
    }

    /// Whether there were any.
    fn remove_entries(&mut self, registry: &str) -> bool {
        let Some(Value::Object(auths)) = self.json.get_mut("auths") else {
            return false;
        };
        let before = auths.len();
        auths.retain(|key, _| key != server_name(registry) && !is_entry_of(key, registry));
        auths.len() < before
    }

    /// Replaces the file, readable by its owner only.
    fn write(&self) -> Result<(), CredentialError> {
        // Many keep their configuration behind a symbolic link, which has to stay.
        let path = fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        let failed = |source| CredentialError::File {
            action: "write",
            path: path.clone(),
            source,
        };
        let directory = path.parent().unwrap_or(Path::new("/"));
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(failed)?;
        let mut text = serde_json::to_vec_pretty(&self.json)
            .map_err(|error| failed(io::Error::other(error)))?;
        text.push(b'\n');
        // Made with mode 0600.
        let mut file = tempfile::Builder::new()
            .prefix(".config.json-")
            .tempfile_in(directory)
            .map_err(failed)?;
        file.write_all(&text).map_err(failed)?;
        file.as_file().sync_all().map_err(failed)?;
        file.persist(&path).map_err(|error| failed(error.error))?;
        Ok(())
    }
}

/// Whether a key of `auths`, which may be an address, means the registry.
fn is_entry_of(key: &str, registry: &str) -> bool {
    let host = |text: &str| {
        let rest = text.split_once("://").map_or(text, |(_, rest)| rest);
        rest.split('/').next().unwrap_or(rest).to_ascii_lowercase()
    };
    host(key) == host(server_name(registry))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn config(text: &str) -> (tempfile::TempDir, DockerConfig) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        fs::write(&path, text).unwrap();
        let config = DockerConfig::read(&path).unwrap();
        (directory, config)
    }

    fn password(user: &str, password: &str) -> Option<Credential> {
        Some(Credential::Password {
            user: user.into(),
            password: password.into(),
        })
    }

    #[test]
    fn entries_are_found_by_host() {
        let (_directory, config) = config(
            r#"{"auths": {
                "https://index.docker.io/v1/": {"auth": "dTpwOnc="},
                "https://r.example:5000/v2/": {"username": "a", "password": "b"},
                "t.example": {"auth": "eDp5", "identitytoken": "tok"},
                "bad.example": {"auth": "!"},
                "empty.example": {}
            }}"#,
        );
        assert_eq!(
            config.credential("docker.io").unwrap(),
            password("u", "p:w")
        );
        assert_eq!(
            config.credential("r.example:5000").unwrap(),
            password("a", "b")
        );
        assert_eq!(
            config.credential("t.example").unwrap(),
            Some(Credential::IdentityToken("tok".into()))
        );
        for none in ["r.example", "empty.example", "example"] {
            assert_eq!(config.credential(none).unwrap(), None, "{none}");
        }
        let error = config.credential("bad.example").unwrap_err().to_string();
        assert!(error.contains("bad.example"), "{error}");
    }

    #[test]
    fn what_is_unknown_stays_and_the_file_is_its_owners() {
        let (directory, mut config) = config(
            r#"{"detachKeys": "ctrl-e", "auths": {"old.example": {"auth": "eDp5", "more": 1}}}"#,
        );
        let kept = config.store("docker.io", "u", "p").unwrap();
        let path = directory.path().join("config.json");
        assert_eq!(kept, Kept::File(path.clone()));
        let mode = fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let mut again = DockerConfig::read(&path).unwrap();
        assert_eq!(again.credential("docker.io").unwrap(), password("u", "p"));
        assert_eq!(again.json["detachKeys"], "ctrl-e");
        assert_eq!(again.json["auths"]["old.example"]["more"], 1);
        assert!(again.erase("docker.io").unwrap());
        assert!(!again.erase("docker.io").unwrap());
        let last = DockerConfig::read(&path).unwrap();
        assert_eq!(last.credential("docker.io").unwrap(), None);
        assert_eq!(last.json["auths"]["old.example"]["auth"], "eDp5");
    }

    #[test]
    fn damaged_files_are_named_and_not_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        for text in ["[]", "{", "\u{0}"] {
            fs::write(&path, text).unwrap();
            let error = DockerConfig::read(&path).unwrap_err().to_string();
            assert!(error.contains("config.json"), "{error}");
        }
        fs::write(&path, r#"{"auths": 7}"#).unwrap();
        let mut config = DockerConfig::read(&path).unwrap();
        assert!(config.store("r.example", "u", "p").is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), r#"{"auths": 7}"#);
    }

    #[test]
    fn helpers_have_plain_names() {
        for name in ["../x", "a b", "", "a/b"] {
            assert!(Helper::new(name).is_err(), "{name}");
        }
        let (_directory, config) = config(r#"{"credsStore": "is-not-installed-anywhere"}"#);
        let error = config.credential("r.example").unwrap_err().to_string();
        assert!(
            error.contains("docker-credential-is-not-installed-anywhere"),
            "{error}"
        );
    }
}
