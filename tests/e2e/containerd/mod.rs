//! Caisson as a runtime of containerd: real daemons of both versions that we support, each
//! started by its test, driven with `ctr`.

pub mod daemon;
mod faults;
mod pods;
mod snapshotters;
mod streams;
mod tasks;

/// Makes tests `one::NAME` and `two::NAME` of each function: with containerd 1.7 and with 2.x.
macro_rules! with_each_containerd {
    ($($name:ident),* $(,)?) => {
        mod one {
            $(#[test] fn $name() { super::$name($crate::containerd::daemon::Version::One); })*
        }
        mod two {
            $(#[test] fn $name() { super::$name($crate::containerd::daemon::Version::Two); })*
        }
    };
}
pub(crate) use with_each_containerd;
