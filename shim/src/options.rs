//! Options of the runtime in containerd's configuration, which come with each task.

use caisson_sandbox::ETC;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use prost::Message;

use crate::error::Error;

/// Name of the message that containerd has for runtimes it does not know (containerd:
/// api/types/runtimeoptions/v1).
const OPTIONS: &str = "runtimeoptions.v1.Options";

#[derive(Clone, PartialEq, Message)]
struct Options {
    #[prost(string, tag = "2")]
    config_path: String,
    /// What the configuration says there, when it names no path.
    #[prost(bytes = "vec", tag = "3")]
    config_body: Vec<u8>,
}

/// Refuses options that ask for another configuration than the host's: who wrote them would
/// believe that they hold. runc's, which some callers send to all runtimes, mean nothing here.
///
/// # Errors
/// A `ConfigPath`; a malformed message.
pub fn check(options: Option<&Any>) -> Result<(), Error> {
    let Some(options) = options else {
        return Ok(());
    };
    if options.type_url.rsplit('/').next() != Some(OPTIONS) {
        return Ok(());
    }
    let options = Options::decode(options.value.as_slice())
        .map_err(|error| Error::Invalid(format!("malformed {OPTIONS}: {error}")))?;
    if !options.config_path.is_empty() {
        return Err(Error::Unsupported(format!(
            "the runtime's option ConfigPath ({}) is not supported: Caisson has one configuration for the \
             host, in {ETC}; take the option out of containerd's configuration",
            options.config_path
        )));
    }
    if !options.config_body.is_empty() {
        log::debug!(
            "the runtime's options in containerd's configuration are not used: {}",
            String::from_utf8_lossy(&options.config_body).trim()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(name: &str, path: &str, body: &str) -> Any {
        Any {
            type_url: name.to_owned(),
            value: Options {
                config_path: path.to_owned(),
                config_body: body.as_bytes().to_vec(),
            }
            .encode_to_vec(),
            ..Default::default()
        }
    }

    #[test]
    fn another_configuration_is_refused_by_its_path() {
        let path = "/etc/other.toml";
        let named = any(&format!("types.containerd.io/{OPTIONS}"), path, "");
        let error = check(Some(&named)).unwrap_err().to_string();
        assert!(error.contains(path) && error.contains(ETC), "{error}");
        check(Some(&any(OPTIONS, "", "SystemdCgroup = true"))).unwrap();
        check(Some(&any("containerd.runc.v1.Options", path, ""))).unwrap();
        check(None).unwrap();
        let mut broken = any(OPTIONS, path, "");
        broken.value.truncate(4);
        assert!(check(Some(&broken)).is_err());
    }
}
