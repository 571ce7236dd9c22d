//! What the host and the agent in the guest share, and nothing else: the ttrpc
//! service, the vsock ports, the framing of stdio streams, forwarded connections and DNS messages, how
//! connections are relayed, and the limits both sides keep.
//!
//! The host treats everything that comes over these channels as written by an
//! attacker; the agent trusts the host.

// `forbid` would also reach the generated code, which has its own `allow`.
#![deny(unsafe_code)]

pub mod forward;
pub mod limits;
pub mod ports;
pub mod relay;
pub mod resolver;
pub mod stdio;

/// Version of the protocol. Host and agent come from one build and must agree.
pub const VERSION: u32 = 1;

/// Prefix of a mount source that names an entry of the pod's virtio-fs share.
pub const SHARE_PREFIX: &str = "share:";

/// Prefix of a mount source that names a published volume, a copy in the guest's memory.
pub const PUBLISHED_PREFIX: &str = "published:";

/// Prefix of a mount source that names a directory of one of the pod's hugetlbfs: their number, a
/// slash, and the directory's path there.
pub const HUGE_PREFIX: &str = "hugetlb:";

/// A mount source that names the pod's shared memory, a tmpfs of the guest.
pub const POD_SHM: &str = "pod:shm";

/// virtio-fs tag of the pod's one share of host directories.
pub const SHARE_TAG: &str = "caisson";

/// Messages and ttrpc stubs generated from `proto/agent.proto`.
#[allow(
    missing_docs,
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/generated.rs"));
}

pub use generated::{agent, agent_ttrpc};
