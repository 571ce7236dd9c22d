//! Caisson as a runtime of containerd: real daemons of both versions that we support,
//! started by the tests, driven with `ctr`.

pub mod config;
pub mod daemon;
mod faults;
mod keeper;
pub mod networks;
mod pods;
mod snapshotters;
mod streams;
mod tasks;

/// Makes tests `one::NAME`, with containerd 1.7, and `two::NAME`, with 2.x, of functions. What
/// depends on Caisson alone runs with one of them, as every test takes its seconds.
macro_rules! with_containerd {
    (one: [$($one:ident),* $(,)?], two: $two:tt) => {
        mod one {
            $(#[test] fn $one() { super::$one($crate::containerd::daemon::Version::One); })*
        }
        with_containerd!(two: $two);
    };
    (two: [$($two:ident),* $(,)?]) => {
        mod two {
            $(#[test] fn $two() { super::$two($crate::containerd::daemon::Version::Two); })*
        }
    };
}
pub(crate) use with_containerd;
