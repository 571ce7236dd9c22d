//! The agent's log is the kernel's: it reaches the host with the console's last lines.

use std::{fs::File, io::Write, sync::OnceLock};

use log::{LevelFilter, Log, Metadata, Record};

struct Kmsg(OnceLock<Option<File>>);

static KMSG: Kmsg = Kmsg(OnceLock::new());

impl Log for Kmsg {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        // /dev is mounted by the kernel or by boot; before that there is nowhere to write.
        let file = self
            .0
            .get_or_init(|| File::options().write(true).open("/dev/kmsg").ok());
        if let Some(mut file) = file.as_ref() {
            let level = match record.level() {
                log::Level::Error => 3,
                log::Level::Warn => 4,
                log::Level::Info => 6,
                log::Level::Debug | log::Level::Trace => 7,
            };
            // One write is one record of at most about 1,000 bytes.
            let mut line = format!("<{level}>caisson-agent: {}\n", record.args());
            line.truncate(line.floor_char_boundary(900));
            // A full or closed log is no reason to stop.
            let _ = file.write_all(line.as_bytes());
        }
    }

    fn flush(&self) {}
}

/// Sends `log` to /dev/kmsg.
pub fn init() {
    if log::set_logger(&KMSG).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}
