//! Tells whether this host can run microVMs.
//!
//! Having `/dev/kvm` is not enough: some hosts offer one that emulates every instruction, on
//! which a stock guest kernel neither gets far (`cmpxchg16b` fails) nor gets there in time. So
//! [`probe`] runs a tiny 64-bit guest and looks at what came of it; [`host`] looks at what else
//! of the host Caisson uses.

mod guest;
pub mod host;
mod kvm;
mod programs;

use serde::{Deserialize, Serialize};

pub use kvm::{DEFAULT_KVM, MIN_MIPS, probe};

/// How a check came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Caisson works, with less isolation, speed or function.
    Warning,
    /// No microVM can run.
    Failed,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// For programs; never changes its meaning.
    pub id: String,
    /// How it came out.
    pub status: Status,
    /// For people: what was found.
    pub text: String,
    /// For people: what to do, where something can be done.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub advice: Option<String>,
}

impl Check {
    /// A check that came out well.
    pub fn ok(id: &str, text: impl Into<String>) -> Self {
        Self::new(id, Status::Ok, text, None)
    }

    /// Something that works less well than it could.
    pub fn warning(id: &str, text: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(id, Status::Warning, text, Some(advice.into()))
    }

    /// Something without which no microVM can run.
    pub fn failed(id: &str, text: impl Into<String>, advice: impl Into<String>) -> Self {
        Self::new(id, Status::Failed, text, Some(advice.into()))
    }

    fn new(id: &str, status: Status, text: impl Into<String>, advice: Option<String>) -> Self {
        Self {
            id: id.to_owned(),
            status,
            text: text.into(),
            advice,
        }
    }
}

/// What [`probe`] found, in the order in which it looked. Checks that could not be made because
/// an earlier one failed are left out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// The checks.
    pub checks: Vec<Check>,
    /// Millions of guest instructions a second in a tight loop, when it got that far.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub mips: Option<f64>,
}

impl Report {
    /// The worst status of all checks; [`Status::Ok`] when there are none.
    pub fn status(&self) -> Status {
        self.checks
            .iter()
            .map(|check| check.status)
            .max()
            .unwrap_or(Status::Ok)
    }

    /// Whether a stock guest can run here.
    pub fn is_usable(&self) -> bool {
        self.status() != Status::Failed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_check_decides() {
        let mut report = Report {
            checks: vec![Check::ok("a", "fine"), Check::warning("b", "slow", "wait")],
            mips: None,
        };
        assert_eq!(report.status(), Status::Warning);
        assert!(report.is_usable());
        report.checks.push(Check::failed("c", "gone", "fetch it"));
        assert!(!report.is_usable());
    }

    #[test]
    fn reports_survive_json() {
        let report = Report {
            checks: vec![Check::ok("a", "fine"), Check::failed("b", "bad", "mend it")],
            mips: Some(60.5),
        };
        let text = serde_json::to_string(&report).unwrap();
        assert!(text.contains(r#""status":"failed""#), "{text}");
        assert_eq!(serde_json::from_str::<Report>(&text).unwrap(), report);
    }
}
