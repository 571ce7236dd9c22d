use std::{fs, net::SocketAddr, process::Command, sync::mpsc};

use rustix::thread::UnshareFlags;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixListener,
};

use super::*;

/// Queries with this in them get no answer.
const SILENCE: &[u8] = b"silence";

/// A namespace with a name server, which answers in capitals. None where that is not allowed.
fn namespace() -> Option<std::path::PathBuf> {
    let (tell, told) = mpsc::channel();
    std::thread::spawn(move || {
        // SAFETY: of the thread's own, which shares nothing by it.
        if let Err(error) = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) } {
            eprintln!("skipped: a network namespace: {error}");
            return;
        }
        let up = Command::new("ip")
            .args(["link", "set", "lo", "up"])
            .status();
        assert!(up.unwrap().success());
        let server = StdUdpSocket::bind((ADDRESS, PORT)).unwrap();
        tell.send(rustix::thread::gettid().as_raw_nonzero())
            .unwrap();
        let mut buffer = [0; 2 * MAX_MESSAGE];
        while let Ok((length, from)) = server.recv_from(&mut buffer) {
            answer_in_capitals(&server, &buffer[..length], from);
        }
    });
    let tid = told.recv().ok()?;
    Some(format!("/proc/self/task/{tid}/ns/net").into())
}

fn answer_in_capitals(server: &StdUdpSocket, query: &[u8], from: SocketAddr) {
    if !query.ends_with(SILENCE) {
        server.send_to(&query.to_ascii_uppercase(), from).unwrap();
    }
}

fn frame(tag: u16, text: &[u8]) -> Frame {
    let message = [b"here a header ", text].concat();
    Frame { tag, message }
}

/// The relay, and the agent's end of its connection.
async fn started() -> Option<(Resolver, UnixStream)> {
    let namespace = Namespace::open(&namespace()?).await.unwrap();
    let directory = tempfile::tempdir().unwrap();
    let vsock = directory.path().join("vsock.sock");
    let listener = UnixListener::bind(&vsock).unwrap();
    let accept = async {
        let (mut agent, _) = listener.accept().await.unwrap();
        let mut line = [0; "CONNECT 1027\n".len()];
        agent.read_exact(&mut line).await.unwrap();
        assert_eq!(&line, b"CONNECT 1027\n");
        agent.write_all(b"OK 5000\n").await.unwrap();
        agent
    };
    let (resolver, agent) = tokio::join!(Resolver::start(&namespace, &vsock), accept);
    Some((resolver.unwrap(), agent))
}

async fn send(agent: &mut UnixStream, frame: &Frame) {
    agent.write_all(&frame.encode().unwrap()).await.unwrap();
}

#[tokio::test]
async fn queries_are_asked_in_the_namespace() {
    let Some((resolver, mut agent)) = started().await else {
        return;
    };
    // One that has no answer keeps no other.
    send(&mut agent, &frame(1, SILENCE)).await;
    for tag in [7, 3] {
        send(&mut agent, &frame(tag, b"name")).await;
    }
    let mut tags = Vec::new();
    for _ in 0..2 {
        let answer = Frame::read(&mut agent).await.unwrap().unwrap();
        assert_eq!(answer.message, b"HERE A HEADER NAME");
        tags.push(answer.tag);
    }
    tags.sort_unstable();
    assert_eq!(tags, [3, 7]);
    // More at a time than are asked: the rest is dropped, and the connection goes on.
    for tag in 0..2 * MAX_QUERIES {
        send(&mut agent, &frame(u16::try_from(tag).unwrap(), SILENCE)).await;
    }
    assert!(!resolver.is_over());
    drop(resolver);
    // What it has not read breaks the connection instead of ending it.
    assert_eq!(Frame::read(&mut agent).await.ok().flatten(), None);
}

#[tokio::test]
async fn what_is_no_frame_ends_it() {
    let Some((resolver, mut agent)) = started().await else {
        return;
    };
    agent.write_all(&[0, 1, 0xff, 0xff]).await.unwrap();
    assert_eq!(Frame::read(&mut agent).await.unwrap(), None);
    while !resolver.is_over() {
        tokio::task::yield_now().await;
    }
}

#[test]
fn dockers_files_are_told_from_others() {
    for (file, dockers) in [
        (
            "# Generated\nnameserver 127.0.0.11\noptions ndots:0\n",
            true,
        ),
        ("search a\n  nameserver\t127.0.0.11 # x", true),
        ("nameserver 127.0.0.1\n#nameserver 127.0.0.11\n", false),
        ("nameserver 127.0.0.110\n", false),
        ("# ExtServers: [127.0.0.11]\nnameserver 10.0.0.1\n", false),
        ("", false),
    ] {
        assert_eq!(names(file), dockers, "{file}");
    }
}

#[test]
fn only_files_are_read_and_not_endlessly() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("resolv.conf");
    assert!(is_dockers(&path).is_err());
    fs::write(&path, "nameserver 127.0.0.11\n").unwrap();
    assert!(is_dockers(&path).unwrap());
    let filler = "#\n".repeat(usize::try_from(MAX_FILE).unwrap() / 2);
    fs::write(&path, filler + "nameserver 127.0.0.11\n").unwrap();
    assert!(!is_dockers(&path).unwrap());
    let fifo = directory.path().join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, Mode::RUSR).unwrap();
    for other in [&*fifo, directory.path(), Path::new("/dev/zero")] {
        assert!(!is_dockers(other).unwrap(), "{}", other.display());
    }
}
