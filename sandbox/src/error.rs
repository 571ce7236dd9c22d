//! Why something could not be done with a sandbox.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::{config::ConfigError, record::RecordError, vmm::Gone};

/// Kinds of the agent's refusals that callers act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AgentErrorKind {
    /// No such container, process, program or user.
    NotFound,
    /// It is there already.
    AlreadyExists,
    /// Not in this state.
    FailedPrecondition,
    /// The request makes no sense to the guest.
    InvalidArgument,
    /// A program that may not be executed.
    PermissionDenied,
    /// OCI defines it, Caisson does not do it.
    Unimplemented,
    /// Anything else.
    Other,
}

/// Why something could not be done with a sandbox.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration file.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The record of created resources.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// Not supported, and not ignored either.
    #[error("{0}")]
    Unsupported(String),
    /// KVM's device cannot be used.
    #[error("cannot open {}: {source}; {}", path.display(), kvm_advice(path, source))]
    Kvm {
        /// The device.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A file that a microVM needs.
    #[error("the {what} {} cannot be used: {reason}", path.display())]
    Asset {
        /// "guest kernel", "guest image", "VMM", …
        what: &'static str,
        /// Where it should be.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A system call on the host.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried, with path or id.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
    /// The VMM refused.
    #[error("the VMM refused to {what}: {reason}")]
    Vmm {
        /// What was asked.
        what: &'static str,
        /// Its words.
        reason: String,
    },
    /// The microVM has ended.
    #[error("{0}")]
    Gone(Gone),
    /// The guest did not answer in time.
    #[error("the guest's agent did not {what} within {seconds} s")]
    Late {
        /// What was awaited.
        what: String,
        /// How long.
        seconds: u64,
    },
    /// The agent refused.
    #[error("{message}")]
    Agent {
        /// For programs.
        kind: AgentErrorKind,
        /// Its words.
        message: String,
    },
    /// The file server.
    #[error(transparent)]
    FileServer(#[from] caisson_fs::Error),
}

/// What stands for groups that a user namespace does not have (`/proc/sys/kernel/overflowgid`).
const NO_GROUP: u32 = 65534;

/// What to do about a device of KVM's that cannot be opened.
fn kvm_advice(path: &Path, error: &io::Error) -> String {
    use std::os::unix::fs::MetadataExt;
    let group = fs::metadata(path)
        .ok()
        .filter(|_| error.kind() == io::ErrorKind::PermissionDenied)
        .and_then(|data| match data.gid() {
            // A user namespace does not have the group, and cannot tell its name: the usual one.
            NO_GROUP => Some("kvm".to_owned()),
            gid => group_name(&fs::read_to_string("/etc/group").ok()?, gid),
        });
    match group {
        Some(group) => format!(
            "it is for members of the group {group}: as root, usermod --append --groups {group} USER, \
             and log in anew"
        ),
        None => "`caisson check` tells what this host lacks".to_owned(),
    }
}

/// In the format of group(5).
fn group_name(groups: &str, gid: u32) -> Option<String> {
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(gid)).then(|| name.to_owned())
    })
}

impl Error {
    /// For `map_err`: what was tried when a system call failed.
    pub(crate) fn io<E: Into<io::Error>>(what: impl Into<String>) -> impl FnOnce(E) -> Self {
        move |source| Self::Io {
            what: what.into(),
            source: source.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_have_names() {
        let groups = "root:x:0:\nkvm:x:104:ann,bob\n";
        assert_eq!(group_name(groups, 104).as_deref(), Some("kvm"));
        assert_eq!(group_name(groups, 1), None);
    }
}
