//! Builds the guest image: `caisson-guest-image --agent PATH --out FILE`.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::ExitCode;

use caisson_rootfs_builder::guest_image;

const USAGE: &str = "usage: caisson-guest-image --agent PATH --out FILE

Writes the read-only root file system (EROFS) of Caisson's guests with the agent PATH to FILE.
The same agent gives the same bytes.

  --agent PATH   the agent, a static x86-64 program
  --out FILE     the image to write; replaced in one step if it exists
  --help         show this text
  --version      show the version";

/// What the command line asks for.
enum Command {
    Build { agent: PathBuf, out: PathBuf },
    Say(String),
}

fn main() -> ExitCode {
    let command = match parse() {
        Ok(command) => command,
        Err(error) => {
            eprintln!("caisson-guest-image: {error}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match command {
        Command::Say(text) => println!("{text}"),
        Command::Build { agent, out } => {
            if let Err(error) = guest_image::build(&agent, &out) {
                eprintln!("caisson-guest-image: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}

fn parse() -> Result<Command, lexopt::Error> {
    use lexopt::prelude::*;
    let mut agent = None;
    let mut out = None;
    let mut parser = lexopt::Parser::from_env();
    while let Some(argument) = parser.next()? {
        match argument {
            Long("agent") => agent = Some(PathBuf::from(parser.value()?)),
            Long("out") => out = Some(PathBuf::from(parser.value()?)),
            Short('h') | Long("help") => return Ok(Command::Say(USAGE.to_owned())),
            Short('V') | Long("version") => {
                return Ok(Command::Say(format!(
                    "caisson-guest-image {}",
                    env!("CARGO_PKG_VERSION")
                )));
            }
            other => return Err(other.unexpected()),
        }
    }
    Ok(Command::Build {
        agent: agent.ok_or("--agent is missing")?,
        out: out.ok_or("--out is missing")?,
    })
}
