//! Passes bytes between two connections, as both ends of a forwarded one do.

use std::{
    future::poll_fn,
    io,
    os::fd::{AsFd, BorrowedFd},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use rustix::net::{SendFlags, send};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, MissedTickBehavior, interval_at},
};

/// Bytes that are held of each direction.
const BUFFER: usize = 16 * 1024;

/// A stream socket.
pub trait Connection: AsyncRead + AsyncWrite + AsFd + Unpin {}

impl<T: AsyncRead + AsyncWrite + AsFd + Unpin> Connection for T {}

/// Passes on what comes from either to the other, the end of it too, until both have ended. What
/// one does not take keeps the other from sending more.
///
/// One that takes no more (a server that answers early) may still send. One that ends both directions
/// at once before the other has ended has broken off. One that has sent all, but is not there any more
/// to receive, is found every `check`.
///
/// # Errors
/// A connection was broken off; the other should be too.
pub async fn relay<A: Connection, B: Connection>(
    a: &mut A,
    b: &mut B,
    check: Duration,
) -> io::Result<()> {
    let (mut there, mut back) = (Way::new(), Way::new());
    let mut checks = interval_at(Instant::now() + check, check);
    checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    poll_fn(|context| {
        let there_over = there.poll(context, a, b, back.is_open())?.is_ready();
        let back_over = back.poll(context, b, a, there.is_open())?.is_ready();
        if there_over && back_over {
            return Poll::Ready(Ok(()));
        }
        while (there_over || back_over) && checks.poll_tick(context).is_ready() {
            // Nothing is read of it any more, so that its end is not told by a read.
            takes_more(if there_over { a.as_fd() } else { b.as_fd() })?;
        }
        Poll::Pending
    })
    .await
}

/// Sends nothing: that fails on a connection that is over.
fn takes_more(connection: BorrowedFd<'_>) -> io::Result<()> {
    match send(connection, &[], SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
        Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

enum Stage {
    Copying,
    Ending,
    Over,
}

/// One direction.
struct Way {
    buffer: Box<[u8]>,
    sent: usize,
    filled: usize,
    stage: Stage,
}

impl Way {
    fn new() -> Self {
        Self {
            buffer: vec![0; BUFFER].into_boxed_slice(),
            sent: 0,
            filled: 0,
            stage: Stage::Copying,
        }
    }

    fn is_open(&self) -> bool {
        matches!(self.stage, Stage::Copying)
    }

    /// Goes as far as it can. Ready: there is nothing more to pass on. Fails when it cannot be read
    /// from, or ends without taking what comes the other way, if that is `open`.
    fn poll(
        &mut self,
        context: &mut Context<'_>,
        from: &mut impl Connection,
        to: &mut impl Connection,
        open: bool,
    ) -> Poll<io::Result<()>> {
        loop {
            match self.stage {
                Stage::Copying if self.sent < self.filled => {
                    let rest = &self.buffer[self.sent..self.filled];
                    match ready!(Pin::new(&mut *to).poll_write(context, rest)) {
                        Ok(count @ 1..) => self.sent += count,
                        Ok(0) | Err(_) => self.stage = Stage::Over,
                    }
                }
                Stage::Copying => {
                    let mut space = ReadBuf::new(&mut self.buffer);
                    ready!(Pin::new(&mut *from).poll_read(context, &mut space))?;
                    (self.sent, self.filled) = (0, space.filled().len());
                    if self.filled == 0 {
                        if open {
                            takes_more(from.as_fd())?;
                        }
                        self.stage = Stage::Ending;
                    }
                }
                Stage::Ending => {
                    // One that has gone in the meantime needs no end.
                    let _ = ready!(Pin::new(&mut *to).poll_shutdown(context));
                    self.stage = Stage::Over;
                }
                Stage::Over => return Poll::Ready(Ok(())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::sockopt::set_socket_linger;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream, UnixStream},
        task::JoinHandle,
    };

    use super::*;

    /// Client and server of a relayed connection.
    async fn pair() -> (TcpStream, UnixStream, JoinHandle<io::Result<()>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap());
        let (client, accepted) = tokio::join!(client, listener.accept());
        let (mut a, _) = accepted.unwrap();
        let (mut b, server) = UnixStream::pair().unwrap();
        let task =
            tokio::spawn(async move { relay(&mut a, &mut b, Duration::from_millis(20)).await });
        (client.unwrap(), server, task)
    }

    #[tokio::test]
    async fn much_goes_both_ways_and_each_end_by_itself() {
        let (client, server, task) = pair().await;
        let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n / 7) as u8).collect();
        let expected = bytes.clone();
        let (mut from_server, mut to_server) = client.into_split();
        let (mut from_client, mut to_client) = server.into_split();
        let echo = tokio::spawn(async move {
            let mut all = Vec::new();
            from_client.read_to_end(&mut all).await.unwrap();
            to_client.write_all(&all).await.unwrap();
        });
        let sender = tokio::spawn(async move {
            to_server.write_all(&bytes).await.unwrap();
            to_server.shutdown().await.unwrap();
        });
        let mut all = Vec::new();
        from_server.read_to_end(&mut all).await.unwrap();
        assert!(all == expected);
        echo.await.unwrap();
        sender.await.unwrap();
        task.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_server_that_ends_first_still_hears() {
        let (mut client, mut server, task) = pair().await;
        server.write_all(b"bye").await.unwrap();
        server.shutdown().await.unwrap();
        let mut text = String::new();
        client.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "bye");
        client.write_all(b"late").await.unwrap();
        client.shutdown().await.unwrap();
        text.clear();
        server.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "late");
        task.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn the_answer_of_a_server_that_has_left_arrives() {
        let (mut client, mut server, task) = pair().await;
        server.write_all(b"no").await.unwrap();
        drop(server);
        // More than it took.
        let _ = client.write_all(&[0; 100_000]).await;
        let mut answer = [0; 2];
        client.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"no");
        drop(client);
        let _ = task.await.unwrap();
    }

    #[tokio::test]
    async fn a_server_that_breaks_off_has_not_ended() {
        let (mut client, mut server, task) = pair().await;
        server.write_all(b"half an ans").await.unwrap();
        drop(server);
        assert!(task.await.unwrap().is_err());
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert_eq!(answer, "half an ans");
    }

    #[tokio::test]
    async fn a_client_that_breaks_off_ends_it() {
        let (client, _server, task) = pair().await;
        set_socket_linger(&client, Some(Duration::ZERO)).unwrap();
        drop(client);
        assert!(task.await.unwrap().is_err());
    }

    #[tokio::test]
    async fn one_that_has_gone_after_its_end_is_found() {
        let (mut client, mut server, task) = pair().await;
        server.shutdown().await.unwrap();
        let mut nothing = [0];
        assert_eq!(client.read(&mut nothing).await.unwrap(), 0);
        // The client is silent, and its way is open.
        tokio::time::sleep(Duration::from_millis(60)).await;
        assert!(!task.is_finished());
        drop(server);
        assert!(task.await.unwrap().is_err());
    }
}
