//! `delete`: after the server has died, whatever the reason.

use std::io::Write;

use caisson_sandbox::Config;
use containerd_shim_protos::{
    api::DeleteResponse,
    protobuf::{Message, MessageField, well_known_types::timestamp::Timestamp},
};

use crate::{arguments::Arguments, error::Error, server, start};

/// 128 + SIGKILL: nobody saw how the container ended.
const KILLED: u32 = 137;

/// Runs the verb.
///
/// # Errors
/// Something could not be removed.
pub fn run(arguments: &Arguments) -> Result<(), Error> {
    let config = Config::load(None).map_err(caisson_sandbox::Error::from)?;
    let socket = start::socket_path(&config, &arguments.namespace, &arguments.id);
    caisson_sandbox::cleanup(
        &config,
        &server::sandbox_id(&arguments.namespace, &arguments.id),
    )?;
    start::remove_socket(&socket);
    let response = DeleteResponse {
        exit_status: KILLED,
        exited_at: MessageField::some(Timestamp::now()),
        ..Default::default()
    };
    let bytes = response.write_to_bytes().map_err(|error| Error::Io {
        what: "encode the answer",
        source: std::io::Error::other(error),
    })?;
    std::io::stdout()
        .write_all(&bytes)
        .map_err(Error::io("write the answer"))
}
