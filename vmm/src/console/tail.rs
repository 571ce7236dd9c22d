//! The last words of a guest.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Bytes kept.
pub const TAIL_BYTES: usize = 16 * 1024;

/// The last [`TAIL_BYTES`] of what the guest printed, over all its consoles. Clones share it.
#[derive(Clone, Default)]
pub struct Tail(Arc<Mutex<VecDeque<u8>>>);

impl Tail {
    /// Appends output; the oldest bytes go.
    pub fn push(&self, bytes: &[u8]) {
        let bytes = &bytes[bytes.len().saturating_sub(TAIL_BYTES)..];
        let mut ring = self.lock();
        let excess = (ring.len() + bytes.len()).saturating_sub(TAIL_BYTES);
        ring.drain(..excess);
        ring.extend(bytes);
    }

    /// What is kept, as text without control characters but line ends and tabs: nothing for a
    /// terminal to obey, and nothing that gets six times as long as a JSON string.
    pub fn text(&self) -> String {
        let ring = self.lock();
        let (front, back) = ring.as_slices();
        String::from_utf8_lossy(&[front, back].concat())
            .chars()
            .filter(|character| matches!(character, '\n' | '\t') || !character.is_control())
            .collect()
    }

    /// Whether Linux reported a panic.
    pub fn holds_panic(&self) -> bool {
        self.text().contains("Kernel panic - not syncing")
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<u8>> {
        // Bytes are bytes, whatever a thread that panicked did.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_end_is_kept() {
        let tail = Tail::default();
        tail.push(&[b'a'; TAIL_BYTES]);
        tail.push(b"Kernel panic - not syncing: x");
        let text = tail.text();
        assert_eq!(text.len(), TAIL_BYTES);
        assert!(text.ends_with("syncing: x") && text.starts_with("aaa"));
        assert!(tail.holds_panic());
        tail.push(&[b'b'; 3 * TAIL_BYTES]);
        assert_eq!(tail.text(), "b".repeat(TAIL_BYTES));
        assert!(!tail.holds_panic());
    }

    #[test]
    fn control_characters_are_left_out() {
        let tail = Tail::default();
        tail.push("a\r\n\tb\u{1}\u{1b}[0m\u{7f}\u{9b}ä\"".as_bytes());
        assert_eq!(tail.text(), "a\n\tb[0mä\"");
        // As JSON no byte is more than three.
        for byte in [0, 1, b'\n', b'"', 0xff] {
            tail.push(&[byte; TAIL_BYTES]);
            let json = serde_json::to_vec(&tail.text()).unwrap();
            assert!(json.len() <= 3 * TAIL_BYTES + 2, "{byte}");
        }
    }
}
