//! Volumes: directories that outlive containers, `<state_dir>/volumes/<name>/_data`, and `volume`.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use caisson_sandbox::Config;
use clap::ArgMatches;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    Format,
    arguments::{one, values},
    container::{Container, Containers, Request, Shared, VolumeName},
    document,
    error::Error,
    images, inspect,
    mounts::{self, Share, Source},
    output::{for_each, say},
    ps,
};

/// What is known of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Unique.
    pub name: String,
    /// When it was made.
    pub created: SystemTime,
    /// The user's.
    pub labels: BTreeMap<String, String>,
    /// Made for one container, which nobody has named it for.
    pub anonymous: bool,
}

/// All volumes of this host. What makes or removes one holds [`Containers::lock`], so that none
/// goes that a container is just being given.
pub struct Volumes {
    directory: PathBuf,
}

impl Volumes {
    /// Those of a configuration.
    pub fn of(config: &Config) -> Self {
        Self {
            directory: config.state_dir.join("volumes"),
        }
    }

    /// Where a volume's files are.
    pub fn data(&self, name: &str) -> PathBuf {
        self.directory.join(name).join("_data")
    }

    /// Makes a volume; one that is there stays as it is.
    ///
    /// # Errors
    /// No space, no permission.
    pub fn create(&self, volume: &Volume) -> Result<Volume, Error> {
        if let Some(there) = self.read(&volume.name)? {
            return Ok(there);
        }
        let data = self.data(&volume.name);
        document::private_directory(&self.directory)?;
        fs::create_dir_all(&data).map_err(Error::file("create", &data))?;
        // Last: a volume without it was half made by somebody who was killed.
        document::write(&self.document(&volume.name), volume)?;
        Ok(volume.clone())
    }

    fn document(&self, name: &str) -> PathBuf {
        self.directory.join(name).join("volume.json")
    }

    fn read(&self, name: &str) -> Result<Option<Volume>, Error> {
        document::read(&self.document(name)).map_err(|error| Error::DamagedVolume {
            name: name.to_owned(),
            source: Box::new(error),
        })
    }

    /// A volume.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn get(&self, name: &str) -> Result<Volume, Error> {
        let known = mounts::check_name(name).ok().map(|()| self.read(name));
        known
            .transpose()?
            .flatten()
            .ok_or_else(|| Error::NoSuchVolume(name.to_owned()))
    }

    /// Every volume that can be read, by name.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn all(&self) -> Result<Vec<Volume>, Error> {
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(Error::file("list", &self.directory))?,
        };
        let mut all = Vec::new();
        for entry in entries.flatten() {
            match self.read(&entry.file_name().to_string_lossy()) {
                Ok(volume) => all.extend(volume),
                Err(error) => log::warn!("{error}"),
            }
        }
        all.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(all)
    }

    /// Removes a volume that no container has, and gives the bytes that it held.
    ///
    /// # Errors
    /// Its files cannot be removed.
    pub fn remove(&self, name: &str) -> Result<u64, Error> {
        let directory = self.directory.join(name);
        let freed = bytes_in(&directory.join("_data"));
        // First: what is left of one that could not be removed whole is none any more.
        for path in [directory.join("volume.json"), directory.join("volume.new")] {
            let _ = fs::remove_file(path);
        }
        match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::file("remove", directory)(error))
            }
            _ => Ok(freed),
        }
    }
}

/// Bytes on disk; mounts and what cannot be read count as nothing.
fn bytes_in(directory: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| Some((entry.path(), fs::symlink_metadata(entry.path()).ok()?)))
        .map(|(path, data)| {
            let inner = if data.is_dir() { bytes_in(&path) } else { 0 };
            inner + data.blocks() * 512
        })
        .sum()
}

/// Containers that have a volume.
fn users<'a>(all: &'a [Container], name: &str) -> Vec<&'a str> {
    all.iter()
        .filter(|container| container.request.has_volume(name))
        .map(|container| container.name.as_str())
        .collect()
}

/// Where a share is on the host; a volume need not be there yet.
///
/// # Errors
/// No entropy for a name.
pub fn place(volumes: &Volumes, share: Share) -> Result<Shared, Error> {
    let (source, volume) = match share.source {
        Source::Host { path, .. } => (path, None),
        named => {
            let name = match named {
                Source::Volume(name) => VolumeName {
                    name,
                    anonymous: false,
                },
                _ => VolumeName {
                    name: Containers::new_id()?,
                    anonymous: true,
                },
            };
            let path = volumes.data(&name.name);
            (path.to_string_lossy().into_owned(), Some(name))
        }
    };
    Ok(Shared {
        source,
        target: share.target,
        read_only: share.read_only,
        copies: share.copies,
        follows: share.follows,
        volume,
    })
}

/// Makes the volumes that a container wants and that are not there. The caller holds the lock.
///
/// # Errors
/// No space, no permission.
pub fn make(containers: &Containers, request: &Request) -> Result<(), Error> {
    let volumes = Volumes::of(&containers.config);
    for VolumeName { name, anonymous } in request.volume_names.values() {
        volumes.create(&Volume {
            name: name.clone(),
            created: SystemTime::now(),
            labels: BTreeMap::new(),
            anonymous: *anonymous,
        })?;
    }
    Ok(())
}

/// Removes a container, and the volumes that were made for it alone.
///
/// # Errors
/// The first that does not go.
pub fn remove_container(containers: &Containers, container: &Container) -> Result<(), Error> {
    let _lock = containers.lock()?;
    remove_container_locked(containers, container)
}

/// As [`remove_container`]; the caller holds the lock.
///
/// # Errors
/// The first that does not go.
pub fn remove_container_locked(
    containers: &Containers,
    container: &Container,
) -> Result<(), Error> {
    containers.remove(&container.id)?;
    if container.request.anonymous_volumes().next().is_none() {
        return Ok(());
    }
    let volumes = Volumes::of(&containers.config);
    let all = match containers.every() {
        Ok(all) => all,
        Err(error) => {
            // It may have one of them: `volume prune` finds them when it has been removed.
            log::warn!("the volumes of container {} stay: {error}", container.id);
            return Ok(());
        }
    };
    for name in container.request.anonymous_volumes() {
        // Somebody may have found its name and use for it.
        if users(&all, name).is_empty() {
            volumes.remove(name)?;
        }
    }
    Ok(())
}

/// Runs `volume`.
///
/// # Errors
/// Those of its verbs.
pub fn noun(matches: &ArgMatches) -> Result<u8, Error> {
    match matches.subcommand() {
        Some(("create", matches)) => create(matches),
        Some(("ls", matches)) => list(matches),
        Some(("rm", matches)) => remove(matches),
        Some(("inspect", matches)) => inspect(matches),
        Some(("prune", matches)) => prune(matches),
        other => Err(Error::Usage(format!(
            "unknown command \"volume {}\"",
            other.map_or("", |(verb, _)| verb)
        ))),
    }
}

fn create(matches: &ArgMatches) -> Result<u8, Error> {
    let name = match one(matches, "name") {
        Some(name) => {
            mounts::check_name(name)?;
            name.to_owned()
        }
        None => Containers::new_id()?,
    };
    let labels = values(matches, "label").into_iter().map(|text| {
        let (key, value) = text.split_once('=').unwrap_or((text, ""));
        (key.to_owned(), value.to_owned())
    });
    let volume = Volume {
        anonymous: one(matches, "name").is_none(),
        name,
        created: SystemTime::now(),
        labels: labels.collect(),
    };
    let containers = Containers::open()?;
    let _lock = containers.lock()?;
    say!("{}", Volumes::of(&containers.config).create(&volume)?.name);
    Ok(0)
}

fn list(matches: &ArgMatches) -> Result<u8, Error> {
    let format = Format::of(matches)?;
    let containers = Containers::open()?;
    let volumes = Volumes::of(&containers.config);
    let mut rows = vec![["DRIVER", "VOLUME NAME"].map(str::to_owned)];
    for volume in volumes.all()? {
        if matches.get_flag("quiet") {
            say!("{}", volume.name);
        } else if format == Format::Json {
            say!("{}", describe(&volumes, &volume));
        } else {
            rows.push(["local".to_owned(), volume.name]);
        }
    }
    if !matches.get_flag("quiet") && format == Format::Table {
        ps::print_table(&rows);
    }
    Ok(0)
}

fn describe(volumes: &Volumes, volume: &Volume) -> Value {
    json!({
        "CreatedAt": humantime::format_rfc3339_seconds(volume.created).to_string(),
        "Driver": "local",
        "Labels": volume.labels,
        "Mountpoint": volumes.data(&volume.name),
        "Name": volume.name,
        "Options": null,
        "Scope": "local",
    })
}

fn inspect(matches: &ArgMatches) -> Result<u8, Error> {
    Format::of(matches)?;
    let volumes = Volumes::of(&Containers::open()?.config);
    Ok(inspect::print(values(matches, "volume"), |name| {
        Ok(describe(&volumes, &volumes.get(name)?))
    }))
}

fn remove(matches: &ArgMatches) -> Result<u8, Error> {
    let containers = Containers::open()?;
    let volumes = Volumes::of(&containers.config);
    let _lock = containers.lock()?;
    let all = containers.every()?;
    let force = matches.get_flag("force");
    let one = |name: &str| {
        match volumes.get(name) {
            Err(Error::DamagedVolume { .. }) if force => {}
            found => drop(found?),
        }
        match users(&all, name).as_slice() {
            [] => volumes.remove(name),
            users => Err(Error::State(format!(
                "volume {name} is in use by {}: remove the container first",
                users.join(", ")
            ))),
        }
    };
    Ok(for_each(values(matches, "volume"), |name| {
        match one(name) {
            // As docker: -f is content when there is nothing.
            Err(Error::NoSuchVolume(_)) if force => Ok(()),
            result => result.map(|_| say!("{name}")),
        }
    }))
}

fn prune(matches: &ArgMatches) -> Result<u8, Error> {
    let every = matches.get_flag("all");
    let what = if every {
        "all volumes not used by at least one container"
    } else {
        "anonymous volumes not used by at least one container"
    };
    if !matches.get_flag("force") && !images::confirm(what)? {
        return Ok(0);
    }
    let containers = Containers::open()?;
    let volumes = Volumes::of(&containers.config);
    let _lock = containers.lock()?;
    let all = containers.every()?;
    let (mut freed, mut deleted) = (0, Vec::new());
    for volume in volumes.all()? {
        if (every || volume.anonymous) && users(&all, &volume.name).is_empty() {
            freed += volumes.remove(&volume.name)?;
            deleted.push(volume.name);
        }
    }
    if !deleted.is_empty() {
        say!("Deleted Volumes:\n{}\n", deleted.join("\n"));
    }
    say!("Total reclaimed space: {}", images::bytes(freed));
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_come_and_go() {
        let directory = tempfile::tempdir().unwrap();
        let volumes = Volumes {
            directory: directory.path().join("volumes"),
        };
        assert!(volumes.all().unwrap().is_empty());
        let mut volume = Volume {
            name: "data".to_owned(),
            created: SystemTime::UNIX_EPOCH,
            labels: BTreeMap::new(),
            anonymous: false,
        };
        volumes.create(&volume).unwrap();
        fs::write(volumes.data("data").join("file"), "text").unwrap();
        // It stays as it is.
        volume.anonymous = true;
        assert!(!volumes.create(&volume).unwrap().anonymous);
        assert_eq!(volumes.all().unwrap().len(), 1);
        for wrong in ["other", "", ".", "..", "../data", "data/_data"] {
            let error = volumes.get(wrong).unwrap_err().to_string();
            assert!(error.contains("no such volume"), "{error}");
        }
        assert!(volumes.remove("data").unwrap() > 0);
        assert!(volumes.all().unwrap().is_empty());
        // What a killed one has left is none, and no hindrance.
        fs::create_dir_all(volumes.data("data")).unwrap();
        assert!(volumes.get("data").is_err());
        volumes.create(&volume).unwrap();
        assert_eq!(volumes.get("data").unwrap(), volume);
        // One that is damaged is not in the way of others.
        volume.name = "whole".to_owned();
        volumes.create(&volume).unwrap();
        fs::write(volumes.document("data"), "").unwrap();
        assert_eq!(volumes.all().unwrap(), [volume]);
        let error = volumes.get("data").unwrap_err().to_string();
        assert!(error.contains("`caisson volume rm -f data`"), "{error}");
    }
}
