//! Events for containerd, in the order they happened.
//!
//! | way | when |
//! |---|---|
//! | ttrpc `Forward` to `TTRPC_ADDRESS` | containerd from 1.3 on names it in the environment of `start` |
//! | `<publish-binary> publish`, one call an event | that service cannot be reached, or is not named |
//!
//! A queue keeps them in order, so one that cannot be delivered holds up those behind it until it
//! is given up; containerd may be restarting at that moment.

use std::{io, path::PathBuf, process::Stdio, time::Duration};

use caisson_sandbox::scaled;
use containerd_shim_protos::{
    api::ForwardRequest,
    protobuf::{
        Message, MessageDyn, MessageField, MessageFull,
        well_known_types::{any::Any, timestamp::Timestamp},
    },
    shim::event::Envelope,
    shim_async::{Client, EventsClient},
    ttrpc::{r#async::transport::Socket, context},
};
use tokio::{
    io::AsyncWriteExt,
    net::UnixStream,
    process::Command,
    sync::{mpsc, oneshot},
    time::Instant,
};

/// Events that may wait; an event bus that takes none for so long is dead.
const QUEUE: usize = 4096;

/// Longest that an event is tried, over all ways.
const GIVE_UP: Duration = Duration::from_secs(15);

/// Longest for one try.
const TRY: Duration = Duration::from_secs(5);

/// Topics (containerd: core/runtime/events.go).
pub mod topic {
    /// A task was created.
    pub const CREATE: &str = "/tasks/create";
    /// A task was started.
    pub const START: &str = "/tasks/start";
    /// A process ended.
    pub const EXIT: &str = "/tasks/exit";
    /// A task was deleted.
    pub const DELETE: &str = "/tasks/delete";
    /// An exec was registered.
    pub const EXEC_ADDED: &str = "/tasks/exec-added";
    /// An exec was started.
    pub const EXEC_STARTED: &str = "/tasks/exec-started";
    /// The kernel killed for want of memory.
    pub const OOM: &str = "/tasks/oom";
    /// A task was frozen.
    pub const PAUSED: &str = "/tasks/paused";
    /// A task goes on.
    pub const RESUMED: &str = "/tasks/resumed";
}

/// Where events go.
#[derive(Debug, Clone, Default)]
pub struct Bus {
    /// containerd's namespace.
    pub namespace: String,
    /// containerd's ttrpc socket.
    pub ttrpc: Option<PathBuf>,
    /// Program that publishes, and containerd's gRPC socket.
    pub publisher: Option<(PathBuf, String)>,
}

impl Bus {
    /// From the command line and the environment; no address means that nobody listens.
    pub fn new(
        namespace: &str,
        address: &str,
        publish_binary: Option<PathBuf>,
        ttrpc_address: Option<String>,
    ) -> Self {
        let ttrpc = ttrpc_address.filter(|address| !address.is_empty());
        Self {
            namespace: namespace.to_owned(),
            ttrpc: ttrpc
                .map(|address| address.strip_prefix("unix://").unwrap_or(&address).into())
                .filter(|_| !address.is_empty()),
            publisher: publish_binary
                .filter(|_| !address.is_empty())
                .map(|binary| (binary, address.to_owned())),
        }
    }
}

/// An event that waits.
#[derive(Debug)]
pub struct Waiting {
    /// Where it belongs.
    pub topic: &'static str,
    at: Timestamp,
    /// The event.
    pub event: Any,
}

enum Item {
    Event(Waiting),
    /// All before it have been delivered or given up.
    Flush(oneshot::Sender<()>),
}

/// The way to containerd's event bus; a dead end when nobody listens there.
#[derive(Clone)]
pub struct Events {
    queue: Option<mpsc::Sender<Item>>,
}

impl Events {
    /// Publishes to `bus`. Needs a runtime.
    pub fn new(bus: Bus) -> Self {
        if bus.ttrpc.is_none() && bus.publisher.is_none() {
            return Self { queue: None };
        }
        let (sender, receiver) = mpsc::channel(QUEUE);
        tokio::spawn(publish_all(receiver, Publisher { bus, client: None }));
        Self {
            queue: Some(sender),
        }
    }

    /// Queues an event that a guest can cause at will: half of the queue is kept for the others.
    pub fn send_if_room<M: MessageFull + MessageDyn>(&self, topic: &'static str, event: &M) {
        let room = self.queue.as_ref().map_or(0, mpsc::Sender::capacity);
        if room > QUEUE / 2 {
            self.send(topic, event);
        }
    }

    /// Queues an event.
    pub fn send<M: MessageFull + MessageDyn>(&self, topic: &'static str, event: &M) {
        let Some(queue) = &self.queue else { return };
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => {
                log::error!("cannot encode an event for {topic}: {error}");
                return;
            }
        };
        let waiting = Waiting {
            topic,
            at: Timestamp::now(),
            event: Any {
                type_url: M::descriptor().full_name().to_owned(),
                value,
                ..Default::default()
            },
        };
        if queue.try_send(Item::Event(waiting)).is_err() {
            log::error!("an event for {topic} is lost: {QUEUE} wait already");
        }
    }

    /// Waits until all that has been sent is delivered or given up, at most `limit`.
    pub async fn flush(&self, limit: Duration) {
        let Some(queue) = &self.queue else { return };
        let flushed = async {
            let (sender, receiver) = oneshot::channel();
            // An end without a word is one as well: nobody publishes any more.
            if queue.send(Item::Flush(sender)).await.is_ok() {
                let _ = receiver.await;
            }
        };
        if tokio::time::timeout(limit, flushed).await.is_err() {
            log::error!("events are lost: containerd has not taken them in time");
        }
    }
}

async fn publish_all(mut queue: mpsc::Receiver<Item>, mut publisher: Publisher) {
    while let Some(item) = queue.recv().await {
        match item {
            Item::Event(event) => publisher.deliver(event).await,
            Item::Flush(done) => {
                let _ = done.send(());
            }
        }
    }
}

struct Publisher {
    bus: Bus,
    /// Kept from one event to the next.
    client: Option<EventsClient>,
}

impl Publisher {
    /// Tries until `GIVE_UP`.
    async fn deliver(&mut self, waiting: Waiting) {
        let end = Instant::now() + scaled(GIVE_UP);
        let mut pause = scaled(Duration::from_millis(50));
        loop {
            let Err(error) = self.publish(&waiting).await else {
                return;
            };
            if Instant::now() + pause > end {
                log::error!("an event for {} is lost: {error}", waiting.topic);
                return;
            }
            log::warn!("cannot publish to {} yet: {error}", waiting.topic);
            tokio::time::sleep(pause).await;
            pause *= 2;
        }
    }

    async fn publish(&mut self, waiting: &Waiting) -> io::Result<()> {
        let forwarded = match &self.bus.ttrpc {
            Some(_) => within(self.forward(waiting)).await,
            None => Err(io::ErrorKind::NotFound.into()),
        };
        let Err(error) = forwarded else { return Ok(()) };
        self.client = None;
        match &self.bus.publisher {
            None => Err(error),
            Some((binary, address)) => {
                let mut command = Command::new(binary);
                command
                    .args(["--address", address, "publish", "--topic", waiting.topic])
                    .args(["--namespace", &self.bus.namespace]);
                within(call(command, &waiting.event)).await
            }
        }
    }

    /// By containerd's ttrpc service (containerd.services.events.ttrpc.v1).
    async fn forward(&mut self, waiting: &Waiting) -> io::Result<()> {
        let request = ForwardRequest {
            envelope: MessageField::some(Envelope {
                timestamp: MessageField::some(waiting.at.clone()),
                namespace: self.bus.namespace.clone(),
                topic: waiting.topic.to_owned(),
                event: MessageField::some(waiting.event.clone()),
                ..Default::default()
            }),
            ..Default::default()
        };
        // One that was kept may be of a containerd that has restarted since.
        if let Some(client) = &self.client
            && client.forward(limit(), &request).await.is_ok()
        {
            return Ok(());
        }
        let path = self.bus.ttrpc.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let client = EventsClient::new(Client::new(Socket::new(UnixStream::connect(path).await?)));
        client
            .forward(limit(), &request)
            .await
            .map_err(io::Error::other)?;
        self.client = Some(client);
        Ok(())
    }
}

fn limit() -> context::Context {
    context::with_duration(scaled(TRY))
}

async fn within(work: impl Future<Output = io::Result<()>>) -> io::Result<()> {
    tokio::time::timeout(scaled(TRY), work)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

async fn call(mut command: Command, event: &Any) -> io::Result<()> {
    let bytes = event.write_to_bytes().map_err(io::Error::other)?;
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(&bytes).await?;
    }
    let status = child.wait().await?;
    if status.success() {
        Ok(())
    } else {
        Err(io::Error::other(format!("its publisher ended: {status}")))
    }
}

#[cfg(test)]
impl Events {
    /// Events of which a test takes what was sent, by [`taken`].
    pub fn for_test() -> (Self, Sent) {
        let (sender, receiver) = mpsc::channel(QUEUE);
        let events = Self {
            queue: Some(sender),
        };
        (events, Sent(receiver))
    }
}

/// What a test's events were.
#[cfg(test)]
pub struct Sent(mpsc::Receiver<Item>);

#[cfg(test)]
impl Sent {
    /// All so far.
    pub fn take(&mut self) -> Vec<Waiting> {
        let items = std::iter::from_fn(|| self.0.try_recv().ok());
        items
            .filter_map(|item| match item {
                Item::Event(event) => Some(event),
                Item::Flush(_) => None,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt, path::Path, sync::Arc};

    use containerd_shim_protos::{
        api::Empty,
        events::task::{TaskExit, TaskOOM, TaskStart},
        shim_async::{Events as EventsService, create_events},
        ttrpc::{
            self,
            r#async::{Server, TtrpcContext},
        },
    };

    use super::*;

    struct Containerd(mpsc::UnboundedSender<Envelope>);

    #[async_trait::async_trait]
    impl EventsService for Containerd {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            self.0.send(request.envelope.unwrap()).unwrap();
            Ok(Empty::new())
        }
    }

    async fn containerd(socket: &Path) -> (Server, mpsc::UnboundedReceiver<Envelope>) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let mut server = Server::new()
            .bind(&format!("unix://{}", socket.display()))
            .unwrap()
            .register_service(create_events(Arc::new(Containerd(sender))));
        server.start().await.unwrap();
        (server, receiver)
    }

    fn exit(status: u32) -> TaskExit {
        TaskExit {
            exit_status: status,
            ..Default::default()
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn forwarded_in_order_over_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("ttrpc");
        let (mut server, mut received) = containerd(&socket).await;
        let address = format!("unix://{}", socket.display());
        let events = Events::new(Bus::new("ns", "/grpc", None, Some(address)));
        events.send(topic::START, &TaskStart::default());
        for status in 0..50 {
            events.send(topic::EXIT, &exit(status));
        }
        events.flush(Duration::from_secs(10)).await;
        let first = received.recv().await.unwrap();
        assert_eq!(
            (first.topic.as_str(), first.namespace.as_str()),
            (topic::START, "ns")
        );
        assert_eq!(first.event.type_url, "containerd.events.TaskStart");
        for status in 0..50 {
            let envelope = received.recv().await.unwrap();
            let event = TaskExit::parse_from_bytes(&envelope.event.value).unwrap();
            assert_eq!(event.exit_status, status);
            assert!(envelope.timestamp.seconds > 0);
        }

        server.shutdown().await.unwrap();
        drop(server);
        let _ = fs::remove_file(&socket);
        events.send(topic::EXIT, &exit(99));
        tokio::time::sleep(Duration::from_millis(20)).await;
        let (_server, mut received) = containerd(&socket).await;
        events.flush(Duration::from_secs(10)).await;
        let envelope = received.recv().await.unwrap();
        let event = TaskExit::parse_from_bytes(&envelope.event.value).unwrap();
        assert_eq!(event.exit_status, 99);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn by_the_publisher_when_ttrpc_is_not_there() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("publisher");
        // Fails once, so that the order is that of the queue even so.
        let script = "#!/bin/sh\ncd \"${0%/*}\" || exit 9\n\
            [ -e once ] || { : > once; exit 1; }\n\
            echo \"$@\" >> calls\ncat >> bytes\n";
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let events = Events::new(Bus::new(
            "ns",
            "/grpc",
            Some(program),
            Some("/nowhere/ttrpc".to_owned()),
        ));
        events.send(topic::START, &TaskStart::default());
        events.send(topic::EXIT, &exit(3));
        events.flush(Duration::from_secs(10)).await;
        let calls = fs::read_to_string(directory.path().join("calls")).unwrap();
        assert_eq!(
            calls,
            "--address /grpc publish --topic /tasks/start --namespace ns\n\
             --address /grpc publish --topic /tasks/exit --namespace ns\n"
        );
        let bytes = fs::read(directory.path().join("bytes")).unwrap();
        assert!(
            bytes
                .windows(27)
                .any(|text| text == b"containerd.events.TaskStart")
        );
    }

    #[tokio::test(flavor = "current_thread", start_paused = true)]
    async fn a_dead_bus_holds_nobody_up_for_ever() {
        let events = Events::new(Bus::new("ns", "/grpc", None, Some("/nowhere".to_owned())));
        events.send(topic::EXIT, &exit(1));
        let start = Instant::now();
        events.flush(Duration::from_secs(60)).await;
        assert!(start.elapsed() <= GIVE_UP);
        events.send(topic::EXIT, &exit(1));
        events.flush(Duration::from_secs(1)).await;
        assert!(start.elapsed() <= GIVE_UP + Duration::from_secs(1));
    }

    #[test]
    fn what_a_guest_causes_leaves_room_for_the_rest() {
        let (events, mut sent) = Events::for_test();
        for _ in 0..=QUEUE {
            events.send_if_room(topic::OOM, &TaskOOM::default());
        }
        events.send(topic::EXIT, &exit(0));
        let sent = sent.take();
        assert_eq!(sent.len(), QUEUE / 2 + 1);
        assert_eq!(sent.last().unwrap().topic, topic::EXIT);
    }

    #[test]
    fn nobody_listens_without_an_address() {
        let bus = Bus::new("ns", "", Some("/x".into()), Some("/y".to_owned()));
        assert!(bus.ttrpc.is_none() && bus.publisher.is_none());
    }
}
