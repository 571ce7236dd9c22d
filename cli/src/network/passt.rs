//! The network of a user without root: passt (Debian's package of that name), which does with
//! ordinary sockets of the user what the container's frames ask for.
//!
//! ```text
//!   passt ──socket── monitor ──tap "eth0"── in the container's namespace, as any other interface
//! ```
//!
//! Against its sister pasta, which would make the interface itself: what the host's loopback sends
//! to a published port, that one hands to sockets in the namespace, past the interface, and there
//! nobody listens: the container is in a microVM.
//!
//! passt ends when its socket is closed, so it cannot outlive the monitor; one that does all the
//! same is ended by [`end`].

use std::{
    fs, io,
    net::{IpAddr, Ipv4Addr, UdpSocket},
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::{net::UnixStream as StdStream, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::SystemTime,
};

use caisson_kvm_probe::Check;
use caisson_sandbox::Interface;
use ipnet::IpNet;
use rustix::{
    fs::OFlags,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, BufReader, unix::AsyncFd},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::JoinHandle,
};

use super::{
    attachment::Attachment,
    ports::{Port, Protocol},
    store::{Network, Subnet},
    wanted::Wanted,
};
use crate::error::Error;

/// What `--network` calls it.
pub const NAME: &str = "passt";

/// Addresses in it. Only the container's own is not to be reached outside: all else is passed on.
const SUBNET: &str = "10.207.0.0/16";

/// Bytes of an interface: the most that passt takes.
const MTU: u32 = 65_520;

/// Bytes of the longest frame: 65520, the header of Ethernet and of a VLAN, and some room.
const MAX_FRAME: usize = 65_550;

/// What to do about a missing program.
const ADVICE: &str = "Install the package passt (its name in Debian and Fedora).";

/// The network, as far as it is one: each container is alone in it.
pub fn network() -> Option<Network> {
    Some(Network {
        name: NAME.to_owned(),
        id: NAME.to_owned(),
        created: SystemTime::UNIX_EPOCH,
        bridge: String::new(),
        subnets: vec![Subnet::of(SUBNET.parse::<IpNet>().ok()?)],
        internal: false,
        dns: false,
        mtu: Some(MTU),
        labels: std::collections::BTreeMap::new(),
    })
}

impl Network {
    /// It is that of a user without root.
    pub fn is_passt(&self) -> bool {
        self.id == NAME
    }
}

/// The host's own address towards the outside, at which containers reach it.
pub fn host_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    // Nothing is sent: this only asks for the route to an address of documentation (RFC 5737).
    socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9)).ok()?;
    socket.local_addr().ok().map(|address| address.ip())
}

/// Finds the program.
///
/// # Errors
/// It is not installed.
pub fn find() -> Result<PathBuf, Error> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/bin", "/usr/local/bin"].map(PathBuf::from))
        .map(|directory| directory.join(NAME))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            Error::State(format!(
                "a network without root needs the program passt, which is not installed. {ADVICE} \
                 Without a network: --network none"
            ))
        })
}

/// For `caisson check`, of a user without root.
pub fn check() -> Check {
    match find() {
        Ok(_) => Check::ok(
            "networks",
            "networks of `caisson run` without root: passt is there",
        ),
        Err(_) => Check::warning(
            "networks",
            "passt is missing: `caisson run` without root needs --network none",
            ADVICE,
        ),
    }
}

/// A container's way out, as long as this lives.
pub struct Link(JoinHandle<()>);

impl Drop for Link {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Makes a container's interface and starts its passt, which notes its process id in `pid_file`.
///
/// # Errors
/// passt's words; a port is in use.
pub async fn connect(
    attachment: &Attachment,
    wanted: &Wanted,
    namespace: &Path,
    pid_file: &Path,
) -> Result<Link, Error> {
    let program = find()?;
    let interface = interface(attachment)?;
    let made = interface.make(namespace).await;
    let tap = made.map_err(|error| Error::State(error.to_string()))?;
    let (ours, theirs) = StdStream::pair().map_err(Error::io("make a socket pair"))?;
    let arguments = arguments(&interface, &attachment.ports, wanted, pid_file);
    tokio::task::spawn_blocking(move || start(&program, &arguments, &theirs))
        .await
        .unwrap_or_else(|error| Err(Error::io("start passt")(error)))?;
    let carrying = carry(tap, ours, announcement(&interface))
        .map_err(Error::io("watch the container's interface"))?;
    Ok(Link(carrying))
}

fn interface(attachment: &Attachment) -> Result<Interface, Error> {
    let made = attachment.endpoints.first().and_then(|endpoint| {
        let address = endpoint.addresses.iter().find_map(|net| match net {
            IpNet::V4(net) => Some((net.addr(), net.prefix_len())),
            IpNet::V6(_) => None,
        })?;
        let gateway = endpoint.gateways.iter().find_map(|gateway| match gateway {
            IpAddr::V4(gateway) => Some(*gateway),
            IpAddr::V6(_) => None,
        })?;
        let mac = endpoint
            .mac
            .split(':')
            .map(|byte| u8::from_str_radix(byte, 16).ok());
        Some(Interface {
            name: endpoint.interface.clone(),
            mac: mac.collect::<Option<Vec<_>>>()?.try_into().ok()?,
            mtu: MTU,
            address,
            gateway,
        })
    });
    made.ok_or_else(|| {
        Error::State(format!(
            "the record of container {}'s network makes no sense",
            attachment.container
        ))
    })
}

/// Of passt(1). The container is told its addresses by the agent, so DHCP and NDP have nothing to do;
/// the gateway stands for nothing of the host but its name server.
fn arguments(
    interface: &Interface,
    ports: &[Port],
    wanted: &Wanted,
    pid_file: &Path,
) -> Vec<String> {
    let (address, prefix) = interface.address;
    let gateway = interface.gateway.to_string();
    let mut words = vec!["--quiet".to_owned(), "--pid".to_owned()];
    words.push(pid_file.display().to_string());
    for (flag, value) in [
        ("--address", address.to_string()),
        ("--netmask", prefix.to_string()),
        ("--gateway", gateway.clone()),
        ("--mtu", interface.mtu.to_string()),
    ] {
        words.extend([flag.to_owned(), value]);
    }
    for flag in [
        "--ipv4-only",
        "--no-map-gw",
        "--no-dhcp",
        "--no-dhcpv6",
        "--no-ndp",
        "--no-ra",
    ] {
        words.push(flag.to_owned());
    }
    if wanted.dns.is_empty() {
        words.extend(["--dns-forward".to_owned(), gateway]);
    }
    for (flag, protocol) in [
        ("--tcp-ports", Protocol::Tcp),
        ("--udp-ports", Protocol::Udp),
    ] {
        let mut of_protocol = ports
            .iter()
            .filter(|port| port.protocol == protocol)
            .peekable();
        if of_protocol.peek().is_none() {
            // Otherwise UDP would have the numbers of TCP.
            words.extend([flag.to_owned(), "none".to_owned()]);
        }
        for port in of_protocol {
            // All addresses of IPv4 are all that there are here.
            let ip = port.host_ip.filter(|ip| !ip.is_unspecified());
            let ip = ip.map(|ip| format!("{ip}/")).unwrap_or_default();
            let (host, container) = (port.host_port, port.container_port);
            words.extend([flag.to_owned(), format!("{ip}{host}:{container}")]);
        }
    }
    words
}

/// passt goes into the background once it is ready.
#[allow(unsafe_code)]
fn start(program: &Path, arguments: &[String], socket: &StdStream) -> Result<(), Error> {
    let number = socket.as_raw_fd();
    let mut command = Command::new(program);
    command
        .args(arguments)
        .args(["--fd", &number.to_string()])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    let keep = move || {
        // SAFETY: the parent holds this descriptor until passt has been started.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
        Ok(())
    };
    // SAFETY: between fork and exec only one fcntl(2) runs, which is async-signal-safe.
    unsafe { command.pre_exec(keep) };
    let output = command.output().map_err(Error::file("run", program))?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(Error::State(format!(
        "the container's network: passt: {}",
        if words.is_empty() {
            output.status.to_string()
        } else {
            words
        }
    )))
}

/// The container's question for its gateway (ARP, RFC 826), asked for it: passt learns the hardware
/// address from the first frame, and what it sends before, to everybody, no TCP takes.
fn announcement(interface: &Interface) -> Vec<u8> {
    const ETHERNET_ARP: [u8; 2] = [0x08, 0x06];
    // Of Ethernet and IPv4, with addresses of 6 and 4 bytes; a request.
    const REQUEST: [u8; 8] = [0, 1, 0x08, 0, 6, 4, 0, 1];
    [
        &[0xff; 6][..],
        &interface.mac,
        &ETHERNET_ARP,
        &REQUEST,
        &interface.mac,
        &interface.address.0.octets(),
        &[0; 6],
        &interface.gateway.octets(),
    ]
    .concat()
}

/// Moves frames between the interface and passt until either is gone.
#[allow(unsafe_code)]
fn carry(tap: OwnedFd, socket: StdStream, first: Vec<u8>) -> io::Result<JoinHandle<()>> {
    let flags = rustix::fs::fcntl_getfl(&tap)?;
    rustix::fs::fcntl_setfl(&tap, flags | OFlags::NONBLOCK)?;
    // SAFETY: the descriptor is owned and closed with what watches it, not before.
    let tap = unsafe { AsyncFd::register(tap) }?;
    socket.set_nonblocking(true)?;
    let (reader, writer) = UnixStream::from_std(socket)?.into_split();
    Ok(tokio::spawn(async move {
        let error = tokio::select! {
            error = outwards(&tap, writer, first) => error,
            error = inwards(&tap, reader) => error,
        };
        log::error!("the container's network has ended: passt: {error}");
    }))
}

/// To passt: before each frame its length, four bytes, the highest first (QEMU's `-netdev stream`).
async fn outwards(tap: &AsyncFd<OwnedFd>, mut socket: OwnedWriteHalf, first: Vec<u8>) -> io::Error {
    let mut buffer = vec![0; 4 + MAX_FRAME];
    let header = u32::try_from(first.len()).unwrap_or(0).to_be_bytes();
    if let Err(error) = socket
        .write_all(&[&header, first.as_slice()].concat())
        .await
    {
        return error;
    }
    loop {
        let read = async {
            let mut ready = tap.readable().await?;
            ready
                .try_io(|tap| Ok(rustix::io::read(tap, &mut buffer[4..])?))
                .ok()
                .transpose()
        };
        let length = match read.await {
            Ok(Some(length)) => length,
            // Not yet.
            Ok(None) => continue,
            Err(error) => return error,
        };
        let header = u32::try_from(length).unwrap_or(0).to_be_bytes();
        buffer[..4].copy_from_slice(&header);
        if let Err(error) = socket.write_all(&buffer[..4 + length]).await {
            return error;
        }
    }
}

/// From passt.
async fn inwards(tap: &AsyncFd<OwnedFd>, socket: OwnedReadHalf) -> io::Error {
    let mut socket = BufReader::with_capacity(2 * MAX_FRAME, socket);
    let mut frame = vec![0; MAX_FRAME];
    loop {
        let read = async {
            let length = socket.read_u32().await? as usize;
            let frame = frame.get_mut(..length).ok_or_else(|| {
                io::Error::other(format!("a frame of {length} bytes, more than there can be"))
            })?;
            socket.read_exact(frame).await?;
            Ok::<_, io::Error>(length)
        };
        let length = match read.await {
            Ok(length) => length,
            Err(error) => return error,
        };
        // An interface that is down or full loses frames, as one at a wire does.
        let _ = rustix::io::write(tap.get_ref(), &frame[..length]);
    }
}

/// Ends a passt that has not ended by itself, and removes what it has noted.
///
/// # Errors
/// The file cannot be removed.
pub fn end(pid_file: &Path) -> Result<(), Error> {
    let text = match fs::read_to_string(pid_file) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        text => text.map_err(Error::file("read", pid_file))?,
    };
    if let Some(pid) = text.trim().parse().ok().and_then(Pid::from_raw)
        // Held before it is looked at: ids are used again.
        && let Ok(process) = pidfd_open(pid, PidfdFlags::empty())
        && is_passt_of(pid, pid_file)
    {
        let _ = pidfd_send_signal(process, Signal::KILL);
    }
    fs::remove_file(pid_file).map_err(Error::file("remove", pid_file))
}

fn is_passt_of(pid: Pid, pid_file: &Path) -> bool {
    let path = format!("/proc/{}/cmdline", pid.as_raw_nonzero());
    let line = fs::read(path).unwrap_or_default();
    let mut words = line.split(|byte| *byte == 0);
    words.any(|word| word == pid_file.as_os_str().as_encoded_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn test_interface() -> Interface {
        Interface {
            name: "eth0".to_owned(),
            mac: [2, 0, 0, 0, 0, 1],
            mtu: MTU,
            address: (Ipv4Addr::new(10, 207, 0, 2), 16),
            gateway: Ipv4Addr::new(10, 207, 0, 1),
        }
    }

    #[test]
    fn passt_is_told_the_ports() {
        let port = |host_ip: Option<&str>, host_port, container_port, protocol| Port {
            host_ip: host_ip.map(|ip| ip.parse().unwrap()),
            host_port,
            container_port,
            protocol,
        };
        let ports = [
            port(None, 8080, 80, Protocol::Tcp),
            port(Some("127.0.0.1"), 8443, 443, Protocol::Tcp),
            port(Some("0.0.0.0"), 8081, 81, Protocol::Tcp),
        ];
        let words = arguments(
            &test_interface(),
            &ports,
            &Wanted::default(),
            Path::new("/p"),
        );
        let line = words.join(" ");
        assert!(
            line.contains("--tcp-ports 8080:80 --tcp-ports 127.0.0.1/8443:443 --tcp-ports 8081:81"),
            "{line}"
        );
        assert!(line.contains("--udp-ports none"), "{line}");
        assert!(
            line.contains("--address 10.207.0.2 --netmask 16 --gateway 10.207.0.1"),
            "{line}"
        );
        assert!(
            line.contains("--no-map-gw"),
            "the host's loopback is not the container's: {line}"
        );
        assert!(line.contains("--dns-forward 10.207.0.1"), "{line}");
        let wanted = Wanted {
            dns: vec!["192.0.2.53".parse().unwrap()],
            ..Wanted::default()
        };
        let words = arguments(&test_interface(), &ports[..0], &wanted, Path::new("/p"));
        let line = words.join(" ");
        assert!(
            line.contains("--tcp-ports none") && !line.contains("--dns-forward"),
            "{line}"
        );
    }

    #[tokio::test]
    async fn frames_are_carried_with_their_lengths() {
        let (tap, far) = rustix::net::socketpair(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::SEQPACKET,
            rustix::net::SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let (ours, theirs) = StdStream::pair().unwrap();
        let carrying = carry(tap, ours, b"first".to_vec()).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let mut passt = UnixStream::from_std(theirs).unwrap();
        rustix::io::write(&far, b"out").unwrap();
        let mut packets = [0; 16];
        passt.read_exact(&mut packets).await.unwrap();
        assert_eq!(&packets, b"\0\0\0\x05first\0\0\0\x03out");
        passt.write_all(b"\0\0\0\x02in\0\0\0\x01x").await.unwrap();
        let far = tokio::task::spawn_blocking(move || {
            let mut frame = [0; 9];
            let first = rustix::io::read(&far, &mut frame).unwrap();
            assert_eq!(&frame[..first], b"in");
            assert_eq!(rustix::io::read(&far, &mut frame).unwrap(), 1);
        });
        far.await.unwrap();
        // More than there can be ends it.
        passt.write_all(&[0xff; 4]).await.unwrap();
        carrying.await.unwrap();
    }

    #[test]
    fn another_process_of_that_id_lives() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("passt.pid");
        end(&file).unwrap();
        fs::write(&file, std::process::id().to_string()).unwrap();
        end(&file).unwrap();
        assert!(!file.exists());
    }
}
