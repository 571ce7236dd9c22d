//! Bounds that both sides keep, so that a peer that lies costs bounded memory.

/// Longest container, exec and sandbox id, bytes.
pub const MAX_ID: usize = 128;

/// Longest OCI spec or process document, bytes. A ttrpc message holds 4 MiB.
pub const MAX_SPEC: usize = 3 << 20;

/// Containers of one pod.
pub const MAX_CONTAINERS: usize = 128;

/// Events the agent keeps for an unconnected host before it stops reaping
/// details of the oldest out-of-memory events (exits are never dropped).
pub const MAX_EVENTS: usize = 16 * 1024;

/// Longest `wait_ms` of `NextEvents`.
pub const MAX_EVENT_WAIT_MS: u32 = 30_000;

/// Connections to loopback ports that the host has open at a time.
pub const MAX_FORWARDS: usize = 128;

/// Largest published volume: bytes of its files, and [`PUBLISHED_ENTRY`] for each entry.
pub const MAX_PUBLISHED: usize = 3 << 20;

/// What an entry of a published volume counts beside its contents: more than its path and numbers.
pub const PUBLISHED_ENTRY: usize = 512;
