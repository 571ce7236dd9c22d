//! Links between the host and the contenders, and what the host serves on them.

use std::{
    io::{Read, Write},
    net::TcpListener,
    process::{Command, Stdio},
};

use crate::{
    child::{Running, find, quiet},
    error::BenchError,
};

/// Of the echo service.
const ECHO_PORT: u16 = 5202;

/// A link to one contender; goes when dropped.
pub struct Link {
    name: String,
    namespace: Option<String>,
    /// Third byte of both addresses.
    subnet: u8,
}

fn ip(words: &str) -> Result<(), BenchError> {
    quiet(Command::new(find("ip", "iproute2")?).args(words.split(' ')))
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

    /// A tap for a virtual machine.
    ///
    /// # Errors
    /// Those of ip(8).
    pub fn tap(subnet: u8) -> Result<Self, BenchError> {
        let name = format!("cbench{subnet}");
        ip(&format!("tuntap add dev {name} mode tap vnet_hdr"))?;
        let link = Self {
            name: name.clone(),
            namespace: None,
            subnet,
        };
        ip(&format!("addr add {}/24 dev {name}", link.host()))?;
        ip(&format!("link set {name} up"))?;
        Ok(link)
    }

    /// The interface on the host.
    pub fn name(&self) -> &str {
        &self.name
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
