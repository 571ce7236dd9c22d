//! Frames from one interface to another (tc-mirred(8)).

use std::io;

use rtnetlink::{
    Handle,
    packet_route::tc::{
        TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption,
        TcActionType, TcFilterU32Option, TcMirror, TcMirrorActionType, TcU32Key, TcU32Selector,
        TcU32SelectorFlags,
    },
};

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

/// A kind of frame: Ethernet's type, and a value of 32 bits under a mask at an offset behind
/// Ethernet's header.
struct Kind {
    protocol: u16,
    keys: &'static [(i32, u32, u32)],
}

/// ARP replies, by the operation (RFC 826).
const ARP_REPLIES: Kind = Kind {
    protocol: (libc::ETH_P_ARP as u16).to_be(),
    keys: &[(4, 2, 0xffff)],
};

/// UDP of IPv4 from port 53, by IPv4's protocol and, behind a header without options, UDP's source
/// (RFC 791, RFC 768).
const ANSWERS: Kind = Kind {
    protocol: (libc::ETH_P_IP as u16).to_be(),
    keys: &[(8, 17 << 16, 0xff << 16), (20, 53 << 16, 0xffff << 16)],
};

/// Lets the namespace's own stack have answers of name servers as well, and what it must hear to send
/// them anything: for a program there that asks them. [`undo`] ends that, too.
pub async fn share_answers(handle: &Handle, index: u32, tap: u32) -> Result<(), Error> {
    // Before the redirection, which has a number that the kernel gives from the other end.
    for (priority, kind) in [(1, ARP_REPLIES), (2, ANSWERS)] {
        let filter = handle.traffic_filter(index.cast_signed()).add();
        let filter = filter
            .parent(INGRESS)
            .priority(priority)
            .protocol(kind.protocol)
            .u32(&mirror(&kind, tap));
        let added = match filter {
            Ok(filter) => filter.execute().await,
            Err(error) => Err(error),
        };
        added.map_err(failed(format!(
            "share answers of name servers at the network interface {index}"
        )))?;
    }
    Ok(())
}

/// What fits goes to the tap, and on.
fn mirror(kind: &Kind, tap: u32) -> [TcFilterU32Option; 2] {
    let keys = kind.keys.iter().map(|&(off, val, mask)| {
        let mut key = TcU32Key::default();
        (key.off, key.val, key.mask) = (off, val, mask);
        key
    });
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.keys = keys.collect();
    selector.nkeys = u8::try_from(selector.keys.len()).unwrap_or(u8::MAX);
    let mut to_tap = TcMirror::default();
    to_tap.generic.action = TcActionType::Ok;
    to_tap.eaction = TcMirrorActionType::EgressMirror;
    to_tap.ifindex = tap;
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(
            to_tap,
        ))]),
    ];
    [
        TcFilterU32Option::Selector(selector),
        TcFilterU32Option::Action(vec![action]),
    ]
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
