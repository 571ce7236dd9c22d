//! The caller's terminal.

use std::io::stdin;

use rustix::termios::{
    LocalModes, OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr,
};

use crate::error::Error;

/// Puts the terminal back as it was when dropped.
pub struct Raw {
    before: Termios,
}

impl Raw {
    /// Gives every key to the container.
    ///
    /// # Errors
    /// Standard input is no terminal.
    pub fn enter() -> Result<Self, Error> {
        let before = tcgetattr(stdin()).map_err(Error::io("read the terminal's settings"))?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Now, &raw)
            .map_err(Error::io("change the terminal's settings"))?;
        Ok(Self { before })
    }
}

/// A terminal that does not show what is typed, until this is dropped.
pub struct NoEcho {
    before: Termios,
}

impl NoEcho {
    /// For passwords.
    ///
    /// # Errors
    /// Standard input is no terminal.
    pub fn enter() -> Result<Self, Error> {
        let before = tcgetattr(stdin()).map_err(Error::io("read the terminal's settings"))?;
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        tcsetattr(stdin(), OptionalActions::Now, &silent)
            .map_err(Error::io("change the terminal's settings"))?;
        Ok(Self { before })
    }
}

impl Drop for NoEcho {
    fn drop(&mut self) {
        // The terminal may be gone.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &self.before);
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // The terminal may be gone.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &self.before);
    }
}

/// Rows and columns of the caller's terminal.
pub fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(stdin()).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}

/// Docker's refusal of -t where there is no terminal to pass on.
///
/// # Errors
/// Standard input is wanted and no terminal.
pub fn require(tty: bool, interactive: bool) -> Result<(), Error> {
    if tty && interactive && !isatty(stdin()) {
        return Err(Error::Exit {
            code: 1,
            message: "the input device is not a TTY".to_owned(),
        });
    }
    Ok(())
}
