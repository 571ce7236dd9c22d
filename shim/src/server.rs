//! The server behind a pod's socket.

use std::{
    collections::HashMap,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixListener as StdListener,
    },
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use caisson_sandbox::Config;
use containerd_shim_protos::{
    sandbox_async::create_sandbox,
    shim_async::create_task,
    ttrpc::r#async::{Server, Service as TtrpcService, transport::Listener},
};
use tokio::{
    io::AsyncReadExt,
    net::{UnixListener, unix::pipe},
    signal::unix::{SignalKind, signal},
};

use crate::{
    arguments::Arguments,
    error::Error,
    events::{Bus, Events},
    logger,
    pod::MicroVms,
    sandbox::{self, Sandbox},
    service::Service,
    start,
    tasks::{Identity, Tasks},
};

/// Name of a pod's sandbox on the host, unique over containerd's namespaces.
pub fn sandbox_id(namespace: &str, pod: &str) -> String {
    format!("{namespace}.{pod}")
}

/// Serves the socket that is standard input until the pod is over.
///
/// # Errors
/// Standard input is no socket, the configuration is wrong.
pub fn run(arguments: Arguments) -> Result<(), Error> {
    logger::init(arguments.debug);
    // Out of the caller's session: its terminal's signals are not for the pod.
    let _ = rustix::process::setsid();
    let listener = listener()?;
    let config = Config::load(None).map_err(caisson_sandbox::Error::from)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_stack_size(256 << 10)
        .build()
        .map_err(Error::io("start the event loop"))?;
    runtime.block_on(serve(arguments, config, listener))
}

fn listener() -> Result<StdListener, Error> {
    let socket: OwnedFd = std::io::stdin()
        .as_fd()
        .try_clone_to_owned()
        .map_err(Error::io("take the socket from standard input"))?;
    let listening = rustix::net::sockopt::socket_acceptconn(&socket).unwrap_or(false);
    if !listening {
        return Err(Error::Usage(
            "standard input is no listening socket; containerd calls this program with the verb start".to_owned(),
        ));
    }
    let listener = StdListener::from(socket);
    listener
        .set_nonblocking(true)
        .map_err(Error::io("prepare the socket"))?;
    Ok(listener)
}

/// Where `start` has bound the socket.
fn path_of(listener: &StdListener) -> Result<PathBuf, Error> {
    let address = listener
        .local_addr()
        .map_err(Error::io("find the socket's address"))?;
    match address.as_pathname() {
        Some(path) => Ok(path.to_owned()),
        None => Err(Error::Usage(
            "the socket on standard input has no path".to_owned(),
        )),
    }
}

async fn serve(arguments: Arguments, config: Config, listener: StdListener) -> Result<(), Error> {
    let socket = path_of(&listener)?;
    let listener = UnixListener::from_std(listener).map_err(Error::io("watch the socket"))?;
    let events = Events::new(Bus::new(
        &arguments.namespace,
        &arguments.address,
        arguments.publish_binary,
        Some(arguments.ttrpc_address),
    ));
    let identity = Identity {
        containerd: !arguments.address.is_empty(),
        sandbox: sandbox_id(&arguments.namespace, &arguments.id),
        namespace: arguments.namespace,
    };
    let pods = Box::new(MicroVms::new(config.clone()));
    let tasks = Tasks::new(config.clone(), identity, pods, events);
    let sandbox = Sandbox::new(config.clone(), tasks.clone());
    let mut server = Server::new()
        .add_listener(trusted(listener))
        .register_service(task_services(&tasks))
        .register_service(create_sandbox(Arc::new(sandbox::Service::new(
            sandbox,
            tasks.clone(),
        ))));
    server.start().await?;
    let known = known()?;
    let mut terminate = signal(SignalKind::terminate()).map_err(Error::io("watch for SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(Error::io("watch for SIGINT"))?;
    tokio::select! {
        () = tasks.ended.notified() => {}
        () = abandoned(known) => log::warn!("nobody was told of this shim; it ends"),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tasks.stop().await;
    tasks.flush_events().await;
    // While it is still listened to: whoever finds none there makes a new one in its place.
    start::remove_socket(&config, &socket);
    // Answers under way get out.
    let _ = tokio::time::timeout(Duration::from_secs(1), server.shutdown()).await;
    Ok(())
}

/// The pipe on standard output by which `start` says that it has told its caller of this server.
///
/// # Errors
/// Standard output cannot be taken.
fn known() -> Result<OwnedFd, Error> {
    let taken = || -> std::io::Result<OwnedFd> {
        let pipe = std::io::stdout().as_fd().try_clone_to_owned()?;
        // Not for this server's children.
        let null = std::fs::File::options().write(true).open("/dev/null")?;
        rustix::stdio::dup2_stdout(&null)?;
        Ok(pipe)
    };
    taken().map_err(Error::io("take standard output"))
}

/// Comes back when the pipe is closed without a word. Never if it is none: somebody serves by hand.
async fn abandoned(known: OwnedFd) {
    if let Ok(mut pipe) = pipe::Receiver::from_owned_fd(known)
        && matches!(pipe.read(&mut [0]).await, Ok(0))
    {
        return;
    }
    std::future::pending().await
}

/// Task v3, and the same under its name before containerd 2.0: v3 is a renamed copy of v2, and
/// the bare address that `start` answers means v2 to every containerd.
fn task_services(tasks: &Arc<Tasks>) -> HashMap<String, TtrpcService> {
    let mut services = create_task(Arc::new(Service::new(tasks.clone())));
    let older = create_task(Arc::new(Service::new(tasks.clone())));
    services.extend(
        older
            .into_iter()
            .map(|(name, service)| (name.replace(".v3.", ".v2."), service)),
    );
    services
}

/// Connections of root and of the user we run as; the socket's mode says the same.
fn trusted(listener: UnixListener) -> Listener {
    let own = rustix::process::geteuid().as_raw();
    Listener::new(futures_util::stream::unfold(
        listener,
        move |listener| async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => match stream.peer_cred() {
                        Ok(peer) if peer.uid() == 0 || peer.uid() == own => {
                            return Some((Ok(stream), listener));
                        }
                        Ok(peer) => log::warn!("refused a connection of user {}", peer.uid()),
                        Err(error) => log::warn!("refused a connection: {error}"),
                    },
                    Err(error) => {
                        log::warn!("cannot accept a connection: {error}");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        },
    ))
}
