//! When the guest needs docker's name server.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::PoisonError,
};

use oci_spec::runtime::Spec;

use super::{Sandbox, blocking};
use crate::{
    network::{Network, is_dockers},
    spec,
};

/// The file of the host that is the container's resolv.conf, as long as its mounts have the host's
/// sources.
pub(super) fn resolv_conf(spec: &Spec) -> Option<PathBuf> {
    let mounts = spec.mounts().as_deref()?;
    let is_at = |mount: usize| {
        let mount = mounts.get(mount);
        mount.is_some_and(|mount| mount.destination() == Path::new("/etc/resolv.conf"))
    };
    let binds = spec::host_binds(spec).into_iter();
    // The last one covers the others.
    let bind = binds.rev().find(|bind| is_at(bind.mount))?;
    Some(bind.source)
}

impl Sandbox {
    /// Has the guest reach docker's name server, if a container's resolv.conf names it by now: docker
    /// writes it anew when a container is connected to its first network that has names.
    pub(super) async fn resolve_names(&self, network: &mut Network) {
        if network.resolves_names() {
            return;
        }
        let files = self.resolv_confs();
        let found = blocking(move || {
            // One that has gone names nobody.
            Ok(files.iter().any(|file| is_dockers(file).unwrap_or(false)))
        });
        if let Ok(true) = found.await
            && let Err(error) = network.resolve_names(&self.vsock).await
        {
            log::warn!("{error}; the names of docker's networks are not found");
        }
    }

    /// Of all containers, each file once.
    fn resolv_confs(&self) -> BTreeSet<PathBuf> {
        let containers = self.containers.lock();
        let containers = containers.unwrap_or_else(PoisonError::into_inner);
        let files = containers
            .values()
            .filter_map(|holdings| holdings.resolv_conf.clone());
        files.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_that_a_container_has_is_found() {
        let mounts = |mounts: &str| {
            let json = format!(r#"{{"ociVersion":"1.2.0","mounts":[{mounts}]}}"#);
            resolv_conf(&spec::parse(json.as_bytes()).unwrap())
        };
        let bind = |source: &str, destination: &str| {
            format!(
                r#"{{"type":"bind","source":"{source}","destination":"{destination}","options":["rbind"]}}"#
            )
        };
        let hosts = bind("/d/hosts", "/etc/hosts");
        let (first, second) = (
            bind("/d/resolv.conf", "/etc/resolv.conf"),
            bind("/e/resolv.conf", "/etc/resolv.conf"),
        );
        assert_eq!(mounts(&hosts), None);
        let found = mounts(&format!("{first},{hosts},{second}"));
        assert_eq!(found, Some("/e/resolv.conf".into()));
        let tmpfs = r#"{"type":"tmpfs","source":"tmpfs","destination":"/etc/resolv.conf"}"#;
        assert_eq!(mounts(tmpfs), None);
    }
}
