//! Time limits, all stretched by the one knob `CAISSON_TIMEOUT_SCALE`.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// `limit` seconds of a bare-metal machine, times `CAISSON_TIMEOUT_SCALE` (a float, 1 when unset).
///
/// # Panics
/// If the variable is set to something that is not a positive number.
pub fn seconds(limit: f64) -> Duration {
    static SCALE: OnceLock<f64> = OnceLock::new();
    let scale = SCALE.get_or_init(|| match std::env::var("CAISSON_TIMEOUT_SCALE") {
        Ok(text) => match text.parse::<f64>() {
            Ok(scale) if scale.is_finite() && scale > 0.0 => scale,
            _ => panic!("CAISSON_TIMEOUT_SCALE={text:?} is not a positive number"),
        },
        Err(_) => 1.0,
    });
    Duration::from_secs_f64(limit * scale)
}

/// Asks `probe` until it gives a value, for at most `limit`; `None` when it never did.
pub fn until<T>(limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(value) = probe() {
            return Some(value);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn until_gives_the_first_value() {
        let mut left = 3;
        let got = until(Duration::from_secs(5), || {
            left -= 1;
            (left == 0).then_some("done")
        });
        assert_eq!(got, Some("done"));
    }

    #[test]
    fn until_gives_up() {
        let start = Instant::now();
        assert_eq!(until(Duration::from_millis(120), || None::<()>), None);
        assert!(start.elapsed() >= Duration::from_millis(120));
    }
}
