//! `login`, `logout`: credentials for registries, where docker and podman look for them too.

use std::io::{self, BufRead, IsTerminal, Read, Write};

use caisson_registry::{DockerConfig, Kept};
use caisson_rootfs_builder::Reference;
use caisson_sandbox::Config;
use clap::ArgMatches;

use crate::{arguments::one, error::Error, output::say, pull, terminal::NoEcho};

/// docker's default.
const DEFAULT: &str = "docker.io";
/// Longest password that is read, in bytes.
const LONGEST: u64 = 64 << 10;

/// Runs `login`.
///
/// # Errors
/// The registry refuses the credentials, or they cannot be kept.
pub fn log_in(matches: &ArgMatches) -> Result<u8, Error> {
    let registry = registry(one(matches, "server"))?;
    let given = one(matches, "username").filter(|user| !user.is_empty());
    let (user, password) = if matches.get_flag("password-stdin") {
        let user = given.ok_or_else(|| {
            Error::Usage("--password-stdin: give the user name too, by -u NAME".to_owned())
        })?;
        (user.to_owned(), read_password()?)
    } else {
        let user = match given {
            Some(user) => user.to_owned(),
            None => ask("Username: ", true)?,
        };
        let password = match one(matches, "password") {
            Some(password) => {
                eprintln!(
                    "WARNING! Using --password via the CLI is insecure. Use --password-stdin."
                );
                password.to_owned()
            }
            None => ask("Password: ", false)?,
        };
        (user, password)
    };
    if user.is_empty() || password.is_empty() || user.contains(':') {
        return Err(Error::Usage(
            "a user name without ':' and a password are needed".to_owned(),
        ));
    }
    let config = Config::load(None)?;
    // What is wrong with the file is told before a password goes anywhere.
    let path = DockerConfig::locate();
    let mut file = DockerConfig::read(&path)?;
    pull::client(&config).log_in(&registry, &user, &password)?;
    if let Kept::File(path) = file.store(&registry, &user, &password)? {
        eprintln!(
            "WARNING! Your credentials are stored unencrypted in '{}'.\n\
             A credential helper keeps them safer: credsStore in that file.",
            path.display()
        );
    }
    say!("Login Succeeded");
    Ok(0)
}

/// Runs `logout`.
///
/// # Errors
/// docker's configuration cannot be changed.
pub fn log_out(matches: &ArgMatches) -> Result<u8, Error> {
    let registry = registry(one(matches, "server"))?;
    let mut file = DockerConfig::read(&DockerConfig::locate())?;
    let server = caisson_registry::server_name(&registry);
    if file.erase(&registry)? {
        say!("Removing login credentials for {server}");
    } else {
        say!("Not logged in to {server}");
    }
    Ok(0)
}

/// The registry that the user means; docker takes addresses too.
fn registry(given: Option<&str>) -> Result<String, Error> {
    let Some(given) = given.filter(|given| !given.is_empty()) else {
        return Ok(DEFAULT.to_owned());
    };
    let rest = given.split_once("://").map_or(given, |(_, rest)| rest);
    let host = rest.split('/').next().unwrap_or(rest);
    let parsed = format!("{host}/x/y").parse::<Reference>().ok();
    // A first component that is no host would be a part of the repository.
    parsed
        .filter(|reference| reference.repository() == "x/y")
        .map(|reference| reference.registry().to_owned())
        .ok_or_else(|| {
            Error::Usage(format!(
                "{given:?} is no registry: expected a host name with a dot, or with a port"
            ))
        })
}

/// All of standard input but the line's end.
fn read_password() -> Result<String, Error> {
    let mut password = String::new();
    io::stdin()
        .lock()
        .take(LONGEST)
        .read_to_string(&mut password)
        .map_err(Error::io("read the password"))?;
    let end = password.trim_end_matches(['\r', '\n']).len();
    password.truncate(end);
    Ok(password)
}

/// Asks whoever sits at the terminal.
fn ask(prompt: &str, shown: bool) -> Result<String, Error> {
    if !io::stdin().is_terminal() {
        return Err(Error::Usage(
            "there is no terminal to ask for the user name and password: \
             give -u NAME and --password-stdin"
                .to_owned(),
        ));
    }
    eprint!("{prompt}");
    let _ = io::stderr().flush();
    let hidden = if shown { None } else { Some(NoEcho::enter()?) };
    let mut line = String::new();
    io::stdin()
        .lock()
        .take(LONGEST)
        .read_line(&mut line)
        .map_err(Error::io("read the answer"))?;
    if hidden.is_some() {
        eprintln!();
    }
    Ok(line.trim_end_matches(['\r', '\n']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registries_are_hosts() {
        for (given, expected) in [
            (None, "docker.io"),
            (Some("docker.io"), "docker.io"),
            (Some("https://index.docker.io/v1/"), "docker.io"),
            (Some("quay.io"), "quay.io"),
            (Some("https://r.example:5000/"), "r.example:5000"),
            (Some("localhost:5000"), "localhost:5000"),
            (Some("[::1]:5000"), "[::1]:5000"),
        ] {
            assert_eq!(registry(given).unwrap(), expected, "{given:?}");
        }
        for given in ["no host", "/", "library", "a..b", "host:port"] {
            assert!(registry(Some(given)).is_err(), "{given}");
        }
    }
}
