//! Files, one over the other.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use toml::{Spanned, Table, Value};

use super::{Config, ConfigError, Effective, Origin, Setting};

/// A directory with files of the configuration.
#[derive(Debug, Clone)]
pub struct Layer {
    directory: PathBuf,
    /// Keys that do not count there.
    ignored: Vec<&'static str>,
}

impl Layer {
    /// All of a directory's files.
    pub fn all(directory: &Path) -> Self {
        Self::without(directory, &[])
    }

    /// But for these keys.
    pub fn without(directory: &Path, ignored: &[&'static str]) -> Self {
        Self {
            directory: directory.to_owned(),
            ignored: ignored.to_vec(),
        }
    }

    /// Its path.
    #[cfg(test)]
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}

/// The configuration of these directories, each over those before it, and all over `places`, which
/// are defaults that depend on the user.
pub fn merged(places: Table, layers: &[Layer]) -> Result<Effective, ConfigError> {
    let mut table = places;
    let mut origins = BTreeMap::new();
    let mut files = Vec::new();
    for layer in layers {
        for path in list(&layer.directory)? {
            let Some(text) = read(&path)? else { continue };
            for (key, value, line) in parse(&path, &text)? {
                if layer.ignored.contains(&key.as_str()) {
                    continue;
                }
                let origin = |line| Origin::File {
                    path: path.clone(),
                    line,
                };
                if key == REGISTRIES {
                    for (name, start) in registry_lines(&text) {
                        origins.insert(registry_key(&name), origin(line_at(&text, start)));
                    }
                }
                origins.insert(key.clone(), origin(line));
                insert(&mut table, &key, value);
            }
            files.push(path);
        }
    }
    // Each key has been tried by itself, and none depends on another's presence.
    let last = layers.last().map(|layer| layer.directory.clone());
    let failed = |source| ConfigError::Read {
        path: last.unwrap_or_default(),
        source,
    };
    let config: Config = table
        .try_into()
        .map_err(|error| failed(io::Error::other(error)))?;
    let settings = settings(&config, &origins)?;
    config.check(&settings)?;
    Ok(Effective {
        config,
        settings,
        files,
    })
}

/// `config.toml`, then the drop-ins by name.
fn list(directory: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let drop_ins = directory.join("config.d");
    let failed = |source| ConfigError::Read {
        path: drop_ins.clone(),
        source,
    };
    let mut found = Vec::new();
    match fs::read_dir(&drop_ins) {
        Ok(entries) => {
            for entry in entries {
                let path = entry.map_err(failed)?.path();
                let name = path.file_name().unwrap_or_default().as_encoded_bytes();
                // What editors leave beside a file begins with a dot or ends otherwise.
                if name.ends_with(b".toml") && !name.starts_with(b".") {
                    found.push(path);
                }
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    found.sort();
    found.insert(0, directory.join("config.toml"));
    Ok(found)
}

fn read(path: &Path) -> Result<Option<String>, ConfigError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ConfigError::Read {
            path: path.to_owned(),
            source,
        }),
    }
}

/// The table whose entries are settings of their own: `registries."NAME"`.
const REGISTRIES: &str = "registries";

/// The setting of one registry, as a key of TOML.
fn registry_key(name: &str) -> String {
    format!("{REGISTRIES}.{}", Value::from(name))
}

fn insert(table: &mut Table, key: &str, value: Value) {
    let registries = match value {
        Value::Table(registries) if key == REGISTRIES => registries,
        value => {
            table.insert(key.to_owned(), value);
            return;
        }
    };
    let all = table
        .entry(REGISTRIES)
        .or_insert(Value::Table(Table::new()));
    if let Value::Table(all) = all {
        all.extend(registries);
    }
}

/// Lines of the registries' settings in a file.
fn registry_lines(text: &str) -> BTreeMap<String, usize> {
    #[derive(serde::Deserialize)]
    struct File {
        #[serde(default)]
        registries: BTreeMap<String, Spanned<Value>>,
    }
    // What is wrong with the file is told by whoever reads all of it.
    let file: Option<File> = toml::from_str(text).ok();
    let registries = file.map(|file| file.registries).unwrap_or_default();
    registries
        .into_iter()
        .map(|(name, value)| (name, value.span().start))
        .collect()
}

/// Keys of a file with their values and lines; every one is known and of the right type.
fn parse(path: &Path, text: &str) -> Result<Vec<(String, Value, usize)>, ConfigError> {
    let line_at = |offset| line_at(text, offset);
    let origin = |line| Origin::File {
        path: path.to_owned(),
        line,
    };
    let values: BTreeMap<String, Spanned<Value>> =
        toml::from_str(text).map_err(|error| ConfigError::Syntax {
            origin: origin(line_at(error.span().unwrap_or_default().start)),
            reason: error.message().to_owned(),
        })?;
    let mut parsed = Vec::with_capacity(values.len());
    for (key, value) in values {
        let line = line_at(value.span().start);
        let value = value.into_inner();
        let mut alone = Table::new();
        alone.insert(key.clone(), value.clone());
        if let Err(error) = alone.try_into::<Config>() {
            return Err(ConfigError::Key {
                origin: origin(line),
                key,
                reason: error.message().to_owned(),
            });
        }
        parsed.push((key, value, line));
    }
    Ok(parsed)
}

fn line_at(text: &str, offset: usize) -> usize {
    let before = text.as_bytes().iter().take(offset);
    before.filter(|byte| **byte == b'\n').count() + 1
}

fn settings(
    config: &Config,
    origins: &BTreeMap<String, Origin>,
) -> Result<Vec<Setting>, ConfigError> {
    // A path that is not UTF-8 cannot come from a file, but from where the program is installed.
    let failed = |error: toml::ser::Error| ConfigError::Read {
        path: config.vmm.clone(),
        source: io::Error::other(error),
    };
    let plain = Config {
        registries: BTreeMap::new(),
        ..config.clone()
    };
    let text = toml::to_string(&plain).map_err(failed)?;
    let lines = text.lines().filter_map(|line| line.split_once(" = "));
    let mut pairs: Vec<(String, String)> = lines
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect();
    for (name, registry) in &config.registries {
        let value = Value::try_from(registry).map_err(failed)?;
        pairs.push((registry_key(name), value.to_string()));
    }
    Ok(pairs
        .into_iter()
        .map(|(key, value)| Setting {
            origin: origins.get(&key).cloned().unwrap_or(Origin::Default),
            key,
            value,
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Files(tempfile::TempDir);

    impl Files {
        fn new(files: &[(&str, &str)]) -> Self {
            let directory = tempfile::tempdir().unwrap();
            fs::create_dir(directory.path().join("config.d")).unwrap();
            for (name, text) in files {
                fs::write(directory.path().join(name), text).unwrap();
            }
            Self(directory)
        }

        fn load(&self) -> Result<Effective, ConfigError> {
            Config::effective(Some(self.0.path()))
        }
    }

    fn message(text: &str) -> String {
        let files = Files::new(&[("config.toml", text)]);
        let message = files.load().unwrap_err().to_string();
        assert!(message.contains("/config.toml:"), "{message}");
        message
    }

    #[test]
    fn without_files_there_are_defaults() {
        let effective = Config::effective(Some(Path::new("/nowhere"))).unwrap();
        assert_eq!(effective.config, Config::default());
        assert_eq!(effective.files, Vec::<PathBuf>::new());
        assert!(
            effective
                .settings
                .iter()
                .all(|s| s.origin == Origin::Default)
        );
    }

    #[test]
    fn later_files_override_key_by_key() {
        let files = Files::new(&[
            ("config.toml", "kernel = \"/k\"\ndefault_vcpus = 2\n"),
            ("config.d/20-b.toml", "\n\ndefault_vcpus = 4\n"),
            ("config.d/10-a.toml", "default_vcpus = 3\nmax_vcpus = 5\n"),
            ("config.d/30-c.toml.orig", "no TOML"),
            ("config.d/.40-d.toml", "no TOML"),
        ]);
        let effective = files.load().unwrap();
        let config = &effective.config;
        assert_eq!(config.kernel, Path::new("/k"));
        assert_eq!((config.default_vcpus, config.max_vcpus), (4, 5));
        assert_eq!(config.run_dir, Path::new("/run/caisson"));
        let path = |name: &str| files.0.path().join(name);
        assert_eq!(
            effective.files,
            [
                path("config.toml"),
                path("config.d/10-a.toml"),
                path("config.d/20-b.toml")
            ]
        );
        let of = |key: &str| {
            let setting = effective.settings.iter().find(|s| s.key == key).unwrap();
            (setting.value.as_str(), setting.origin.to_string())
        };
        let b = format!("{}:3", path("config.d/20-b.toml").display());
        assert_eq!(of("default_vcpus"), ("4", b));
        assert_eq!(of("kernel").0, "\"/k\"");
        assert_eq!(of("uid_base").1, "default");
    }

    #[test]
    fn what_is_printed_can_be_read_again() {
        let quoted = r#"kernel_parameters = "a=\"b c\" d\\e""#;
        let files = Files::new(&[("config.toml", quoted)]);
        let first = files.load().unwrap();
        let lines = first
            .settings
            .iter()
            .map(|s| format!("{} = {}\n", s.key, s.value));
        let again = Files::new(&[("config.toml", &lines.collect::<String>())]);
        assert_eq!(again.load().unwrap().config, first.config);
    }

    #[test]
    fn registries_are_overridden_one_by_one() {
        let files = Files::new(&[
            (
                "config.toml",
                "max_vcpus = 5\n\n[registries.\"docker.io\"]\nmirrors = [\"http://10.0.0.1:5000\"]\n\
                 [registries.\"r.example:5000\"]\ninsecure = true\n",
            ),
            (
                "config.d/10-a.toml",
                "[registries]\n\"docker.io\" = { mirrors = [\"https://m.example\"] }\n",
            ),
        ]);
        let effective = files.load().unwrap();
        let registries = &effective.config.registries;
        assert_eq!(registries["docker.io"].mirrors, ["https://m.example"]);
        assert!(registries["r.example:5000"].insecure);
        let of = |key: &str| effective.settings.iter().find(|s| s.key == key).unwrap();
        let docker = of("registries.\"docker.io\"");
        assert_eq!(
            docker.value,
            "{ insecure = false, mirrors = [\"https://m.example\"] }"
        );
        assert!(docker.origin.to_string().ends_with("10-a.toml:2"));
        let other = of("registries.\"r.example:5000\"").origin.to_string();
        assert!(other.ends_with("config.toml:5"), "{other}");
        // What is printed can be read again.
        let lines = effective.settings.iter();
        let lines = lines.map(|s| format!("{} = {}\n", s.key, s.value));
        let again = Files::new(&[("config.toml", &lines.collect::<String>())]);
        assert_eq!(again.load().unwrap().config, effective.config);
        let wrong = message("[registries.\"x\"]\nmirror = []\n");
        assert!(wrong.contains("mirror"), "{wrong}");
    }

    #[test]
    fn mistakes_are_named_with_their_line() {
        let unknown = message("\nkernle = \"/k\"");
        assert!(
            unknown.contains(":2: the key kernle: unknown field"),
            "{unknown}"
        );
        let wrong = message("# size\n\ndefault_vcpus = \"two\"");
        assert!(wrong.contains(":3: the key default_vcpus: "), "{wrong}");
        assert!(message("max_vcpus = 300").contains(":1: the key max_vcpus: "));
        let syntax = message("kernel = \"/k\"\nmax_vcpus = = 3\n");
        assert!(syntax.contains(":2: this is no TOML: "), "{syntax}");
        assert!(message("max_vcpus = 3\nmax_vcpus = 4").contains(":2: this is no TOML: "));
        assert!(message("[guest]\nkernel = \"/k\"").contains("guest"));
    }

    #[test]
    fn unreadable_files_are_named() {
        let files = Files::new(&[]);
        fs::create_dir(files.0.path().join("config.toml")).unwrap();
        let message = files.load().unwrap_err().to_string();
        assert!(message.contains("/config.toml: "), "{message}");
        let files = Files::new(&[("config.d/a.toml", "x")]);
        fs::write(files.0.path().join("config.d/a.toml"), [0xFF]).unwrap();
        let message = files.load().unwrap_err().to_string();
        assert!(message.contains("/config.d/a.toml: "), "{message}");
    }
}
