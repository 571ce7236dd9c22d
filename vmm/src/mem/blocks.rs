//! Which blocks of the region are plugged.

use std::ops::Range;

const WORD_BITS: u64 = u64::BITS as u64;

/// A bitmap over blocks, which knows how many are set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Blocks {
    words: Vec<u64>,
    count: u64,
    plugged: u64,
}

impl Blocks {
    /// `count` blocks, none plugged.
    pub(super) fn new(count: u64) -> Self {
        Self {
            words: vec![0; count.div_ceil(WORD_BITS) as usize],
            count,
            plugged: 0,
        }
    }

    /// From [`Blocks::words`]; `None` if they are not of `count` blocks.
    pub(super) fn from_words(count: u64, words: Vec<u64>) -> Option<Self> {
        let rest = count % WORD_BITS;
        let beyond = rest != 0 && words.last().is_some_and(|last| last >> rest != 0);
        if words.len() as u64 != count.div_ceil(WORD_BITS) || beyond {
            return None;
        }
        let plugged = words.iter().map(|word| u64::from(word.count_ones())).sum();
        Some(Self {
            words,
            count,
            plugged,
        })
    }

    /// For saving.
    pub(super) fn words(&self) -> &[u64] {
        &self.words
    }

    pub(super) fn count(&self) -> u64 {
        self.count
    }

    pub(super) fn plugged(&self) -> u64 {
        self.plugged
    }

    /// How many of `blocks`, which exist, are plugged.
    pub(super) fn plugged_within(&self, blocks: Range<u64>) -> u64 {
        blocks.filter(|block| self.is_plugged(*block)).count() as u64
    }

    pub(super) fn set(&mut self, blocks: Range<u64>, plugged: bool) {
        for block in blocks {
            if self.is_plugged(block) != plugged {
                self.words[(block / WORD_BITS) as usize] ^= 1 << (block % WORD_BITS);
                if plugged {
                    self.plugged += 1;
                } else {
                    self.plugged -= 1;
                }
            }
        }
    }

    /// The first run of plugged blocks.
    pub(super) fn first_run(&self) -> Option<Range<u64>> {
        let start = (0..self.count).find(|block| self.is_plugged(*block))?;
        let end = (start..self.count)
            .find(|block| !self.is_plugged(*block))
            .unwrap_or(self.count);
        Some(start..end)
    }

    fn is_plugged(&self, block: u64) -> bool {
        self.words[(block / WORD_BITS) as usize] >> (block % WORD_BITS) & 1 != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_counted_once() {
        let mut blocks = Blocks::new(130);
        assert_eq!(blocks.first_run(), None);
        blocks.set(60..130, true);
        blocks.set(100..130, true);
        assert_eq!(blocks.plugged(), 70);
        assert_eq!(blocks.first_run(), Some(60..130));
        blocks.set(61..64, false);
        assert_eq!(blocks.plugged(), 67);
        assert_eq!(blocks.first_run(), Some(60..61));
        assert_eq!(blocks.plugged_within(59..66), 3);
    }

    #[test]
    fn only_bitmaps_of_the_size_are_taken() {
        let mut blocks = Blocks::new(70);
        blocks.set(69..70, true);
        let words = blocks.words().to_vec();
        assert_eq!(Blocks::from_words(70, words.clone()), Some(blocks));
        assert_eq!(Blocks::from_words(69, words.clone()), None);
        assert_eq!(Blocks::from_words(64, words.clone()), None);
        assert_eq!(Blocks::from_words(129, words), None);
        assert!(Blocks::from_words(64, vec![u64::MAX]).is_some());
    }
}
