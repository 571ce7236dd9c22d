//! What containerd 2.3 and later say on standard input of `start`, and want to hear on standard
//! output (containerd: api/runtime/bootstrap/v1). Older ones say it by flags and environment, send
//! the runtime's options there or nothing, and take the bare address.

use std::{
    io::{Read, Write},
    path::PathBuf,
    sync::mpsc,
    time::Duration,
};

use caisson_sandbox::scaled;
use containerd_shim_protos::{
    bootstrap_api::{BootstrapParams, BootstrapResult, LogLevel},
    protobuf::{Enum, Message},
};

use crate::{arguments::Arguments, error::Error};

/// Longest message; containerd's own are some hundred bytes.
const MAX_MESSAGE: u64 = 1 << 20;

/// Longest wait for the message's end: a caller of old may have left its own input to us.
const READ_LIMIT: Duration = Duration::from_secs(2);

/// Version of the Task API that is announced: both are served, under both names. A later one would
/// have containerd not call this program for a pod's other containers, nor to clean up after them.
const TASK_API_VERSION: i32 = 2;

/// Takes what standard input says over into `arguments`. True: it said something, and the answer
/// is to be of the same kind.
///
/// # Errors
/// Neither flags nor standard input name a namespace and an id.
pub fn read(arguments: &mut Arguments) -> Result<bool, Error> {
    let message = read_message();
    let told = BootstrapParams::parse_from_bytes(&message)
        .ok()
        .filter(|told| is_about(told, arguments));
    let bootstrapped = told.is_some();
    if let Some(told) = told {
        merge(arguments, told);
    }
    arguments.check()?;
    Ok(bootstrapped)
}

/// The runtime's options, which older ones send, begin with strings, too: `Any`'s type and value.
fn is_about(told: &BootstrapParams, arguments: &Arguments) -> bool {
    let agrees = |flag: &str, told: &str| flag.is_empty() || flag == told;
    !told.instance_id.is_empty()
        && !told.namespace.is_empty()
        && agrees(&arguments.id, &told.instance_id)
        && agrees(&arguments.namespace, &told.namespace)
}

fn merge(arguments: &mut Arguments, told: BootstrapParams) {
    // What is new to this program is not for it.
    for extension in &told.extensions {
        log::debug!("not used: {}", extension.value.type_url);
    }
    arguments.debug |= told.log_level.value() <= LogLevel::LOG_LEVEL_DEBUG.value();
    arguments.id = told.instance_id;
    arguments.namespace = told.namespace;
    for (place, value) in [
        (&mut arguments.address, told.containerd_grpc_address),
        (&mut arguments.ttrpc_address, told.containerd_ttrpc_address),
    ] {
        if !value.is_empty() {
            *place = value;
        }
    }
    let path = |text: String| Some(PathBuf::from(text)).filter(|path| !path.as_os_str().is_empty());
    if let Some(binary) = path(told.containerd_binary) {
        arguments.publish_binary = Some(binary);
    }
    arguments.socket_dir = told.socket_dir.and_then(path);
}

fn read_message() -> Vec<u8> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut message = Vec::new();
        let all = std::io::stdin().take(MAX_MESSAGE).read_to_end(&mut message);
        let _ = sender.send(all.map(|_| message).unwrap_or_default());
    });
    receiver
        .recv_timeout(scaled(READ_LIMIT))
        .unwrap_or_default()
}

/// Prints the answer.
///
/// # Errors
/// Standard output is closed.
pub fn answer(address: &str, bootstrapped: bool) -> Result<(), Error> {
    let bytes = if bootstrapped {
        let result = BootstrapResult {
            version: TASK_API_VERSION,
            address: address.to_owned(),
            protocol: "ttrpc".to_owned(),
            ..Default::default()
        };
        result
            .write_to_bytes()
            .map_err(|error| Error::io("encode the answer")(std::io::Error::other(error)))?
    } else {
        // Without a newline: containerd before 1.6 takes every byte for the address.
        address.as_bytes().to_vec()
    };
    let mut output = std::io::stdout();
    output
        .write_all(&bytes)
        .and_then(|()| output.flush())
        .map_err(Error::io("write the answer"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(line: &str) -> Arguments {
        Arguments::parse(line.split(' ').map(str::to_owned)).unwrap()
    }

    fn params() -> BootstrapParams {
        BootstrapParams {
            instance_id: "i".to_owned(),
            namespace: "n".to_owned(),
            log_level: LogLevel::LOG_LEVEL_TRACE.into(),
            containerd_grpc_address: "/run/c.sock".to_owned(),
            containerd_ttrpc_address: "/run/c.sock.ttrpc".to_owned(),
            containerd_binary: "/bin/c".to_owned(),
            socket_dir: Some("/run/s".to_owned()),
            ..Default::default()
        }
    }

    #[test]
    fn parameters_are_taken() {
        let mut taken = arguments("start");
        assert!(is_about(&params(), &taken));
        merge(&mut taken, params());
        taken.check().unwrap();
        assert_eq!(
            (taken.id.as_str(), taken.namespace.as_str(), taken.debug),
            ("i", "n", true)
        );
        assert_eq!(taken.address, "/run/c.sock");
        assert_eq!(taken.ttrpc_address, "/run/c.sock.ttrpc");
        assert_eq!(taken.publish_binary, Some("/bin/c".into()));
        assert_eq!(taken.socket_dir, Some("/run/s".into()));
    }

    #[test]
    fn others_are_not() {
        let other = arguments("-namespace n -id j start");
        assert!(!is_about(&params(), &other), "of another container");
        let mut options = containerd_shim_protos::protobuf::well_known_types::any::Any::new();
        options.type_url = "containerd.runc.v1.Options".to_owned();
        options.value = b"\x0a\x01x".to_vec();
        let bytes = options.write_to_bytes().unwrap();
        let told = BootstrapParams::parse_from_bytes(&bytes).unwrap_or_default();
        assert!(!is_about(&told, &arguments("-namespace n -id i start")));
        assert!(!is_about(
            &BootstrapParams::default(),
            &arguments("-namespace n -id i start")
        ));
    }
}
