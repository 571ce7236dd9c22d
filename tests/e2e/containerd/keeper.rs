//! A thread that lives as long as the program of tests, for processes that end with their parent.

use std::{
    io,
    process::{Child, Command},
    sync::{
        Mutex, OnceLock, PoisonError,
        mpsc::{Sender, channel},
    },
    thread,
};

type Request = (Command, Sender<io::Result<Child>>);

/// Starts a program from that thread, whose end alone is the "death of the parent" of prctl(2).
pub fn spawn(command: Command) -> io::Result<Child> {
    static KEEPER: OnceLock<Mutex<Sender<Request>>> = OnceLock::new();
    let keeper = KEEPER.get_or_init(|| {
        let (requests, received) = channel::<Request>();
        thread::spawn(move || {
            for (mut command, answer) in received {
                let _ = answer.send(command.spawn());
            }
        });
        Mutex::new(requests)
    });
    let gone = || io::Error::other("the thread that starts programs has gone");
    let (answer, answered) = channel();
    keeper
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .send((command, answer))
        .map_err(|_| gone())?;
    answered.recv().map_err(|_| gone())?
}
