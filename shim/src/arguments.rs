//! The command line containerd uses (containerd: core/runtime/v2/README.md).

use std::path::PathBuf;

use crate::error::Error;

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// `-v`.
    Version,
    /// `-info`: what this runtime is, for containerd 2.0 and later.
    Info,
    /// `start`.
    Start,
    /// `delete`.
    Delete,
    /// None: serve the socket that is standard input.
    Serve,
}

/// The parsed command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Arguments {
    /// What to do.
    pub verb: Verb,
    /// containerd's namespace.
    pub namespace: String,
    /// The container (for `start` and `delete`), the pod (for the server).
    pub id: String,
    /// containerd's socket; empty = nobody to publish events to.
    pub address: String,
    /// containerd's socket for events; empty = nobody listens there.
    pub ttrpc_address: String,
    /// Program that publishes events.
    pub publish_binary: Option<PathBuf>,
    /// Directory of the container's config.json; the working directory when not given.
    pub bundle: Option<PathBuf>,
    /// Where the pod's socket shall be; our own directory when not given.
    pub socket_dir: Option<PathBuf>,
    /// Log more.
    pub debug: bool,
}

impl Arguments {
    /// Parses what follows the program's name. Go's flag package takes one dash or two, `-x=y` and
    /// `-x y`.
    ///
    /// # Errors
    /// Unknown flags and verbs, missing values.
    pub fn parse(words: impl Iterator<Item = String>) -> Result<Self, Error> {
        let mut parsed = Self {
            verb: Verb::Serve,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            ttrpc_address: std::env::var("TTRPC_ADDRESS").unwrap_or_default(),
            publish_binary: None,
            bundle: None,
            socket_dir: None,
            debug: false,
        };
        let mut words = words.peekable();
        while let Some(word) = words.next() {
            let Some(flag) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
                parsed.verb = match word.as_str() {
                    "start" => Verb::Start,
                    "delete" => Verb::Delete,
                    other => {
                        return Err(Error::Usage(format!(
                            "unknown verb \"{other}\"; there are start and delete"
                        )));
                    }
                };
                continue;
            };
            let (name, given) = match flag.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (flag.to_owned(), None),
            };
            let mut value = || {
                given
                    .clone()
                    .or_else(|| words.next())
                    .ok_or_else(|| Error::Usage(format!("-{name} needs a value")))
            };
            match name.as_str() {
                "namespace" => parsed.namespace = value()?,
                "id" => parsed.id = value()?,
                "address" => parsed.address = value()?,
                "publish-binary" => {
                    parsed.publish_binary =
                        Some(value()?.into()).filter(|path: &PathBuf| !path.as_os_str().is_empty())
                }
                "bundle" => parsed.bundle = Some(value()?.into()),
                "ttrpc-address" => parsed.ttrpc_address = value()?,
                "debug" => parsed.debug = given.as_deref() != Some("false"),
                "v" | "version" => parsed.verb = Verb::Version,
                "info" => parsed.verb = Verb::Info,
                other => return Err(Error::Usage(format!("unknown flag -{other}"))),
            }
        }
        // Those of `start` may be on its standard input instead.
        if !matches!(parsed.verb, Verb::Version | Verb::Info | Verb::Start) {
            parsed.check()?;
        }
        Ok(parsed)
    }

    /// Whether all is there that each verb about a container needs.
    ///
    /// # Errors
    /// What is missing.
    pub fn check(&self) -> Result<(), Error> {
        for (name, value) in [("namespace", &self.namespace), ("id", &self.id)] {
            if value.is_empty() {
                return Err(Error::Usage(format!("-{name} is missing")));
            }
        }
        Ok(())
    }

    /// Directory of the container's config.json.
    ///
    /// # Errors
    /// The working directory is gone.
    pub fn bundle(&self) -> Result<PathBuf, Error> {
        match &self.bundle {
            Some(bundle) => Ok(bundle.clone()),
            None => std::env::current_dir().map_err(Error::io("find the working directory")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Arguments, Error> {
        Arguments::parse(line.split(' ').map(str::to_owned))
    }

    #[test]
    fn containerds_own_line() {
        let line = "-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd -id=abc -debug start";
        let parsed = parse(line).unwrap();
        assert_eq!(
            (parsed.verb, parsed.namespace.as_str(), parsed.id.as_str()),
            (Verb::Start, "k8s.io", "abc")
        );
        assert!(parsed.debug && parsed.publish_binary.is_some());
    }

    #[test]
    fn mistakes() {
        assert!(
            parse("-namespace n -id i strat")
                .unwrap_err()
                .to_string()
                .contains("strat")
        );
        assert!(
            parse("-namespace n delete")
                .unwrap_err()
                .to_string()
                .contains("-id")
        );
        assert_eq!(parse("-info").unwrap().verb, Verb::Info);
        assert!(parse("-x").is_err());
        assert!(parse("-id").is_err());
    }
}
