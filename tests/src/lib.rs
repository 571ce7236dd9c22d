//! The harness of Caisson's end-to-end tests: drives the `caisson` command as a person or a
//! program would, makes small OCI images, and proves after each test that nothing is left behind.
//!
//! It knows Caisson only from outside: no crate of the workspace is linked in. A test starts with
//! [`Host::claim`], which takes the machine for itself, and ends when that value is dropped, which
//! runs the leak check:
//!
//! ```no_run
//! let host = caisson_tests::Host::claim();
//! let image = host.busybox();
//! host.caisson(["run", "--rm", image, "echo", "hello"]).expect_stdout("hello\n");
//! ```
//!
//! A test fails by panicking, so this library does too, with everything that was seen.
#![forbid(unsafe_code)]
#![allow(
    clippy::panic,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test harness fails by panicking"
)]

pub mod command;
pub mod deadline;
pub mod host;
pub mod image;
pub mod leaks;
pub mod registry;
pub mod terminal;

pub use command::{Command, Finished, Running};
pub use deadline::{seconds, until};
pub use host::Host;
pub use image::{Image, Layer};
pub use registry::Registry;
pub use terminal::Terminal;
