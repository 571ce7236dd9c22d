//! `pull`, and the images that `run` does not find.

mod progress;

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;

use caisson_registry::{Access, Client, DockerConfig, Options};
use caisson_rootfs_builder::{Image, PLATFORM, Reference};
use caisson_sandbox::{Config, scaled};
use clap::ArgMatches;

use crate::{arguments::one, container::Containers, error::Error, output::say};
use progress::{Lines, Report, Silent};

/// When `run` pulls its image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// Even if it is here: it may have changed there.
    Always,
    /// If it is not here.
    Missing,
    /// Not at all.
    Never,
}

impl Policy {
    /// The value of `--pull`.
    ///
    /// # Errors
    /// It is none.
    pub fn of(text: Option<&str>) -> Result<Self, Error> {
        match text {
            None | Some("missing") => Ok(Self::Missing),
            Some("always") => Ok(Self::Always),
            Some("never") => Ok(Self::Never),
            Some(other) => Err(Error::Usage(format!(
                "--pull {other}: there are always, missing and never"
            ))),
        }
    }
}

/// A client by the host's configuration.
pub fn client(config: &Config) -> Client {
    let mut options = Options::new(DockerConfig::locate());
    for (name, registry) in &config.registries {
        let access = Access {
            mirrors: registry.mirrors.clone(),
            insecure: registry.insecure,
        };
        options.registries.insert(name.clone(), access);
    }
    for timeout in [
        &mut options.connect_timeout,
        &mut options.idle_timeout,
        &mut options.answer_timeout,
    ] {
        *timeout = scaled(*timeout);
    }
    options.certificates = Options::CERTIFICATES.iter().map(PathBuf::from).collect();
    Client::new(options)
}

fn parse(name: &str) -> Result<Reference, Error> {
    Ok(name
        .parse::<Reference>()
        .map_err(caisson_rootfs_builder::Error::from)?)
}

/// Runs the verb.
///
/// # Errors
/// The image cannot be had; nothing of it is kept.
pub fn run(matches: &ArgMatches) -> Result<u8, Error> {
    let name = one(matches, "image").unwrap_or_default();
    let reference = parse(name)?;
    if let Some(platform) = one(matches, "platform") {
        check_platform(platform)?;
    }
    let containers = Containers::open()?;
    let client = client(&containers.config);
    let store = containers.images()?;
    if matches.get_flag("quiet") {
        client.pull(&store, &reference, &Silent)?;
    } else {
        let terminal = io::stdout().is_terminal();
        pull(
            &containers,
            &client,
            &reference,
            name,
            terminal,
            io::stdout(),
        )?;
    }
    say!("{reference}");
    Ok(0)
}

fn check_platform(platform: &str) -> Result<(), Error> {
    let same = matches!(
        platform,
        PLATFORM | "linux/x86_64" | "linux/x86-64" | "linux"
    );
    if same {
        return Ok(());
    }
    Err(Error::Usage(format!(
        "--platform {platform}: microVMs of this host run {PLATFORM} only"
    )))
}

/// Pulls and tells how far it is, with docker's words.
fn pull(
    containers: &Containers,
    client: &Client,
    reference: &Reference,
    given: &str,
    terminal: bool,
    out: impl Write,
) -> Result<(), Error> {
    let report = Report::new(Lines::new(out, terminal));
    let what = match (reference.digest(), reference.tag()) {
        (Some(digest), _) => digest.to_string(),
        (None, tag) => tag.unwrap_or_default().to_owned(),
    };
    if reference.digest().is_none() && !given.ends_with(&format!(":{what}")) {
        report.say(&format!("Using default tag: {what}"));
    }
    report.say(&format!(
        "{what}: Pulling from {}",
        match reference.registry() {
            "docker.io" => reference.repository().to_owned(),
            _ => reference.name(),
        }
    ));
    let pulled = client.pull(&containers.images()?, reference, &report);
    report.end(pulled.is_ok());
    let pulled = pulled?;
    report.say(&format!("Digest: {}", pulled.digest));
    let name = reference.familiar();
    report.say(&if pulled.newer {
        format!("Status: Downloaded newer image for {name}")
    } else {
        format!("Status: Image is up to date for {name}")
    });
    Ok(())
}

/// The image that `run` was given; whatever is told of a pull goes to standard error.
///
/// # Errors
/// There is none, or it cannot be pulled.
pub fn image(
    containers: &Containers,
    name: &str,
    policy: Policy,
    quiet: bool,
) -> Result<Image, Error> {
    let store = containers.images()?;
    match (store.get(name), policy) {
        (Ok(image), Policy::Missing | Policy::Never) => Ok(image),
        (Err(error @ caisson_rootfs_builder::Error::NotFound { .. }), Policy::Never) => {
            Err(error.into())
        }
        (Err(caisson_rootfs_builder::Error::NotFound { .. }), Policy::Missing)
        | (_, Policy::Always) => {
            let reference = parse(name)?;
            let client = client(&containers.config);
            if policy == Policy::Missing && !quiet {
                eprintln!("Unable to find image '{}' locally", reference.familiar());
            }
            let pulled = if quiet {
                client
                    .pull(&store, &reference, &Silent)
                    .map(|_| ())
                    .map_err(Error::from)
            } else {
                let terminal = io::stderr().is_terminal();
                pull(
                    containers,
                    &client,
                    &reference,
                    name,
                    terminal,
                    io::stderr(),
                )
            };
            match pulled {
                Err(Error::Registry(source)) if policy == Policy::Missing => Err(Error::NoImage {
                    name: name.to_owned(),
                    source,
                }),
                Err(error) => Err(error),
                Ok(()) => Ok(store.get(name)?),
            }
        }
        (Err(error), _) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_and_policies_that_are_not_are_refused() {
        for platform in ["linux/arm64", "windows/amd64", "", "linux/amd64/v9"] {
            assert!(check_platform(platform).is_err(), "{platform}");
        }
        check_platform("linux/amd64").unwrap();
        assert_eq!(Policy::of(None).unwrap(), Policy::Missing);
        assert!(Policy::of(Some("sometimes")).is_err());
    }
}
