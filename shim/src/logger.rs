//! The log goes to standard error, which `start` has made the bundle's log.

use std::io::Write;

use log::{LevelFilter, Log, Metadata, Record};

struct Logger;

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Libraries only speak up when something is wrong.
        metadata.target().starts_with("containerd_shim_caisson")
            || metadata.target().starts_with("caisson")
            || metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            // containerd's own format, so that it can sort by level; a reader that is gone is no
            // reason to stop.
            let line = format!(
                "level={} msg={:?}\n",
                record.level().as_str().to_lowercase(),
                record.args().to_string()
            );
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

/// Starts logging.
pub fn init(debug: bool) {
    if log::set_logger(&Logger).is_ok() {
        log::set_max_level(if debug {
            LevelFilter::Debug
        } else {
            LevelFilter::Info
        });
    }
}
