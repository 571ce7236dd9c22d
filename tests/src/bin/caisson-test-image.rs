//! Writes the busybox image of the tests as an OCI layout: `caisson-test-image NAME DIRECTORY`.
#![forbid(unsafe_code)]

use std::path::Path;
use std::process::ExitCode;

use caisson_tests::Image;

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [name, directory] = words.as_slice() else {
        eprintln!("usage: caisson-test-image NAME DIRECTORY");
        return ExitCode::from(2);
    };
    Image::busybox(name).write_layout(Path::new(directory));
    ExitCode::SUCCESS
}
