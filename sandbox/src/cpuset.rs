//! Lists of processors or memory nodes of the host, as cpuset(7) writes them: `0-3,7`.

use std::{collections::BTreeSet, fmt, str::FromStr};

/// No kernel counts more.
const MOST: u32 = 8192;

/// A set of numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CpuSet(BTreeSet<u32>);

impl CpuSet {
    /// Numbers in it.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Everything that is in either.
    pub fn union(&self, other: &Self) -> Self {
        Self(self.0.union(&other.0).copied().collect())
    }

    /// Whether all of it is in `other`.
    pub fn is_subset(&self, other: &Self) -> bool {
        self.0.is_subset(&other.0)
    }
}

impl FromStr for CpuSet {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let number = |text: &str| {
            let number = text.trim().parse().map_err(drop)?;
            if number < MOST { Ok(number) } else { Err(()) }
        };
        let mut set = BTreeSet::new();
        for part in text.trim().split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last): (u32, u32) = (number(first)?, number(last)?);
            if first > last {
                return Err(());
            }
            set.extend(first..=last);
        }
        Ok(Self(set))
    }
}

impl fmt::Display for CpuSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut numbers = self.0.iter().copied().peekable();
        let mut separator = "";
        while let Some(first) = numbers.next() {
            let mut last = first;
            while let Some(next) = numbers.next_if_eq(&(last + 1)) {
                last = next;
            }
            if first == last {
                write!(f, "{separator}{first}")?;
            } else {
                write!(f, "{separator}{first}-{last}")?;
            }
            separator = ",";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> CpuSet {
        text.parse().unwrap()
    }

    #[test]
    fn lists_are_read_and_written() {
        for (text, same) in [
            ("0", "0"),
            ("0-3,7", "0-3,7"),
            ("3,1,2, 5-6\n", "1-3,5-6"),
            ("4-4,5", "4-5"),
        ] {
            assert_eq!(of(text).to_string(), same);
        }
        assert_eq!(of("0-3,7").len(), 5);
        assert_eq!(of("0-1").union(&of("1,4")).to_string(), "0-1,4");
        assert!(of("2").is_subset(&of("1-3")) && !of("2,4").is_subset(&of("1-3")));
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for text in [
            "",
            "a",
            "1-",
            "-1",
            "3-1",
            "1,,2",
            "8192",
            "0-4294967295",
            "1-2-3",
        ] {
            assert!(text.parse::<CpuSet>().is_err(), "{text}");
        }
    }
}
