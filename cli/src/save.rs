//! `save`: images to an archive.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, IsTerminal, Write};
use std::path::Path;

use caisson_rootfs_builder::{Error as StoreError, Store};
use clap::ArgMatches;

use crate::{
    arguments::{one, values},
    container::Containers,
    error::Error,
};

/// Bytes that are written at once.
const BUFFER: usize = 256 << 10;

/// Runs the verb.
///
/// # Errors
/// An image is not there or cannot be saved; a file that was there is as it was then.
pub fn run(matches: &ArgMatches) -> Result<u8, Error> {
    let images = values(matches, "image");
    let store = Containers::open()?.images()?;
    match one(matches, "output") {
        Some(path) => to_file(&store, &images, Path::new(path))?,
        None if io::stdout().is_terminal() => {
            return Err(Error::Usage(
                "save does not write to a terminal: give -o FILE, or redirect the output"
                    .to_owned(),
            ));
        }
        None => {
            let stdout = io::stdout().lock();
            write(&store, &images, stdout, Path::new("standard output"))?;
        }
    }
    Ok(0)
}

/// A file is whole or as it was; what is no file, such as a pipe, is written to.
fn to_file(store: &Store, images: &[&str], path: &Path) -> Result<(), Error> {
    if fs::metadata(path).is_ok_and(|metadata| !metadata.is_file()) {
        let out = OpenOptions::new().write(true).open(path);
        return write(
            store,
            images,
            out.map_err(Error::file("write", path))?,
            path,
        );
    }
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.part", std::process::id()));
    let part = Path::new(&name);
    let file = File::create_new(part).map_err(Error::file("create", part))?;
    let written = write(store, images, &file, path)
        .and_then(|()| file.sync_all().map_err(Error::file("write", path)))
        .and_then(|()| fs::rename(part, path).map_err(Error::file("create", path)));
    if written.is_err() {
        let _ = fs::remove_file(part);
    }
    written
}

fn write(store: &Store, images: &[&str], out: impl Write, path: &Path) -> Result<(), Error> {
    let mut out = BufWriter::with_capacity(BUFFER, out);
    let saved = store.save(images, &mut out);
    match saved.and_then(|()| out.flush().map_err(|source| StoreError::Output { source })) {
        Ok(()) => Ok(()),
        Err(StoreError::Output { source }) => Err(Error::file("write", path)(source)),
        Err(error) => Err(error.into()),
    }
}
