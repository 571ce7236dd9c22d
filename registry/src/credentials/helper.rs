//! Programs that keep credentials: `docker-credential-NAME get|store|erase`, JSON on standard input and output.

use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{Credential, CredentialError};

/// A helper may ask its user for a key's passphrase.
const DEADLINE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(10);
/// Longest answer that is read, in bytes.
const MOST: u64 = 1 << 20;
/// What helpers say when they have nothing; docker goes by this text too.
const NOT_FOUND: &str = "credentials not found in native keychain";
/// The user name that marks an identity token.
const TOKEN: &str = "<token>";

/// A helper by its name in docker's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Helper {
    program: String,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Entry {
    #[serde(rename = "ServerURL", default)]
    server: String,
    username: String,
    secret: String,
}

impl Helper {
    pub fn new(name: &str) -> Result<Self, CredentialError> {
        let program = format!("docker-credential-{name}");
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        if name.is_empty() || !name.bytes().all(plain) {
            return Err(CredentialError::Helper {
                program: format!("{program:?}"),
                reason: "this is no name of a program".to_owned(),
            });
        }
        Ok(Self { program })
    }

    /// What it keeps for a server.
    pub fn get(&self, server: &str) -> Result<Option<Credential>, CredentialError> {
        let (success, output) = self.run("get", server.as_bytes())?;
        let text = String::from_utf8_lossy(&output);
        if !success {
            return match text.trim() {
                NOT_FOUND => Ok(None),
                other => Err(self.failed(other)),
            };
        }
        let entry: Entry =
            serde_json::from_slice(&output).map_err(|error| self.failed(&error.to_string()))?;
        Ok(Some(if entry.username == TOKEN {
            Credential::IdentityToken(entry.secret)
        } else {
            Credential::Password {
                user: entry.username,
                password: entry.secret,
            }
        }))
    }

    /// Has it keep a password for a server.
    pub fn store(&self, server: &str, user: &str, password: &str) -> Result<(), CredentialError> {
        let entry = Entry {
            server: server.to_owned(),
            username: user.to_owned(),
            secret: password.to_owned(),
        };
        let json = serde_json::to_vec(&entry).map_err(|error| self.failed(&error.to_string()))?;
        self.done("store", &json)
    }

    /// Has it forget a server.
    pub fn erase(&self, server: &str) -> Result<(), CredentialError> {
        self.done("erase", server.as_bytes())
    }

    fn done(&self, verb: &str, input: &[u8]) -> Result<(), CredentialError> {
        match self.run(verb, input)? {
            (true, _) => Ok(()),
            (false, output) => Err(self.failed(String::from_utf8_lossy(&output).trim())),
        }
    }

    /// The program's name.
    pub fn program(&self) -> &str {
        &self.program
    }

    fn failed(&self, reason: &str) -> CredentialError {
        let reason: String = reason
            .chars()
            .take(300)
            .flat_map(char::escape_debug)
            .collect();
        CredentialError::Helper {
            program: self.program.clone(),
            reason: if reason.is_empty() {
                "it failed".to_owned()
            } else {
                reason
            },
        }
    }

    fn run(&self, verb: &str, input: &[u8]) -> Result<(bool, Vec<u8>), CredentialError> {
        let failed = |error: std::io::Error| self.failed(&error.to_string());
        let mut child = Command::new(&self.program)
            .arg(verb)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        let output = child.stdout.take();
        let reader = thread::spawn(move || {
            let mut bytes = Vec::new();
            let read = output.map(|output| output.take(MOST).read_to_end(&mut bytes));
            read.transpose().map(|_| bytes)
        });
        // One that reads nothing may close it early; its answer tells.
        if let Some(mut stdin) = child.stdin.take() {
            let _ = stdin.write_all(input);
        }
        let status = self.wait(&mut child)?;
        // What it has left running may hold its output open: it gets no more time than itself.
        let end = Instant::now() + Duration::from_secs(1);
        while !reader.is_finished() && Instant::now() < end {
            thread::sleep(POLL);
        }
        if !reader.is_finished() {
            return Err(self.failed("it has ended, but its output goes on"));
        }
        match reader.join() {
            Ok(output) => Ok((status, output.map_err(failed)?)),
            Err(_) => Err(self.failed("its output cannot be read")),
        }
    }

    fn wait(&self, child: &mut Child) -> Result<bool, CredentialError> {
        let end = Instant::now() + DEADLINE;
        loop {
            match child.try_wait() {
                Ok(Some(status)) => return Ok(status.success()),
                Ok(None) if Instant::now() < end => thread::sleep(POLL),
                Ok(None) => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(self.failed("it does not end"));
                }
                Err(error) => return Err(self.failed(&error.to_string())),
            }
        }
    }
}
