//! Certificates that an administrator has put down for a registry.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use reqwest::{Certificate, Identity};

use crate::error::{Error, Result};

/// Largest file with certificates that is read, in bytes.
const MOST: u64 = 4 << 20;

/// What there is for one registry.
#[derive(Debug, Default)]
pub struct Certificates {
    /// Of authorities to be trusted besides the system's.
    pub authorities: Vec<Certificate>,
    /// Ours.
    pub identity: Option<Identity>,
}

impl Certificates {
    /// Reads `<directory>/<host>/` of each directory.
    pub fn of(host: &str, directories: &[PathBuf]) -> Result<Self> {
        let mut found = Self::default();
        for directory in directories {
            let directory = directory.join(host);
            for path in files(&directory)? {
                match path.extension().and_then(|extension| extension.to_str()) {
                    Some("crt") => {
                        let bundle = Certificate::from_pem_bundle(&read(&path)?);
                        let bundle = bundle.map_err(|error| unusable(&path, &error))?;
                        found.authorities.extend(bundle);
                    }
                    Some("cert") => {
                        let mut pem = read(&path.with_extension("key"))?;
                        pem.push(b'\n');
                        pem.extend(read(&path)?);
                        let identity = Identity::from_pem(&pem);
                        found.identity = Some(identity.map_err(|error| unusable(&path, &error))?);
                    }
                    _ => {}
                }
            }
        }
        Ok(found)
    }
}

fn unusable(path: &Path, error: &dyn std::fmt::Display) -> Error {
    Error::Certificates {
        path: path.to_owned(),
        reason: error.to_string(),
    }
}

/// The files of a directory, sorted; none when it is not there.
fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(unusable(directory, &error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        files.push(entry.map_err(|error| unusable(directory, &error))?.path());
    }
    files.sort();
    Ok(files)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let metadata = fs::metadata(path).map_err(|error| unusable(path, &error))?;
    if metadata.len() > MOST {
        return Err(unusable(path, &format!("it has more than {MOST} bytes")));
    }
    fs::read(path).map_err(|error| unusable(path, &error))
}
