//! Every wait has an end, and all ends move by one knob.

use std::{sync::OnceLock, time::Duration};

/// `duration` on bare metal, times `CAISSON_TIMEOUT_SCALE` (a number above 0; 1 when unset or
/// not a number).
pub fn scaled(duration: Duration) -> Duration {
    static SCALE: OnceLock<f64> = OnceLock::new();
    let scale = SCALE.get_or_init(|| {
        std::env::var("CAISSON_TIMEOUT_SCALE")
            .ok()
            .and_then(|text| text.parse().ok())
            .filter(|scale: &f64| scale.is_finite() && *scale > 0.0)
            .unwrap_or(1.0)
    });
    duration.mul_f64(*scale)
}
