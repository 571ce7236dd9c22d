//! The rest of a program's output, after its end.
//!
//! A program that has ended can have written more than its reader has taken (`| less`), and that is
//! waited for as long as the reader wants. What the guest does not bring to its end is not waited
//! for: somebody in a container may hold a stream open.

use std::{
    future::Future,
    io::{self, Read},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

/// How the copies of a program's streams get on: each is either waiting for the program or busy with
/// its reader.
#[derive(Debug, Default)]
pub struct Progress {
    copies: AtomicUsize,
    /// Copies that wait for the program.
    waiting: AtomicUsize,
    /// Times that one has ceased to.
    turns: AtomicUsize,
}

impl Progress {
    /// Calls `finished`, which waits for all copies as long as it is told and says whether they have
    /// ended, until they have or for `limit` nothing has come from the program while no reader was
    /// waited for. True: they have ended.
    pub fn outlast(&self, limit: Duration, mut finished: impl FnMut(Duration) -> bool) -> bool {
        loop {
            let turns = self.turns.load(SeqCst);
            if finished(limit) {
                return true;
            }
            if self.stalled_since(turns) {
                return false;
            }
        }
    }

    /// The same for a future.
    pub async fn outlast_future(
        &self,
        limit: Duration,
        finished: impl Future<Output = ()>,
    ) -> bool {
        let mut finished = pin!(finished);
        loop {
            let turns = self.turns.load(SeqCst);
            if tokio::time::timeout(limit, &mut finished).await.is_ok() {
                return true;
            }
            if self.stalled_since(turns) {
                return false;
            }
        }
    }

    fn stalled_since(&self, turns: usize) -> bool {
        self.waiting.load(SeqCst) >= self.copies.load(SeqCst) && self.turns.load(SeqCst) == turns
    }
}

/// One copy of a stream, known to its program's [`Progress`] while it lives.
#[derive(Debug)]
pub struct Copying(Arc<Progress>);

impl Copying {
    /// One more.
    pub fn new(progress: &Arc<Progress>) -> Self {
        progress.copies.fetch_add(1, SeqCst);
        Self(progress.clone())
    }

    /// Waits for the program until what is returned is dropped.
    pub fn wait(&self) -> Waiting<'_> {
        self.0.waiting.fetch_add(1, SeqCst);
        Waiting(&self.0)
    }
}

impl Drop for Copying {
    fn drop(&mut self) {
        self.0.copies.fetch_sub(1, SeqCst);
    }
}

/// See [`Copying::wait`].
#[derive(Debug)]
pub struct Waiting<'a>(&'a Progress);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.turns.fetch_add(1, SeqCst);
        self.0.waiting.fetch_sub(1, SeqCst);
    }
}

/// A program's stream that is being copied.
#[derive(Debug)]
pub struct Output<R> {
    from: R,
    copying: Copying,
}

impl<R> Output<R> {
    /// One of the program with that progress.
    pub fn new(from: R, progress: &Arc<Progress>) -> Self {
        let copying = Copying::new(progress);
        Self { from, copying }
    }
}

impl<R: Read> Read for Output<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let _waiting = self.copying.wait();
        self.from.read(buffer)
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, sync::mpsc, thread};

    use super::*;

    const LIMIT: Duration = Duration::from_millis(20);

    #[test]
    fn a_reader_is_waited_for_and_a_program_is_not() {
        let progress = Arc::new(Progress::default());
        let (from, mut program) = io::pipe().unwrap();
        let mut output = Output::new(from, &progress);
        let (reader_wants, wanted) = mpsc::channel::<()>();
        let (done, ended) = mpsc::channel();
        let copy = thread::spawn(move || {
            let mut byte = [0];
            while output.read(&mut byte).unwrap() == 1 {
                wanted.recv().unwrap();
            }
            drop(output);
            done.send(()).unwrap();
        });
        let finished = |limit| ended.recv_timeout(limit).is_ok();
        assert!(
            !progress.outlast(LIMIT, finished),
            "the program says nothing"
        );
        program.write_all(b"12").unwrap();
        drop(program);
        // Slower than the limit.
        let reader = thread::spawn(move || {
            for _ in 0..2 {
                thread::sleep(5 * LIMIT);
                reader_wants.send(()).unwrap();
            }
        });
        assert!(progress.outlast(LIMIT, finished), "a slow reader was left");
        reader.join().unwrap();
        copy.join().unwrap();
    }

    #[tokio::test(flavor = "current_thread")]
    async fn futures_are_waited_for_by_the_same_rule() {
        let progress = Arc::new(Progress::default());
        let copying = Copying::new(&progress);
        let waiting = copying.wait();
        let never = std::future::pending();
        assert!(!progress.outlast_future(LIMIT, never).await);
        drop(waiting);
        // Busy with its reader.
        let slow = tokio::time::sleep(5 * LIMIT);
        assert!(progress.outlast_future(LIMIT, slow).await);
    }
}
