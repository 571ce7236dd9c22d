//! How much may pass an interface of the pod.

use std::collections::HashMap;

use caisson_vmm_api::RateLimit;

use crate::{config::Config, error::Error};

/// Beginning of the annotations that a pod may carry.
const ANNOTATION: &str = "io.caisson.network-";

/// Limits of each of a pod's interfaces; a member of 0 is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InterfaceLimits {
    /// To the pod.
    pub rx: RateLimit,
    /// From the pod.
    pub tx: RateLimit,
}

impl InterfaceLimits {
    /// The host's.
    pub fn of(config: &Config) -> Self {
        Self {
            rx: RateLimit {
                bytes_per_second: config.network_rx_bytes_per_second,
                burst_bytes: config.network_rx_burst_bytes,
                operations_per_second: config.network_rx_packets_per_second,
                burst_operations: config.network_rx_burst_packets,
            },
            tx: RateLimit {
                bytes_per_second: config.network_tx_bytes_per_second,
                burst_bytes: config.network_tx_burst_bytes,
                operations_per_second: config.network_tx_packets_per_second,
                burst_operations: config.network_tx_burst_packets,
            },
        }
    }

    /// What a pod asks for in its annotations `io.caisson.network-{rx,tx}-{bytes,packets}-per-second`.
    ///
    /// # Errors
    /// One of them is no positive number.
    pub fn of_annotations(annotations: &HashMap<String, String>) -> Result<Self, Error> {
        let mut limits = Self::default();
        for (end, place) in [
            ("rx-bytes-per-second", &mut limits.rx.bytes_per_second),
            (
                "rx-packets-per-second",
                &mut limits.rx.operations_per_second,
            ),
            ("tx-bytes-per-second", &mut limits.tx.bytes_per_second),
            (
                "tx-packets-per-second",
                &mut limits.tx.operations_per_second,
            ),
        ] {
            let name = format!("{ANNOTATION}{end}");
            if let Some(text) = annotations.get(&name) {
                *place = text.parse().ok().filter(|rate| *rate > 0).ok_or_else(|| {
                    Error::Invalid(format!(
                        "the annotation {name} is \"{text}\": it must be a number from 1"
                    ))
                })?;
            }
        }
        Ok(limits)
    }

    /// Both: of each rate the lower. A pod can lower what the host allows and not raise it.
    #[must_use]
    pub fn and(self, other: &Self) -> Self {
        Self {
            rx: both(&self.rx, &other.rx),
            tx: both(&self.tx, &other.tx),
        }
    }

    /// For the VMM.
    pub fn parts(&self) -> [Option<RateLimit>; 2] {
        [self.rx, self.tx].map(|limit| {
            (limit.bytes_per_second > 0 || limit.operations_per_second > 0).then_some(limit)
        })
    }
}

/// The bursts are those of the first.
fn both(one: &RateLimit, other: &RateLimit) -> RateLimit {
    let lower = |a: u64, b: u64| match (a, b) {
        (0, rate) | (rate, 0) => rate,
        (a, b) => a.min(b),
    };
    RateLimit {
        bytes_per_second: lower(one.bytes_per_second, other.bytes_per_second),
        operations_per_second: lower(one.operations_per_second, other.operations_per_second),
        ..*one
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn annotations(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        let pairs = pairs.iter();
        let named = pairs.map(|(name, value)| (format!("{ANNOTATION}{name}"), (*value).to_owned()));
        named.collect()
    }

    #[test]
    fn a_pod_lowers_and_does_not_raise() {
        let host = InterfaceLimits::of(&Config {
            network_rx_bytes_per_second: 1000,
            network_rx_burst_bytes: 300,
            network_tx_packets_per_second: 50,
            ..Config::default()
        });
        let asked = annotations(&[
            ("rx-bytes-per-second", "2000"),
            ("tx-bytes-per-second", "700"),
            ("tx-packets-per-second", "5"),
        ]);
        let asked = InterfaceLimits::of_annotations(&asked).unwrap();
        let [rx, tx] = host.and(&asked).parts().map(Option::unwrap);
        assert_eq!((rx.bytes_per_second, rx.burst_bytes), (1000, 300));
        assert_eq!((tx.bytes_per_second, tx.operations_per_second), (700, 5));
        assert_eq!(InterfaceLimits::default().parts(), [None, None]);
    }

    #[test]
    fn nonsense_is_named() {
        for text in ["0", "-1", "", "1M", "99999999999999999999"] {
            let asked = annotations(&[("tx-packets-per-second", text)]);
            let error = InterfaceLimits::of_annotations(&asked).unwrap_err();
            let message = error.to_string();
            assert!(
                message.contains("io.caisson.network-tx-packets-per-second")
                    && message.contains(&format!("{text:?}")),
                "{message}"
            );
        }
        let other = HashMap::from([("io.caisson.unknown".to_owned(), "x".to_owned())]);
        assert_eq!(
            InterfaceLimits::of_annotations(&other).unwrap(),
            InterfaceLimits::default()
        );
    }
}
