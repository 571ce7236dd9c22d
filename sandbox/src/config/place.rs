//! Whose things these are, and where: root's, or those of a user without root.
//!
//! The command line brings such a user into a user namespace in which it is root; what it starts
//! there tells from [`ENTERED`] whose it is.

use std::{
    fs,
    path::{Path, PathBuf},
};

use toml::{Table, Value};

use super::{ConfigError, files::Layer};

/// Set by the command line in the user namespace that it makes: the user's id outside of it.
pub const ENTERED: &str = "CAISSON_ROOTLESS_UID";

/// Root's configuration.
pub const ETC: &str = "/etc/caisson";

/// Most user ids that VMMs of one user run as.
const MOST_UIDS: u32 = 4096;

/// Keys that in root's configuration name what only root has.
const ROOTS: [&str; 4] = ["run_dir", "state_dir", "uid_base", "uid_count"];

/// The user whose containers these are, by the id outside of all that Caisson has made; None: root.
pub fn user() -> Option<u32> {
    let own = rustix::process::geteuid();
    if !own.is_root() {
        return Some(own.as_raw());
    }
    let entered = std::env::var(ENTERED).ok()?.parse().ok()?;
    let map = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
    is_mapped(&map, entered).then_some(entered)
}

/// Whether user 0 of a namespace with this uid_map is that user outside: another program may have
/// handed the variable on.
fn is_mapped(map: &str, uid: u32) -> bool {
    let first: Vec<u32> = numbers(map.lines().next().unwrap_or_default());
    first == [0, uid, 1]
}

fn numbers(line: &str) -> Vec<u32> {
    let words = line.split_whitespace();
    words.filter_map(|word| word.parse().ok()).collect()
}

/// Directories of the configuration, what overrides later, and what holds without any file.
pub fn layers() -> Result<(Table, Vec<Layer>), ConfigError> {
    match user() {
        None => Ok((Table::new(), vec![Layer::all(Path::new(ETC))])),
        Some(uid) => of_user(uid, |name| std::env::var_os(name).map(PathBuf::from)),
    }
}

fn of_user(
    uid: u32,
    variable: impl Fn(&str) -> Option<PathBuf>,
) -> Result<(Table, Vec<Layer>), ConfigError> {
    // As the XDG Base Directory Specification: what is not absolute does not count.
    let absolute = |name: &str| variable(name).filter(|path| path.is_absolute());
    let below_home = |name: &'static str, below: &str| {
        absolute(name)
            .or_else(|| Some(absolute("HOME")?.join(below)))
            .map(|directory| directory.join("caisson"))
            .ok_or(ConfigError::NoHome(name))
    };
    let state = below_home("XDG_DATA_HOME", ".local/share")?;
    let run = absolute("XDG_RUNTIME_DIR")
        .or_else(|| {
            let usual = PathBuf::from(format!("/run/user/{uid}"));
            usual.is_dir().then_some(usual)
        })
        .map_or_else(|| state.join("run"), |directory| directory.join("caisson"));
    let mut table = Table::new();
    for (key, path) in [("state_dir", &state), ("run_dir", &run)] {
        let text = path.to_str().ok_or_else(|| ConfigError::Read {
            path: path.clone(),
            source: std::io::Error::other("the name of the directory is not UTF-8"),
        })?;
        table.insert(key.to_owned(), text.into());
    }
    let map = |file: &str| fs::read_to_string(file).unwrap_or_default();
    let maps = [map("/proc/self/uid_map"), map("/proc/self/gid_map")];
    if rustix::process::geteuid().is_root()
        && let Some((base, count)) = uids(&maps)
    {
        table.insert("uid_base".to_owned(), Value::Integer(base.into()));
        table.insert("uid_count".to_owned(), Value::Integer(count.into()));
    }
    let own = below_home("XDG_CONFIG_HOME", ".config")?;
    let etc = Layer::without(Path::new(ETC), &ROOTS);
    Ok((table, vec![etc, Layer::all(&own)]))
}

/// Ids for VMMs: the last of those that both maps have, which files rarely have.
fn uids(maps: &[String; 2]) -> Option<(u32, u32)> {
    let end = |map: &String| {
        let mut end = 0;
        for line in map.lines() {
            match numbers(line)[..] {
                // Without holes, as the command line makes them.
                [inside, _, count] if inside == end => end = end.checked_add(count)?,
                _ => break,
            }
        }
        Some(end)
    };
    let end = maps.iter().map(end).min().flatten()?;
    let count = (end.checked_sub(1)? / 2).min(MOST_UIDS);
    (count > 0).then_some((end - count, count))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(pairs: &[(&str, &str)]) -> Result<(Table, Vec<Layer>), ConfigError> {
        of_user(4_000_000_000, |name| {
            let found = pairs.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| PathBuf::from(value))
        })
    }

    #[test]
    fn a_users_things_are_where_the_specification_says() {
        let (places, layers) = table(&[("HOME", "/home/u"), ("XDG_DATA_HOME", "x")]).unwrap();
        let of = |key: &str| places[key].as_str().unwrap();
        assert_eq!(of("state_dir"), "/home/u/.local/share/caisson");
        assert_eq!(of("run_dir"), "/home/u/.local/share/caisson/run");
        let directories: Vec<_> = layers.iter().map(Layer::directory).collect();
        assert_eq!(
            directories,
            [Path::new(ETC), Path::new("/home/u/.config/caisson")]
        );
        let (places, _) = table(&[
            ("HOME", "/home/u"),
            ("XDG_DATA_HOME", "/d"),
            ("XDG_RUNTIME_DIR", "/r"),
        ])
        .unwrap();
        assert_eq!(places["state_dir"].as_str(), Some("/d/caisson"));
        assert_eq!(places["run_dir"].as_str(), Some("/r/caisson"));
        let error = table(&[]).unwrap_err().to_string();
        assert!(error.contains("HOME"), "{error}");
    }

    #[test]
    fn vmms_have_the_last_ids() {
        let map = |text: &str| text.to_owned();
        let both = |text: &str| uids(&[map(text), map(text)]);
        assert_eq!(
            both("0 1000 1\n1 100000 65536\n"),
            Some((65_537 - 4096, 4096))
        );
        assert_eq!(both("0 1000 1\n1 100000 10\n"), Some((6, 5)));
        assert_eq!(both("0 1000 1\n"), None);
        assert_eq!(both(""), None);
        let shorter = [map("0 1 1\n1 7 100\n"), map("0 1 1\n1 7 10\n5 9 100\n")];
        assert_eq!(uids(&shorter), Some((6, 5)));
    }

    #[test]
    fn the_variable_alone_makes_no_user() {
        assert!(is_mapped("         0       1000          1\n", 1000));
        assert!(!is_mapped("         0          0 4294967295\n", 1000));
        assert!(!is_mapped("         0     100000      65536\n", 1000));
        assert!(!is_mapped("", 1000));
    }
}
