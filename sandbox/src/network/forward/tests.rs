use std::{fs::File, net::Shutdown, path::Path, sync::mpsc};

use caisson_protocol::forward::{ACCEPTED, HEADER_LEN, Header, REFUSED};
use rustix::thread::UnshareFlags;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixListener, UnixStream},
};

use super::*;

/// Ports of the guest at which an echo listens; nobody does at others.
const ECHOES: [u16; 3] = [1, 80, 65535];

/// A network namespace of the test's own. None where that is not allowed.
fn namespace() -> Option<(tempfile::TempDir, std::path::PathBuf, mpsc::Sender<()>)> {
    let directory = tempfile::tempdir().unwrap();
    let (tell, told) = mpsc::channel();
    let (keep, kept) = mpsc::channel::<()>();
    std::thread::spawn(move || {
        // SAFETY: of the thread's own, which shares nothing by it.
        let made = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) };
        let tid = rustix::thread::gettid().as_raw_nonzero();
        tell.send(made.map(|()| tid)).unwrap();
        let _ = kept.recv();
    });
    let tid = match told.recv().unwrap() {
        Ok(tid) => tid,
        Err(error) => {
            eprintln!("skipped: a network namespace: {error}");
            return None;
        }
    };
    Some((
        directory,
        format!("/proc/self/task/{tid}/ns/net").into(),
        keep,
    ))
}

/// Runs `work` in the namespace at `path`.
fn inside<T: Send + 'static>(path: &Path, work: impl FnOnce() -> T + Send + 'static) -> T {
    let file = File::open(path).unwrap();
    std::thread::spawn(move || {
        rustix::thread::move_into_link_name_space(file.as_fd(), None).unwrap();
        work()
    })
    .join()
    .unwrap()
}

fn dial(path: &Path, address: &'static str) -> TcpStream {
    let stream = inside(path, move || std::net::TcpStream::connect(address).unwrap());
    stream.set_nonblocking(true).unwrap();
    TcpStream::from_std(stream).unwrap()
}

/// A VMM and an agent, and the guest's servers.
async fn guest(listener: UnixListener) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        tokio::spawn(answer(stream));
    }
}

async fn answer(mut stream: UnixStream) -> io::Result<()> {
    let mut line = [0; "CONNECT 1026\n".len()];
    stream.read_exact(&mut line).await?;
    assert_eq!(&line, b"CONNECT 1026\n");
    stream.write_all(b"OK 5000\n").await?;
    let mut header = [0; HEADER_LEN];
    stream.read_exact(&mut header).await?;
    let Header { port } = Header::decode(&header).unwrap();
    if !ECHOES.contains(&port) {
        return stream.write_all(&[REFUSED]).await;
    }
    stream.write_all(&[ACCEPTED]).await?;
    stream.write_all(&port.to_be_bytes()).await?;
    let (mut read, mut write) = stream.split();
    tokio::io::copy(&mut read, &mut write).await?;
    write.shutdown().await
}

#[tokio::test]
async fn every_port_of_the_loopback_leads_to_the_guest() {
    let Some((directory, path, _keep)) = namespace() else {
        return;
    };
    let vsock = directory.path().join("vsock.sock");
    tokio::spawn(guest(UnixListener::bind(&vsock).unwrap()));
    let opened = Namespace::open(&path).await.unwrap();
    let forward = match Forward::start(&opened, vsock).await {
        Ok(forward) => forward,
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {
            eprintln!("skipped: bpf(2): {source}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    // The interface may come up later.
    inside(&path, || {
        std::process::Command::new("ip")
            .args(["link", "set", "lo", "up"])
            .status()
            .unwrap()
    });
    for address in ["127.0.0.1:80", "127.0.0.1:65535", "[::1]:1"] {
        let mut client = dial(&path, address);
        let port: u16 = address.rsplit(':').next().unwrap().parse().unwrap();
        assert_eq!(client.read_u16().await.unwrap(), port);
        client.write_all(b"to and fro").await.unwrap();
        client.shutdown().await.unwrap();
        let mut text = String::new();
        client.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "to and fro", "{address}");
    }
    // Nobody listens at this one.
    let mut client = dial(&path, "127.0.0.1:81");
    let error = client.read_u8().await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    // Other addresses, and what else is there, are not touched.
    let (taken, other) = inside(&path, || {
        let server = std::net::TcpListener::bind("127.0.0.2:0").unwrap();
        let address = server.local_addr().unwrap();
        let client = std::net::TcpStream::connect(address).unwrap();
        client.shutdown(Shutdown::Both).unwrap();
        let refused = std::net::TcpStream::connect("127.0.0.3:80").unwrap_err();
        (server.accept().is_ok(), refused.kind())
    });
    assert_eq!((taken, other), (true, io::ErrorKind::ConnectionRefused));
    // Too many at a time.
    let mut open = Vec::new();
    for _ in 0..MAX_FORWARDS {
        let mut client = dial(&path, "127.0.0.1:80");
        client.read_u16().await.unwrap();
        open.push(client);
    }
    let error = dial(&path, "127.0.0.1:80").read_u8().await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    // One less.
    open.pop();
    let again = async {
        while dial(&path, "127.0.0.1:80").read_u16().await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), again)
        .await
        .unwrap();

    // All goes with it.
    drop(forward);
    tokio::task::yield_now().await;
    for client in &mut open {
        assert!(client.read_u8().await.is_err());
    }
    let refused = inside(&path, || {
        ["127.0.0.1:80", "[::1]:80"]
            .map(|address| std::net::TcpStream::connect(address).unwrap_err().kind())
    });
    assert_eq!(refused, [io::ErrorKind::ConnectionRefused; 2]);
}
