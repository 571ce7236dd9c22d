//! The ids that a user may give out (subuid(5), subgid(5)), and what else a user without root needs.

use std::{fs, path::Path};

use caisson_kvm_probe::Check;

use super::{RootlessError, program};

const SUBUID: &str = "/etc/subuid";
const SUBGID: &str = "/etc/subgid";

/// Maps for newuidmap(1) and newgidmap(1): triples of first id inside, first id outside, count.
#[derive(Debug, PartialEq, Eq)]
pub struct Ranges {
    /// For users.
    pub users: String,
    /// For groups.
    pub groups: String,
}

impl Ranges {
    /// All that this user has.
    ///
    /// # Errors
    /// Nothing.
    pub fn of(uid: u32) -> Result<Self, RootlessError> {
        let name = name_of(uid);
        let map = |file: &'static str, own: u32| {
            let text = fs::read_to_string(file).unwrap_or_default();
            map(&text, uid, name.as_deref(), own).ok_or_else(|| RootlessError::NoRange {
                user: name.clone().unwrap_or_else(|| uid.to_string()),
                file,
            })
        };
        Ok(Self {
            users: map(SUBUID, uid)?,
            groups: map(SUBGID, rustix::process::getgid().as_raw())?,
        })
    }
}

/// The caller, then its ranges without holes. None: there is no range.
fn map(text: &str, uid: u32, name: Option<&str>, own: u32) -> Option<String> {
    let mut map = format!("0 {own} 1");
    let mut inside = 1u32;
    for line in text.lines() {
        let mut fields = line.trim().split(':');
        let owner = fields.next()?;
        if owner != uid.to_string() && Some(owner) != name {
            continue;
        }
        let mut number = || fields.next()?.parse::<u32>().ok();
        let (Some(first), Some(count @ 1..)) = (number(), number()) else {
            continue;
        };
        let Some(end) = inside.checked_add(count) else {
            break;
        };
        map.push_str(&format!(" {inside} {first} {count}"));
        inside = end;
    }
    (inside > 1).then_some(map)
}

/// From /etc/passwd, or for users of other databases what their session says: newuidmap asks those.
fn name_of(uid: u32) -> Option<String> {
    let text = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let found = text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    });
    found.or_else(|| std::env::var("USER").ok())
}

/// For `caisson check`: what a caller without root needs beside what root does.
pub fn checks() -> Vec<Check> {
    let own = rustix::process::getuid();
    if rustix::process::geteuid().is_root() {
        return Vec::new();
    }
    let ids = Ranges::of(own.as_raw())
        .and_then(|_| program("newuidmap"))
        .and_then(|_| program("newgidmap"));
    let ids = match ids {
        Ok(_) => Check::ok("user_ids", "ids of your own for microVMs without root"),
        Err(error) => Check::failed(
            "user_ids",
            error.to_string(),
            "Without root, microVMs run in a user namespace with ids of the caller's own.",
        ),
    };
    vec![ids, limits()]
}

/// Without root the host limits what the user's cgroup lets it.
fn limits() -> Check {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let beside = own
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .and_then(|path| Path::new(path).parent())
        .map(|parent| Path::new("/sys/fs/cgroup").join(parent));
    let delegated = beside.as_deref().is_some_and(|directory| {
        rustix::fs::access(directory, rustix::fs::Access::WRITE_OK).is_ok()
    });
    if delegated {
        return Check::ok("user_cgroup", "a delegated cgroup for limits on the host");
    }
    Check::warning(
        "user_cgroup",
        "no cgroup is delegated to this session: a microVM's size and the limits in the guest hold, \
         but nothing bounds the host's side of it (CPU time and memory of the VMM and the file server)",
        "systemd-run --user --scope -p Delegate=yes caisson run …",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_a_user_by_name_or_number() {
        let text =
            "root:1:5\nann:100000:65536\n1000:300000:10\nbob:200000:65536\nann:x:y\nann:7:0\n";
        assert_eq!(
            map(text, 1000, Some("ann"), 1000).as_deref(),
            Some("0 1000 1 1 100000 65536 65537 300000 10")
        );
        assert_eq!(
            map(text, 1001, Some("bob"), 50).as_deref(),
            Some("0 50 1 1 200000 65536")
        );
        assert_eq!(map(text, 1002, Some("eve"), 1002), None);
        assert_eq!(map(text, 1002, None, 1002), None);
        assert_eq!(map("", 1000, Some("ann"), 1000), None);
    }
}
