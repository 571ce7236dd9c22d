//! Networks of containers: `--network`, published ports and `network`.
//!
//! ```text
//!   store       what networks there are        <state_dir>/networks/<name>.json
//!   wanted      what a container's flags ask for
//!   ports       -p, and sockets that hold ports of the host
//!   attachment  what a running container has    <state_dir>/networks/attached/<id>.json
//!   namespace   its network namespace           <run_dir>/netns/<id>
//!   netavark    the program that makes bridges, interfaces, rules and names
//!   passt       the program that users without root have in its place
//! ```
//!
//! Addresses are given out here, under the lock of [`store::Networks`]; netavark does the rest. A
//! record is written before anything is made and removed after all is gone, so whoever finds one
//! of a container that does not run knows what to take away. (After netavark has failed twice to do
//! so it is removed, too: a container has to be.)

mod address;
mod attachment;
mod namespace;
mod netavark;
mod passt;
mod ports;
mod resolver;
mod store;
mod verbs;
mod wanted;

pub use attachment::{Attachment, Endpoint, connect, detach, prepare};
pub use passt::Link;
pub use ports::{Port, Reserved, check_number, exposed, publish_exposed};
pub use resolver::{Resolver, of_container as resolver_of};
pub use store::{Network, Networks};
pub use verbs::{noun, port};
pub use wanted::{Mode, Wanted, host_lines};

use std::path::PathBuf;

use caisson_sandbox::Config;
use netavark::Netavark;

use crate::error::Error;

/// The programs that networks of `caisson run` need.
pub fn check() -> caisson_kvm_probe::Check {
    match caisson_sandbox::user() {
        None => netavark::check(),
        Some(_) => passt::check(),
    }
}

/// Where the network namespace of a container is, while it has one.
pub fn namespace_of(config: &Config, id: &str) -> PathBuf {
    config.run_dir.join("netns").join(id)
}

/// The networks that a container asks for, the first of them first. Makes the default one if it is
/// not there yet.
///
/// # Errors
/// One is not there; netavark is not installed.
pub fn networks_of(config: &Config, wanted: &Wanted) -> Result<Vec<Network>, Error> {
    let names = match &wanted.mode {
        Mode::Networks(names) => names,
        Mode::User => {
            passt::find()?;
            return Ok(passt::network().into_iter().collect());
        }
        Mode::None | Mode::Container(_) => return Ok(Vec::new()),
    };
    let networks = Networks::of(config);
    {
        let _lock = networks.lock()?;
        networks.ensure_default()?;
    }
    let found = names
        .iter()
        .map(|name| networks.get(name))
        .collect::<Result<Vec<_>, _>>()?;
    for (index, network) in found.iter().enumerate() {
        if found
            .iter()
            .skip(index + 1)
            .any(|other| other.id == network.id)
        {
            return Err(Error::Usage(format!(
                "--network {} is given twice",
                network.name
            )));
        }
    }
    if !wanted.aliases.is_empty() && !found.iter().any(|network| network.dns) {
        return Err(Error::Usage(
            "--network-alias: containers have no names in the default network; make one by `caisson network create`"
                .to_owned(),
        ));
    }
    Netavark::find(config, found.iter().any(resolver::serves_names))?;
    Ok(found)
}
