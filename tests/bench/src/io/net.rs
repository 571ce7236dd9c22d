//! Links between the host and the contenders, and what the host serves on them.

use std::{
    io::{Read, Write},
    net::TcpListener,
    path::Path,
    process::{Command, Stdio},
};

use crate::{
    child::{Running, find, quiet},
    error::BenchError,
};

/// Of the echo service.
const ECHO_PORT: u16 = 5202;

/// Name of a tap in a namespace.
const TAP: &str = "tap0";

/// A link to one contender; goes when dropped.
pub struct Link {
    name: String,
    namespace: Option<String>,
    tap: Option<String>,
    /// Third byte of both addresses.
    subnet: u8,
}

fn ip(words: &str) -> Result<(), BenchError> {
    quiet(Command::new(find("ip", "iproute2")?).args(words.split(' ')))
}

fn tc(words: &str) -> Result<(), BenchError> {
    quiet(Command::new(find("tc", "iproute2")?).args(words.split(' ')))
}

impl Link {
    /// A veth pair; one end is in a network namespace of its own, as a CNI plugin leaves it.
    ///
    /// # Errors
    /// Those of ip(8).
    pub fn veth(subnet: u8) -> Result<Self, BenchError> {
        let (name, namespace) = (format!("cbench{subnet}"), format!("caisson-bench{subnet}"));
        let link = Self {
            name: name.clone(),
            namespace: Some(namespace.clone()),
            tap: None,
            subnet,
        };
        let (host, guest) = (link.host(), link.guest());
        ip(&format!("netns add {namespace}"))?;
        ip(&format!(
            "link add {name} type veth peer name eth0 netns {namespace}"
        ))?;
        ip(&format!("addr add {host}/24 dev {name}"))?;
        ip(&format!("link set {name} up"))?;
        ip(&format!("-n {namespace} addr add {guest}/24 dev eth0"))?;
        ip(&format!("-n {namespace} link set eth0 up"))?;
        ip(&format!("-n {namespace} link set lo up"))?;
        Ok(link)
    }

    /// A tap for a virtual machine, on the host.
    ///
    /// # Errors
    /// Those of ip(8).
    pub fn tap(subnet: u8) -> Result<Self, BenchError> {
        let name = format!("cbench{subnet}");
        ip(&format!("tuntap add dev {name} mode tap vnet_hdr"))?;
        let link = Self {
            name: name.clone(),
            namespace: None,
            tap: Some(name.clone()),
            subnet,
        };
        ip(&format!("addr add {}/24 dev {name}", link.host()))?;
        ip(&format!("link set {name} up"))?;
        Ok(link)
    }

    /// A tap for a virtual machine behind a veth pair, in whose namespace it is: what a monitor has
    /// to do with the interface of a CNI plugin.
    ///
    /// # Errors
    /// Those of ip(8) and tc(8).
    pub fn redirected(subnet: u8) -> Result<Self, BenchError> {
        let mut link = Self::veth(subnet)?;
        let namespace = format!("caisson-bench{subnet}");
        ip(&format!("-n {namespace} addr flush dev eth0"))?;
        ip(&format!(
            "-n {namespace} tuntap add dev {TAP} mode tap vnet_hdr"
        ))?;
        ip(&format!("-n {namespace} link set {TAP} up"))?;
        for (from, to) in [("eth0", TAP), (TAP, "eth0")] {
            tc(&format!("-n {namespace} qdisc add dev {from} ingress"))?;
            tc(&format!(
                "-n {namespace} filter add dev {from} ingress matchall action mirred egress redirect dev {to}"
            ))?;
        }
        link.tap = Some(TAP.into());
        Ok(link)
    }

    /// The tap, of a link that has one.
    pub fn tap_name(&self) -> Option<&str> {
        self.tap.as_deref()
    }

    /// A command that runs where the contender's end is.
    ///
    /// # Errors
    /// ip(8) is not installed.
    pub fn command(&self, program: &Path) -> Result<Command, BenchError> {
        let Some(namespace) = &self.namespace else {
            return Ok(Command::new(program));
        };
        // It becomes the program.
        let mut command = Command::new(find("ip", "iproute2")?);
        command.args(["netns", "exec", namespace]).arg(program);
        Ok(command)
    }

    /// Path of the namespace, of a veth.
    pub fn namespace(&self) -> Option<String> {
        self.namespace
            .as_ref()
            .map(|name| format!("/run/netns/{name}"))
    }

    /// The host's address.
    pub fn host(&self) -> String {
        format!("10.209.{}.1", self.subnet)
    }

    /// The contender's address.
    pub fn guest(&self) -> String {
        format!("10.209.{}.2", self.subnet)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // What was not made cannot be removed.
        let _ = ip(&format!("link del {}", self.name));
        if let Some(namespace) = &self.namespace {
            let _ = ip(&format!("netns del {namespace}"));
        }
    }
}

/// iperf3 and an echo of single bytes, on all of the host's addresses.
///
/// # Errors
/// A port is taken, or iperf3 is not installed.
pub fn serve() -> Result<Running, BenchError> {
    let listener = TcpListener::bind(("0.0.0.0", ECHO_PORT))
        .map_err(BenchError::io(format!("cannot listen on port {ECHO_PORT}")))?;
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = stream;
            // A delayed answer would be measured.
            let _ = stream.set_nodelay(true);
            let mut byte = [0];
            while matches!(stream.read(&mut byte), Ok(1)) && stream.write_all(&byte).is_ok() {}
        }
    });
    let mut server = Command::new(find("iperf3", "iperf3")?);
    server
        .arg("-s")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    Running::spawn("iperf3", &mut server)
}
