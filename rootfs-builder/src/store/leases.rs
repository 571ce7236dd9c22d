//! Which container uses which image.
//!
//! A lease is a file and no lock: the container outlives the process that made it.

use std::path::PathBuf;

use super::disk::{names, read_text, remove_file};
use super::{Image, Lease, Store};
use crate::digest::Digest;
use crate::error::{Error, Result};

impl Store {
    fn lease_path(&self, container: &str) -> Result<PathBuf> {
        if !is_container_id(container) {
            return Err(Error::InvalidContainerId {
                id: container.chars().take(200).collect(),
            });
        }
        Ok(self.leases_dir().join(container))
    }

    /// Finds the image as [`Store::get`] does and claims it for `container` in one step: until
    /// [`Store::release`] its layers stay, whatever is removed. Claiming the same image again changes nothing.
    ///
    /// # Errors
    /// Those of [`Store::get`]; [`Error::LeaseExists`] when the container uses another image.
    pub fn lease(&self, container: &str, name: &str) -> Result<Image> {
        let path = self.lease_path(container)?;
        let _lock = self.lock()?;
        let image = self.get(name)?;
        match self.read_lease(container)? {
            Some(held) if held == image.id => {}
            Some(held) => {
                return Err(Error::LeaseExists {
                    container: container.to_owned(),
                    image: held,
                });
            }
            None => self.replace(&path, image.id.to_string().as_bytes())?,
        }
        Ok(image)
    }

    /// Gives the container's lease back. There being none is no error.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be removed, [`Error::InvalidContainerId`].
    pub fn release(&self, container: &str) -> Result<()> {
        // No lock: removing one file is atomic, and a lease that goes while an image is being removed only
        // makes that more careful than it had to be.
        remove_file(&self.lease_path(container)?).map(drop)
    }

    /// All leases, sorted by container.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Corrupt`].
    pub fn leases(&self) -> Result<Vec<Lease>> {
        let mut leases = Vec::new();
        for container in names(&self.leases_dir())? {
            // One that was released since the directory was read is gone.
            if let Some(image) = self.read_lease(&container)? {
                leases.push(Lease { container, image });
            }
        }
        Ok(leases)
    }

    fn read_lease(&self, container: &str) -> Result<Option<Digest>> {
        let path = self.lease_path(container)?;
        let Some(text) = read_text(&path)? else {
            return Ok(None);
        };
        match text.trim().parse() {
            Ok(image) => Ok(Some(image)),
            Err(error) => Err(Error::Corrupt {
                path,
                reason: error.to_string(),
            }),
        }
    }
}

/// Whether `id` is a container id as docker and containerd allow it; such a one is also a safe file name.
fn is_container_id(id: &str) -> bool {
    let bytes = id.as_bytes();
    bytes.len() <= 128
        && bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(byte))
}
