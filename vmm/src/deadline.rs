//! How long to wait for other programs.

use std::{sync::OnceLock, time::Duration};

/// `duration` times `CAISSON_TIMEOUT_SCALE` (1 when unset or not between 0.001 and 1,000,000),
/// which is read once.
pub fn scaled(duration: Duration) -> Duration {
    static SCALE: OnceLock<f64> = OnceLock::new();
    let scale = SCALE.get_or_init(|| parse(std::env::var("CAISSON_TIMEOUT_SCALE").ok().as_deref()));
    duration.mul_f64(*scale)
}

fn parse(text: Option<&str>) -> f64 {
    text.and_then(|text| text.parse().ok())
        .filter(|scale: &f64| (0.001..=1e6).contains(scale))
        .unwrap_or(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sensible_scales_count() {
        assert_eq!(parse(Some("10")), 10.0);
        assert_eq!(parse(Some("0.5")), 0.5);
        for text in [
            None,
            Some(""),
            Some("-1"),
            Some("0"),
            Some("NaN"),
            Some("inf"),
        ] {
            assert_eq!(parse(text), 1.0);
        }
    }
}
