//! The control API of `caisson-vmm`.
//!
//! The VMM opens nothing by itself: its parent gives it one end of a
//! `SOCK_SEQPACKET` unix socket pair as a descriptor (`--api-fd N`). Each packet
//! is one JSON document of at most [`MAX_PACKET`] bytes and carries the file
//! descriptors it speaks of as `SCM_RIGHTS`; an [`Fd`] in the document is an
//! index into them.
//!
//! The parent sends [`Call`]s; the VMM answers each with a [`Message::Reply`] of
//! the same id, in order, and sends [`Message::Event`]s in between. The first
//! call is [`Request::Boot`] or [`Request::Restore`]. When the parent closes its
//! end, the VMM stops the guest and exits.

#![forbid(unsafe_code)]

mod channel;
mod types;

pub use channel::{Channel, ChannelError, MAX_FDS, MAX_PACKET};
pub use types::*;
