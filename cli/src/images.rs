//! `images`, `load`, `rmi`, `tag`, and `image` with the same and more by its noun.

use std::{
    io::{self, Write},
    path::Path,
};

use caisson_rootfs_builder::{Digest, Prune, Reference, Source};
use clap::ArgMatches;
use serde_json::json;

use crate::{
    Format,
    arguments::{one, values},
    container::Containers,
    error::Error,
    inspect,
    output::{for_each, say},
    ps, pull, save,
};

/// Runs `image VERB`.
///
/// # Errors
/// Those of the verb.
pub fn noun(matches: &ArgMatches) -> Result<u8, Error> {
    match matches.subcommand() {
        Some(("ls", matches)) => list(matches),
        Some(("load", matches)) => load(matches),
        Some(("save", matches)) => save::run(matches),
        Some(("rm", matches)) => remove(matches),
        Some(("pull", matches)) => pull::run(matches),
        Some(("tag", matches)) => tag(matches),
        Some(("inspect", matches)) => inspect::images(matches),
        Some(("prune", matches)) => prune(matches),
        other => Err(Error::Usage(format!(
            "unknown command \"image {}\"",
            other.map_or("", |(verb, _)| verb)
        ))),
    }
}

/// Runs `tag`.
///
/// # Errors
/// There is no such image, or the name is none.
pub fn tag(matches: &ArgMatches) -> Result<u8, Error> {
    let name = one(matches, "name").unwrap_or_default();
    let reference: Reference = name.parse().map_err(caisson_rootfs_builder::Error::from)?;
    let image = one(matches, "image").unwrap_or_default();
    Containers::open()?.images()?.tag(image, &reference)?;
    Ok(0)
}

/// Runs `image prune`.
///
/// # Errors
/// The store cannot be changed.
fn prune(matches: &ArgMatches) -> Result<u8, Error> {
    let which = if matches.get_flag("all") {
        Prune::Unused
    } else {
        Prune::Dangling
    };
    let what = match which {
        Prune::Dangling => "all dangling images",
        Prune::Unused => "all images without at least one container associated to them",
    };
    if !matches.get_flag("force") && !confirm(what)? {
        return Ok(0);
    }
    let pruned = Containers::open()?.images()?.prune(which)?;
    if !pruned.deleted.is_empty() {
        say!("Deleted Images:");
        for reference in &pruned.untagged {
            say!("untagged: {}", reference.familiar());
        }
        for id in &pruned.deleted {
            say!("deleted: {id}");
        }
        say!("");
    }
    say!("Total reclaimed space: {}", bytes(pruned.freed));
    Ok(0)
}

/// Asks whether `what` shall be removed.
///
/// # Errors
/// Nobody can be asked.
pub fn confirm(what: &str) -> Result<bool, Error> {
    let mut stdout = io::stdout();
    write!(
        stdout,
        "WARNING! This will remove {what}.\nAre you sure you want to continue? [y/N] "
    )
    .and_then(|()| stdout.flush())
    .map_err(Error::io("write to the standard output"))?;
    let mut answer = String::new();
    io::stdin()
        .read_line(&mut answer)
        .map_err(Error::io("read the answer"))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

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
            say!("Loaded image: {}", image.display_name());
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
            say!("{id}");
            continue;
        }
        for (repository, tag) in names(&image.references) {
            let created = image.created.map_or_else(
                || "N/A".to_owned(),
                |at| format!("{} ago", ps::duration(ps::since(at))),
            );
            let size = bytes(image.size);
            if format == Format::Json {
                say!(
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
pub fn bytes(size: u64) -> String {
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
    Ok(for_each(values(matches, "image"), |name| {
        let removed = store.remove(name, matches.get_flag("force"))?;
        for reference in removed.untagged {
            say!("Untagged: {}", reference.familiar());
        }
        for id in removed.deleted {
            say!("Deleted: {id}");
        }
        Ok(())
    }))
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
