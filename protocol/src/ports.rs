//! vsock ports the agent listens on. The host always connects; the agent refuses
//! a peer whose CID is not the host's (`VMADDR_CID_HOST`, 2).

/// The agent's ttrpc service.
pub const AGENT: u32 = 1024;

/// Standard streams of processes, one connection each: see [`crate::stdio`].
pub const STDIO: u32 = 1025;

/// Connections to loopback ports of the pod: see [`crate::forward`].
pub const FORWARD: u32 = 1026;

/// Queries to the name server of the pod's network namespace: see [`crate::resolver`].
pub const RESOLVER: u32 = 1027;
