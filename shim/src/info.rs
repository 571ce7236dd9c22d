//! `-info`: containerd asks once what a runtime is (containerd: docs/runtime-v2, "info").

use std::io::Write;

use containerd_shim_protos::{
    protobuf::{Message, MessageField, well_known_types::any::Any},
    types::introspection::{RuntimeInfo, RuntimeVersion},
};

use crate::error::Error;

/// Name in containerd's configuration.
const NAME: &str = "io.containerd.caisson.v2";

/// How containerd calls the OCI runtime-spec's structure.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Runs the verb. What is on standard input (options) changes nothing of the answer.
///
/// # Errors
/// Standard output is closed.
pub fn run() -> Result<(), Error> {
    let info = RuntimeInfo {
        name: NAME.to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        }),
        features: MessageField::some(Any {
            type_url: FEATURES.to_owned(),
            value: caisson_sandbox::features().to_string().into_bytes(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let bytes = info
        .write_to_bytes()
        .map_err(|error| Error::io("encode the answer")(std::io::Error::other(error)))?;
    std::io::stdout()
        .write_all(&bytes)
        .map_err(Error::io("write the answer"))
}
