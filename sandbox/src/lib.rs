//! One pod, one microVM.
//!
//! [`Sandbox::start`] boots a microVM and finds its agent; containers are then
//! created, started and deleted in it. Everything that a sandbox makes on the
//! host stands in a [`record`] before it is made, so that [`Sandbox::stop`] and,
//! after a crash of the owner, [`cleanup`] leave nothing behind.
//!
//! This crate knows nothing of containerd, and of docker even less.

mod agent;
mod cgroup;
mod config;
mod cpuset;
mod deadline;
mod disk;
mod error;
mod features;
pub mod figures;
pub mod hooks;
mod huge_pages;
mod mount_table;
mod network;
mod published;
mod record;
mod sandbox;
mod shares;
mod size;
pub mod socket;
mod spec;
mod vmm;
mod vsock;
mod watches;

pub use cgroup::parent_of as cgroup_parent;
pub use config::{Config, ConfigError, ENTERED, ETC, Effective, Origin, Setting, user};
pub use deadline::scaled;
pub use error::{AgentErrorKind, Error};
pub use features::{CAPABILITIES, features};
pub use network::{Interface, InterfaceLimits};
pub use record::RecordError;
pub use sandbox::{
    ContainerSpec, Created, Event, Exit, NetworkNamespace, ProcessInfo, RootfsSource, Sandbox,
    SandboxSpec, State, Status, Stdio, Streams, Upper, cleanup,
};
pub use size::{Limits, Size};
pub use spec::pod_of;
pub use vmm::Gone;

/// The agent's messages that callers pass through.
pub use caisson_protocol::agent::{IoStat, StatsResponse};
pub use caisson_vmm_api::{Description, ExitReason};
