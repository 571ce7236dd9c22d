//! `logs`.

use std::{
    collections::VecDeque,
    io::{self, Write},
    time::Duration,
};

use clap::ArgMatches;

use crate::{
    arguments::one,
    container::{Container, Containers},
    error::Error,
    log_file::{Reader, Record},
};

/// How often a log that is followed is looked at.
const INTERVAL: Duration = Duration::from_millis(50);

/// Runs the verb.
///
/// # Errors
/// No such container, or its log cannot be read.
pub fn run(matches: &ArgMatches) -> Result<u8, Error> {
    let containers = Containers::open()?;
    let container = containers.find(one(matches, "container").unwrap_or_default())?;
    let tail = match one(matches, "tail") {
        None | Some("all") => None,
        Some(text) => Some(
            text.parse::<usize>()
                .map_err(|_| Error::Usage(format!("--tail {text}: not a number of lines")))?,
        ),
    };
    let path = containers.directory(&container.id).join("log.json");
    let printer = Printer {
        timestamps: matches.get_flag("timestamps"),
    };
    let mut reader = Reader::open(&path).map_err(Error::file("read", &path))?;
    let read = |reader: &mut Reader| reader.next().map_err(Error::file("read", &path));
    if let Some(lines) = tail {
        let mut last = VecDeque::new();
        while let Some(record) = read(&mut reader)? {
            last.push_back(record);
            if last.len() > lines {
                last.pop_front();
            }
        }
        for record in &last {
            if printer.print(record).is_err() {
                return Ok(0);
            }
        }
    }
    loop {
        // Looked at first: what is written before the end is read after it.
        let over = !matches.get_flag("follow") || !runs(&containers, &container);
        while let Some(record) = read(&mut reader)? {
            // A reader that has left needs no error.
            if printer.print(&record).is_err() {
                return Ok(0);
            }
        }
        if over {
            return Ok(0);
        }
        std::thread::sleep(INTERVAL);
    }
}

fn runs(containers: &Containers, container: &Container) -> bool {
    // Removed by --rm: it has ended.
    containers
        .find(&container.id)
        .is_ok_and(|container| container.is_active())
}

struct Printer {
    timestamps: bool,
}

impl Printer {
    fn print(&self, record: &Record) -> io::Result<()> {
        let text = if self.timestamps {
            format!("{} {}", record.time, record.log)
        } else {
            record.log.clone()
        };
        if record.stream == "stderr" {
            io::stderr().write_all(text.as_bytes())
        } else {
            let mut stdout = io::stdout().lock();
            stdout
                .write_all(text.as_bytes())
                .and_then(|()| stdout.flush())
        }
    }
}
