//! `images`, `load`, `rmi`.

use std::{io, path::Path};

use caisson_rootfs_builder::{Digest, Reference, Source};
use clap::ArgMatches;
use serde_json::json;

use crate::{
    Format,
    arguments::{one, values},
    container::Containers,
    error::Error,
    ps,
};

/// Runs `load`.
///
/// # Errors
/// The image is broken; nothing of it is kept.
pub fn load(matches: &ArgMatches) -> Result<u8, Error> {
    let store = Containers::open()?.images()?;
    let mut stdin = io::stdin().lock();
    let source = match one(matches, "input") {
        Some(path) => Source::Path(Path::new(path)),
        None if rustix::termios::isatty(io::stdin()) => {
            return Err(Error::Usage(
                "load needs an image: give -i PATH, or an archive on standard input".to_owned(),
            ));
        }
        None => Source::Stream {
            reader: &mut stdin,
            name: "standard input",
        },
    };
    for image in store.load(source, None)? {
        if !matches.get_flag("quiet") {
            println!("Loaded image: {}", image.display_name());
        }
    }
    Ok(0)
}

/// Repository and tag of a row; an image without a name has none.
fn names(references: &[Reference]) -> Vec<(String, String)> {
    if references.is_empty() {
        return vec![("<none>".to_owned(), "<none>".to_owned())];
    }
    references
        .iter()
        .map(|reference| {
            let familiar = reference.familiar();
            match reference.tag() {
                Some(tag) => (
                    familiar
                        .strip_suffix(&format!(":{tag}"))
                        .unwrap_or(&familiar)
                        .to_owned(),
                    tag.to_owned(),
                ),
                None => (familiar, "<none>".to_owned()),
            }
        })
        .collect()
}

/// Runs `images`.
///
/// # Errors
/// The store cannot be read.
pub fn list(matches: &ArgMatches) -> Result<u8, Error> {
    let format = Format::of(matches)?;
    let (quiet, whole) = (matches.get_flag("quiet"), matches.get_flag("no-trunc"));
    let images = Containers::open()?.images()?.images()?;
    let id = |id: &Digest| {
        if whole {
            id.to_string()
        } else {
            id.short().to_string()
        }
    };
    let mut rows = vec![["REPOSITORY", "TAG", "IMAGE ID", "CREATED", "SIZE"].map(str::to_owned)];
    for image in &images {
        let id = id(&image.id);
        if quiet {
            println!("{id}");
            continue;
        }
        for (repository, tag) in names(&image.references) {
            let created = image.created.map_or_else(
                || "N/A".to_owned(),
                |at| format!("{} ago", ps::duration(ps::since(at))),
            );
            let size = bytes(image.size);
            if format == Format::Json {
                println!(
                    "{}",
                    json!({ "Repository": repository, "Tag": tag, "ID": id, "CreatedSince": created, "Size": size, "CreatedAt": image.created.map(|at| humantime::format_rfc3339_seconds(at).to_string()) })
                );
            } else {
                rows.push([repository, tag, id.clone(), created, size]);
            }
        }
    }
    if !quiet && format == Format::Table {
        ps::print_table(&rows);
    }
    Ok(0)
}

/// Decimal units, as docker.
fn bytes(size: u64) -> String {
    let mut value = size as f64;
    let mut unit = "B";
    for next in ["kB", "MB", "GB", "TB"] {
        if value < 1000.0 {
            break;
        }
        value /= 1000.0;
        unit = next;
    }
    if unit == "B" || value >= 100.0 {
        format!("{value:.0}{unit}")
    } else {
        format!("{value:.1}{unit}")
    }
}

/// Runs `rmi`.
///
/// # Errors
/// None but those printed.
pub fn remove(matches: &ArgMatches) -> Result<u8, Error> {
    let store = Containers::open()?.images()?;
    let mut code = 0;
    for name in values(matches, "image") {
        match store.remove(name, matches.get_flag("force")) {
            Ok(removed) => {
                for reference in removed.untagged {
                    println!("Untagged: {}", reference.familiar());
                }
                for id in removed.deleted {
                    println!("Deleted: {id}");
                }
            }
            Err(error) => {
                eprintln!("caisson: {error}");
                code = 1;
            }
        }
    }
    Ok(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_dockers() {
        assert_eq!(
            (
                bytes(12).as_str(),
                bytes(1_234_567).as_str(),
                bytes(123_456_789).as_str()
            ),
            ("12B", "1.2MB", "123MB")
        );
    }
}
