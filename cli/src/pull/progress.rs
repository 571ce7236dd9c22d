//! How far a pull is: docker's lines, and on a terminal one more that moves.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::Write;
use std::time::{Duration, Instant};

use caisson_registry::{LayerState, Progress};
use caisson_rootfs_builder::Digest;

use crate::images::bytes;

/// How often the moving line is drawn at most.
const PERIOD: Duration = Duration::from_millis(100);
/// Width of the bar, in characters.
const WIDTH: u64 = 24;

/// Tells nothing.
pub struct Silent;

impl Progress for Silent {
    fn layer(&self, _: &Digest, _: LayerState) {}
    fn loading(&self) {}
}

/// Lines, the last of which may move.
pub struct Lines<W> {
    out: W,
    terminal: bool,
    /// The moving line is there.
    moving: bool,
}

impl<W: Write> Lines<W> {
    /// Writes to `out`, which is a terminal or not.
    pub fn new(out: W, terminal: bool) -> Self {
        Self {
            out,
            terminal,
            moving: false,
        }
    }

    // Nobody pulls in order to see the lines: that they cannot be written is no reason to stop.
    fn say(&mut self, line: &str) {
        self.clear();
        let _ = writeln!(self.out, "{line}");
    }

    fn show(&mut self, line: &str) {
        if self.terminal {
            let _ = write!(self.out, "\r\x1b[K{line}");
            let _ = self.out.flush();
            self.moving = true;
        }
    }

    fn clear(&mut self) {
        if self.moving {
            let _ = write!(self.out, "\r\x1b[K");
            let _ = self.out.flush();
            self.moving = false;
        }
    }
}

struct Layer {
    size: u64,
    here: u64,
}

struct State<W> {
    lines: Lines<W>,
    layers: BTreeMap<Digest, Layer>,
    downloaded: Vec<Digest>,
    started: Option<Instant>,
    drawn: Option<Instant>,
}

/// Tells of each layer.
pub struct Report<W>(RefCell<State<W>>);

impl<W: Write> Report<W> {
    /// Tells by these lines.
    pub fn new(lines: Lines<W>) -> Self {
        Self(RefCell::new(State {
            lines,
            layers: BTreeMap::new(),
            downloaded: Vec::new(),
            started: None,
            drawn: None,
        }))
    }

    /// A line of its own.
    pub fn say(&self, line: &str) {
        self.0.borrow_mut().lines.say(line);
    }

    /// No more layers.
    pub fn end(&self, complete: bool) {
        let mut state = self.0.borrow_mut();
        state.lines.clear();
        for layer in std::mem::take(&mut state.downloaded) {
            if complete {
                state
                    .lines
                    .say(&format!("{}: Pull complete", layer.short()));
            }
        }
    }
}

impl<W: Write> State<W> {
    fn draw(&mut self) {
        let now = Instant::now();
        let early = |drawn: Instant| now.duration_since(drawn) < PERIOD;
        if !self.lines.terminal || self.drawn.is_some_and(early) {
            return;
        }
        self.drawn = Some(now);
        let size: u64 = self.layers.values().map(|layer| layer.size).sum();
        let here: u64 = self.layers.values().map(|layer| layer.here).sum();
        let since = *self.started.get_or_insert(now);
        let line = bar(here, size, now.duration_since(since));
        self.lines.show(&line);
    }
}

/// "[=====>    ] 12.3MB/45.6MB 3.2MB/s"
fn bar(here: u64, size: u64, since: Duration) -> String {
    let done = usize::try_from(here.saturating_mul(WIDTH) / size.max(1)).unwrap_or(0);
    let width = usize::try_from(WIDTH).unwrap_or(0);
    let done = done.min(width);
    let head = if done < width { ">" } else { "" };
    let filled = format!("{}{head}", "=".repeat(done));
    let mut line = format!(
        "Downloading [{filled:<width$}] {}/{}",
        bytes(here),
        bytes(size)
    );
    if since >= Duration::from_secs(1) {
        let rate = here as f64 / since.as_secs_f64();
        line.push_str(&format!(" {}/s", bytes(rate as u64)));
    }
    line
}

impl<W: Write> Progress for Report<W> {
    fn layer(&self, layer: &Digest, progress: LayerState) {
        let mut state = self.0.borrow_mut();
        let short = layer.short();
        match progress {
            LayerState::Exists => state.lines.say(&format!("{short}: Already exists")),
            LayerState::Waiting(size) => {
                state.layers.insert(*layer, Layer { size, here: 0 });
                state.lines.say(&format!("{short}: Pulling fs layer"));
            }
            LayerState::Downloading(here) => {
                if let Some(layer) = state.layers.get_mut(layer) {
                    layer.here = here;
                }
            }
            LayerState::Downloaded => {
                state.downloaded.push(*layer);
                state.lines.say(&format!("{short}: Download complete"));
            }
        }
        state.draw();
    }

    fn loading(&self) {
        self.0.borrow_mut().lines.show("Loading");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_is_as_long_as_it_should_be() {
        let at = |here, size| bar(here, size, Duration::ZERO);
        assert_eq!(
            at(0, 1000),
            "Downloading [>                       ] 0B/1.0kB"
        );
        assert_eq!(
            at(500, 1000),
            "Downloading [============>           ] 500B/1.0kB"
        );
        assert_eq!(
            at(1000, 1000),
            "Downloading [========================] 1.0kB/1.0kB"
        );
        assert_eq!(at(7, 0), "Downloading [========================] 7B/0B");
        let rated = bar(4_000_000, 8_000_000, Duration::from_secs(2));
        assert!(rated.ends_with(" 4.0MB/8.0MB 2.0MB/s"), "{rated}");
    }

    #[test]
    fn without_a_terminal_there_are_only_whole_lines() {
        let layer = Digest::of(b"x");
        let mut out = Vec::new();
        let report = Report::new(Lines::new(&mut out, false));
        report.layer(&layer, LayerState::Waiting(10));
        report.layer(&layer, LayerState::Downloading(5));
        report.layer(&layer, LayerState::Downloaded);
        report.loading();
        report.end(true);
        drop(report);
        let short = layer.short();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            format!(
                "{short}: Pulling fs layer\n{short}: Download complete\n{short}: Pull complete\n"
            )
        );
    }

    #[test]
    fn on_a_terminal_the_moving_line_makes_way() {
        let layer = Digest::of(b"x");
        let mut out = Vec::new();
        let report = Report::new(Lines::new(&mut out, true));
        report.layer(&layer, LayerState::Waiting(10));
        report.layer(&layer, LayerState::Downloaded);
        report.end(false);
        drop(report);
        let text = String::from_utf8(out).unwrap();
        assert!(text.contains("\r\x1b[KDownloading ["), "{text:?}");
        assert!(text.contains("\r\x1b[K"), "{text:?}");
        assert!(!text.contains("Pull complete"), "{text:?}");
    }
}
