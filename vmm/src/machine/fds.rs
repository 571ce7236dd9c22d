//! The descriptors of one request.

use std::os::fd::OwnedFd;

use caisson_vmm_api::Fd;

use super::MachineError;

/// Descriptors that came with a packet; each can be taken once. The rest is closed in the end.
#[derive(Debug, Default)]
pub struct Fds(Vec<Option<OwnedFd>>);

impl From<Vec<OwnedFd>> for Fds {
    fn from(fds: Vec<OwnedFd>) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }
}

impl Fds {
    /// The descriptor that `fd` speaks of; `what` names its use in errors.
    ///
    /// # Errors
    /// [`MachineError::Invalid`] when there is none or it was taken already.
    pub fn take(&mut self, fd: Fd, what: &str) -> Result<OwnedFd, MachineError> {
        let count = self.0.len();
        let slot = self.0.get_mut(fd.0 as usize).ok_or_else(|| {
            MachineError::Invalid(format!(
                "{what}: descriptor {} of {count} was not sent",
                fd.0
            ))
        })?;
        slot.take().ok_or_else(|| {
            MachineError::Invalid(format!("{what}: descriptor {} is used twice", fd.0))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_descriptor_is_taken_once() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let mut fds = Fds::from(vec![OwnedFd::from(reader)]);
        fds.take(Fd(0), "kernel").unwrap();
        let again = fds.take(Fd(0), "kernel").unwrap_err().to_string();
        assert_eq!(again, "kernel: descriptor 0 is used twice");
        let absent = fds.take(Fd(1), "tap").unwrap_err().to_string();
        assert_eq!(absent, "tap: descriptor 1 of 1 was not sent");
    }
}
