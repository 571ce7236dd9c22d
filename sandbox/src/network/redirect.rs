//! Frames from one interface to another (tc-mirred(8)).

use std::io;

use rtnetlink::Handle;

use super::Link;
use crate::error::Error;

/// Parent of what hangs on an ingress qdisc (`ffff:`).
const INGRESS: u32 = 0xffff_0000;
/// `ETH_P_ALL` in network byte order.
const ALL_PROTOCOLS: u16 = 3u16.to_be();

/// Lets what arrives at the interface go to the tap, and the other way round.
pub async fn both(handle: &Handle, link: &Link, tap: u32) -> Result<(), Error> {
    // Of a microVM before this one, or a plugin's, which would take the frames first.
    undo(handle, link.index).await;
    redirect(handle, link.index, tap)
        .await
        .map_err(failed(format!("redirect {} to its tap", link.name)))?;
    redirect(handle, tap, link.index)
        .await
        .map_err(failed(format!("redirect the tap to {}", link.name)))
}

async fn redirect(handle: &Handle, from: u32, to: u32) -> Result<(), rtnetlink::Error> {
    let index = from.cast_signed();
    handle.qdisc().add(index).ingress().execute().await?;
    handle
        .traffic_filter(index)
        .add()
        .parent(INGRESS)
        .protocol(ALL_PROTOCOLS)
        .redirect(to)?
        .execute()
        .await
}

/// Removes the redirection from an interface. One that has none, or is gone, is fine.
pub async fn undo(handle: &Handle, index: u32) {
    let mut request = handle.qdisc().del(index.cast_signed());
    request.message_mut().header.parent = rtnetlink::packet_route::tc::TcHandle::INGRESS;
    if let Err(error) = request.execute().await
        && !is_absent(&error)
    {
        log::warn!("the redirection of the network interface {index} stays: {error}");
    }
}

/// No such qdisc, interface or parent.
fn is_absent(error: &rtnetlink::Error) -> bool {
    matches!(error, rtnetlink::Error::NetlinkError(message)
        if [libc::ENOENT, libc::EINVAL, libc::ENODEV].contains(&-message.raw_code()))
}

/// The kernel's refusal, with what was tried.
pub fn failed(what: String) -> impl FnOnce(rtnetlink::Error) -> Error {
    move |error| {
        let source = match error {
            rtnetlink::Error::NetlinkError(message) => message.to_io(),
            other => io::Error::other(other),
        };
        Error::io(what)(source)
    }
}
