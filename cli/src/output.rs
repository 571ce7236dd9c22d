//! What verbs print. `println!` panics when it cannot; here a reader that leaves early (`| head`) is no
//! failure, another one is told at the end, and neither keeps a verb from doing the rest of its work.

use std::{
    fmt::Arguments,
    io::{self, ErrorKind, Write},
    sync::OnceLock,
};

use crate::error::Error;

/// Why nothing more is printed.
static FAILED: OnceLock<io::Error> = OnceLock::new();

/// Prints a line on standard output, as `println!`.
macro_rules! say {
    ($($argument:tt)*) => {
        $crate::output::line(format_args!($($argument)*))
    };
}
pub(crate) use say;

/// See [`say!`].
pub fn line(text: Arguments<'_>) {
    if FAILED.get().is_none()
        && let Err(error) = writeln!(io::stdout(), "{text}")
    {
        // Another thread's is as good.
        let _ = FAILED.set(error);
    }
}

/// Does `work` for each of `names`; prints why it could not be done for one, for which the exit status is 1.
pub fn for_each<'a>(
    names: impl IntoIterator<Item = &'a str>,
    mut work: impl FnMut(&'a str) -> Result<(), Error>,
) -> u8 {
    let mut code = 0;
    for name in names {
        if let Err(error) = work(name) {
            eprintln!("caisson: {error}");
            code = 1;
        }
    }
    code
}

/// What became of all that was printed.
///
/// # Errors
/// It could not be written, and not because nobody wanted it.
pub fn result() -> Result<(), Error> {
    match FAILED.get() {
        Some(error) if error.kind() != ErrorKind::BrokenPipe => Err(Error::Io {
            what: "write to the standard output",
            source: error
                .raw_os_error()
                .map_or(error.kind().into(), io::Error::from_raw_os_error),
        }),
        _ => Ok(()),
    }
}
