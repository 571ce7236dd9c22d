//! Messages for whoever reads standard error.

use std::{
    io::Write,
    sync::atomic::{AtomicU32, Ordering},
};

use log::{LevelFilter, Log, Metadata, Record, SetLoggerError};

/// Most messages of one process: a guest can cause some of them, and must neither fill a log nor
/// make a thread wait for a reader of standard error (a pipe takes 64 KiB).
const MAX_MESSAGES: u32 = 256;
/// Longest message, bytes.
const MAX_BYTES: usize = 250;

struct StandardError {
    messages: AtomicU32,
}

static LOGGER: StandardError = StandardError {
    messages: AtomicU32::new(0),
};

/// Sends warnings and errors to standard error.
///
/// # Errors
/// When it was called before.
pub fn install() -> Result<(), SetLoggerError> {
    log::set_logger(&LOGGER)?;
    log::set_max_level(LevelFilter::Warn);
    Ok(())
}

impl Log for StandardError {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= LevelFilter::Warn
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let number = self
            .messages
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| {
                (count < MAX_MESSAGES).then_some(count + 1)
            });
        if let Ok(number) = number {
            // There is nowhere to tell of a failure.
            let _ = std::io::stderr().write_all(line(record, number + 1).as_bytes());
        }
    }

    fn flush(&self) {}
}

fn line(record: &Record<'_>, number: u32) -> String {
    let level = record.level().as_str().to_ascii_lowercase();
    let mut line = format!("caisson-vmm: {level}: {}", record.args());
    line.truncate(line.floor_char_boundary(MAX_BYTES));
    if number == MAX_MESSAGES {
        line.push_str(" (no more messages)");
    }
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use log::Level;

    use super::*;

    #[test]
    fn lines_are_short_and_the_last_says_so() {
        let text = "ä".repeat(1000);
        let format = |number| {
            line(
                &Record::builder()
                    .level(Level::Warn)
                    .args(format_args!("{text}"))
                    .build(),
                number,
            )
        };
        assert!(format(1).starts_with("caisson-vmm: warn: ä"));
        assert!(format(1).len() <= MAX_BYTES + 1);
        assert!(format(MAX_MESSAGES).ends_with("(no more messages)\n"));
    }
}
