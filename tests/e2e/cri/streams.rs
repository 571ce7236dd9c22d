//! Exec and attach as `kubectl` does them: CRI gives an address, at which the streams are channels
//! of one WebSocket.

use std::net::TcpStream;

use caisson_tests::{Host, seconds, until};
use k8s_cri::v1::{AttachRequest, ExecRequest};
use serde_json::{Value, json};
use tungstenite::{ClientRequestBuilder, Message, WebSocket, http::Uri};

use super::client::{Cri, container};
use crate::containerd::{daemon::Version, with_containerd};

with_containerd!(
    one: [exec_and_attach],
    two: [exec_and_attach]
);

/// Kubernetes' remote command protocol: the first byte of a message is its channel.
const PROTOCOL: &str = "v4.channel.k8s.io";
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;

/// Streams of one process, or of one forwarded port or two.
pub struct Streams {
    socket: WebSocket<TcpStream>,
    /// What has come, by channel.
    received: [Vec<u8>; 4],
}

impl Streams {
    #[track_caller]
    pub fn open(url: &str) -> Self {
        let uri: Uri = url.replacen("http", "ws", 1).parse().unwrap();
        let stream = TcpStream::connect(uri.authority().unwrap().as_str()).unwrap();
        stream.set_read_timeout(Some(seconds(20.0))).unwrap();
        let request = ClientRequestBuilder::new(uri).with_sub_protocol(PROTOCOL);
        let (socket, _) = tungstenite::client(request, stream).unwrap();
        Self {
            socket,
            received: Default::default(),
        }
    }

    pub fn send(&mut self, channel: u8, bytes: impl AsRef<[u8]>) {
        let mut message = vec![channel];
        message.extend(bytes.as_ref());
        self.socket.send(Message::binary(message)).unwrap();
    }

    /// What has come on a channel and was not yet taken.
    pub fn take(&mut self, channel: u8) -> Vec<u8> {
        std::mem::take(&mut self.received[usize::from(channel)])
    }

    pub fn text(&self, channel: u8) -> String {
        String::from_utf8_lossy(&self.received[usize::from(channel)]).into_owned()
    }

    /// Reads one message; false at the end.
    pub fn read(&mut self) -> bool {
        match self.socket.read() {
            Ok(Message::Binary(bytes)) => {
                if let Some((channel, bytes)) = bytes.split_first() {
                    self.received[usize::from(*channel)].extend(bytes);
                }
                true
            }
            Ok(Message::Close(_)) | Err(tungstenite::Error::ConnectionClosed) => false,
            Ok(_) => true,
            Err(error) => panic!("{error}; so far {:?}", self.text(STDOUT)),
        }
    }

    /// Reads until a channel has a text.
    #[track_caller]
    pub fn expect(&mut self, channel: u8, wanted: &str) {
        while !self.text(channel).contains(wanted) {
            assert!(
                self.read(),
                "ended without {wanted:?}: {}",
                self.text(channel)
            );
        }
    }

    /// Reads to the end and gives the exit code.
    #[track_caller]
    fn exit_code(&mut self) -> i64 {
        while self.received[usize::from(STATUS)].is_empty() && self.read() {}
        let status: Value = serde_json::from_str(&self.text(STATUS)).unwrap();
        if status["status"] == "Success" {
            return 0;
        }
        let cause = &status["details"]["causes"][0];
        assert_eq!(cause["reason"], "ExitCode", "{status}");
        cause["message"].as_str().unwrap().parse().unwrap()
    }
}

fn exec_and_attach(version: Version) {
    let host = Host::claim();
    let cri = Cri::start(&host, version);
    let config = cri.pod("streams");
    let pod = cri.run_pod(&config);
    let mut echo = container("echo", "while read word; do echo got $word; done");
    echo.stdin = true;
    let echo = cri.run(&pod, &config, echo);
    let exec = |script: &str, tty: bool| {
        let request = ExecRequest {
            container_id: echo.clone(),
            cmd: ["sh", "-c", script].map(str::to_owned).to_vec(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        };
        let answer = cri.call(async |mut client| client.exec(request).await);
        Streams::open(&answer.unwrap().url)
    };
    let mut plain = exec("read word; echo out $word; echo err >&2; exit 3", false);
    plain.send(STDIN, "typed\n");
    assert_eq!(plain.exit_code(), 3);
    assert_eq!(plain.text(STDOUT), "out typed\n");
    assert_eq!(plain.text(STDERR), "err\n");

    let mut terminal = exec("read word; stty size; test -t 0", true);
    terminal.send(RESIZE, json!({ "Width": 100, "Height": 30 }).to_string());
    // The size is on its way by another call than the word.
    let resized = until(seconds(10.0), || {
        let sizes = cri.output(
            &echo,
            "for p in /proc/[0-9]*; do stty -F $p/fd/0 size 2>/dev/null; done; true",
        );
        sizes.contains("30 100").then_some(())
    });
    assert!(resized.is_some(), "the terminal has not the client's size");
    terminal.send(STDIN, "go\n");
    terminal.expect(STDOUT, "30 100");
    assert_eq!(terminal.exit_code(), 0);

    // One client after the other.
    for word in ["first", "second"] {
        let request = AttachRequest {
            container_id: echo.clone(),
            stdin: true,
            tty: false,
            stdout: true,
            stderr: true,
        };
        let answer = cri.call(async |mut client| client.attach(request).await);
        let mut attached = Streams::open(&answer.unwrap().url);
        attached.send(STDIN, format!("{word}\n"));
        attached.expect(STDOUT, &format!("got {word}"));
    }
    let logged = until(seconds(10.0), || {
        (cri.log(&config, "echo") == ["stdout F got first", "stdout F got second"]).then_some(())
    });
    assert!(logged.is_some(), "{:?}", cri.log(&config, "echo"));
    cri.remove_pod(&pod);
}
