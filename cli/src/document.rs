//! What is known of containers, volumes and networks, on disk: one JSON document each.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::Path,
};

use serde::{Serialize, de::DeserializeOwned};

use crate::error::Error;

/// Writes a document so that nobody reads half of one, not even after a power cut. Who writes it
/// holds a lock: what is not whole yet has one name.
///
/// # Errors
/// No space, or its directory has been removed.
pub fn write(path: &Path, value: &impl Serialize) -> Result<(), Error> {
    let new = path.with_extension("new");
    let written = serde_json::to_vec_pretty(value)
        .map_err(io::Error::other)
        .and_then(|text| {
            let mut file = File::create(&new)?;
            file.write_all(&text)?;
            // A rename may reach the disk before what it is the name of.
            file.sync_all()
        })
        .and_then(|()| fs::rename(&new, path));
    written.map_err(Error::file("write", path))
}

/// Reads a document; None when there is none.
///
/// # Errors
/// It cannot be read, or is none.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    let text = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text.map_err(Error::file("read", path))?,
    };
    serde_json::from_slice(&text)
        .map(Some)
        .map_err(|error| Error::file("read", path)(io::Error::from(error)))
}

/// Makes a directory that nobody but its owner can look into, or makes it one: variables and output
/// of containers are secrets, and so are their files.
///
/// # Errors
/// Those of mkdir(2) and chmod(2).
pub fn private_directory(path: &Path) -> Result<(), Error> {
    const PRIVATE: u32 = 0o700;
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(Error::file("create", parent))?;
    }
    match fs::DirBuilder::new().mode(PRIVATE).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => return made.map_err(Error::file("create", path)),
    }
    // One that an earlier version has made.
    let mode = fs::metadata(path)
        .map_err(Error::file("stat", path))?
        .permissions()
        .mode();
    if mode & 0o777 == PRIVATE {
        return Ok(());
    }
    fs::set_permissions(path, fs::Permissions::from_mode(PRIVATE))
        .map_err(Error::file("change the mode of", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_are_whole_or_an_error() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("one.json");
        assert_eq!(read::<Vec<u32>>(&path).unwrap(), None);
        write(&path, &[1, 2]).unwrap();
        write(&path, &[3]).unwrap();
        assert_eq!(read::<Vec<u32>>(&path).unwrap(), Some(vec![3]));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        fs::write(&path, "").unwrap();
        let error = read::<Vec<u32>>(&path).unwrap_err().to_string();
        assert!(error.contains("one.json"), "{error}");
    }

    #[test]
    fn private_directories_are_made_and_mended() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("state/containers");
        let mode = || fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        private_directory(&path).unwrap();
        assert_eq!(mode(), 0o700);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        private_directory(&path).unwrap();
        assert_eq!(mode(), 0o700);
    }
}
