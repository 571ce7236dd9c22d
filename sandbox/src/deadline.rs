//! Every wait has an end, and all ends move by one knob.

use std::{ffi::OsString, sync::OnceLock, time::Duration};

const VARIABLE: &str = "CAISSON_TIMEOUT_SCALE";

/// The knob, for the environment of a program that has ends of its own.
pub fn variable() -> Option<(&'static str, OsString)> {
    Some((VARIABLE, std::env::var_os(VARIABLE)?))
}

/// `duration` on bare metal, times `CAISSON_TIMEOUT_SCALE` (a number above 0; 1 when unset or
/// not a number).
pub fn scaled(duration: Duration) -> Duration {
    static SCALE: OnceLock<f64> = OnceLock::new();
    let scale = SCALE.get_or_init(|| {
        std::env::var(VARIABLE)
            .ok()
            .and_then(|text| text.parse().ok())
            .filter(|scale: &f64| scale.is_finite() && *scale > 0.0)
            .unwrap_or(1.0)
    });
    duration.mul_f64(*scale)
}
