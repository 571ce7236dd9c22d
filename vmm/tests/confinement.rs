//! What a jailed and filtered process can still do. Has a main of its own: both need a process
//! with one thread, and each case ends one.

use std::{
    error::Error,
    io,
    os::{fd::AsRawFd, unix::process::ExitStatusExt},
    process::{Command, ExitCode, Output},
};

use caisson_vmm::{
    jail,
    seccomp::{self, Mode, ThreadKind},
};

const UID: u32 = 2_000_123_456;

type Verdict = Result<(), Box<dyn Error>>;
type Case = (&'static str, fn() -> Verdict);

/// Run by the test program.
const TESTS: &[Case] = &[
    ("a_jailed_process_has_nothing", a_jailed_process_has_nothing),
    (
        "root_without_an_identity_is_nobody",
        root_without_an_identity_is_nobody,
    ),
    ("user_0_is_refused", user_0_is_refused),
    (
        "an_unprivileged_process_is_jailed_too",
        an_unprivileged_process_is_jailed_too,
    ),
    (
        "forbidden_calls_end_the_process",
        forbidden_calls_end_the_process,
    ),
    ("allowed_calls_pass", allowed_calls_pass),
    ("log_mode_lets_calls_through", log_mode_lets_calls_through),
    ("jail_and_filter_together", jail_and_filter_together),
];

/// Run in a process of their own, which the tests start.
const INSIDE: &[Case] = &[
    ("jailed", inside_jailed),
    ("nobody", inside_nobody),
    ("root", inside_root),
    ("unprivileged", inside_unprivileged),
    ("together", inside_together),
    ("openat", || filtered(ThreadKind::Api, openat_is_unknown)),
    ("openat_block", || {
        filtered(ThreadKind::Block, openat_is_unknown)
    }),
    ("open", || filtered(ThreadKind::Api, old_open)),
    ("socket", || filtered(ThreadKind::Vsock, inet_socket)),
    ("inet_pair", || filtered(ThreadKind::Vsock, inet_pair)),
    ("exec", || filtered(ThreadKind::Api, exec)),
    ("executable", || {
        filtered(ThreadKind::Api, executable_memory)
    }),
    ("thread_in_device", || filtered(ThreadKind::Rng, thread)),
    ("memfd_in_vcpu", || filtered(ThreadKind::Vcpu, memfd)),
    ("kvm_in_console", || {
        filtered(ThreadKind::Console, || ioctl(0xae80))
    }),
    ("vm_in_vcpu", || {
        filtered(ThreadKind::Vcpu, || ioctl(0xae01))
    }),
    ("process", || filtered(ThreadKind::Api, process)),
    ("fine_api", || {
        filtered(ThreadKind::Api, || {
            thread()?;
            memfd()?;
            memory()
        })
    }),
    ("fine_devices", fine_devices),
    ("fine_vcpu", || {
        filtered(ThreadKind::Vcpu, || {
            ioctl(0xae80)?;
            memory()
        })
    }),
    ("fine_vsock", || filtered(ThreadKind::Vsock, unix_pair)),
    ("panic", || filtered(ThreadKind::Block, panics)),
    ("log", inside_log),
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [flag, name] = arguments.as_slice()
        && flag == "--inside"
    {
        let Some((_, case)) = INSIDE.iter().find(|(known, _)| known == name) else {
            return ExitCode::from(2);
        };
        return match case() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{name}: {error}");
                ExitCode::FAILURE
            }
        };
    }
    let wanted = arguments.iter().find(|argument| !argument.starts_with('-'));
    let mut failures = 0;
    for (name, test) in TESTS {
        if wanted.is_some_and(|filter| !name.contains(filter.as_str())) {
            continue;
        }
        match test() {
            Ok(()) => println!("test {name} ... ok"),
            Err(error) => {
                failures += 1;
                println!("test {name} ... FAILED\n  {error}");
            }
        }
    }
    ExitCode::from(u8::from(failures > 0))
}

fn inside(name: &str) -> io::Result<Output> {
    Command::new(std::env::current_exe()?)
        .args(["--inside", name])
        .env_remove("RUST_BACKTRACE")
        .output()
}

fn expect_success(name: &str) -> Verdict {
    let output = inside(name)?;
    let words = String::from_utf8_lossy(&output.stderr);
    if !words.is_empty() {
        println!("{name}: {}", words.trim_end());
    }
    ensure(
        output.status.success(),
        &format!("{name}: {}", output.status),
    )
}

fn ensure(holds: bool, what: &str) -> Verdict {
    if holds { Ok(()) } else { Err(what.into()) }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn a_jailed_process_has_nothing() -> Verdict {
    if !is_root() {
        println!("not root: nothing tested");
        return Ok(());
    }
    expect_success("jailed")
}

fn root_without_an_identity_is_nobody() -> Verdict {
    if !is_root() {
        println!("not root: nothing tested");
        return Ok(());
    }
    expect_success("nobody")
}

fn user_0_is_refused() -> Verdict {
    if !is_root() {
        println!("not root: nothing tested");
        return Ok(());
    }
    expect_success("root")
}

fn an_unprivileged_process_is_jailed_too() -> Verdict {
    expect_success("unprivileged")
}

fn jail_and_filter_together() -> Verdict {
    expect_success("together")
}

fn forbidden_calls_end_the_process() -> Verdict {
    for name in [
        "open",
        "socket",
        "inet_pair",
        "exec",
        "executable",
        "thread_in_device",
        "memfd_in_vcpu",
        "kvm_in_console",
        "vm_in_vcpu",
        "process",
    ] {
        let status = inside(name)?.status;
        ensure(
            status.signal() == Some(libc::SIGSYS),
            &format!("{name} was not ended by SIGSYS: {status}"),
        )?;
    }
    Ok(())
}

fn allowed_calls_pass() -> Verdict {
    for name in [
        "openat",
        "openat_block",
        "fine_api",
        "fine_devices",
        "fine_vcpu",
        "fine_vsock",
    ] {
        expect_success(name)?;
    }
    // A panic's message and abort, or unwinding, must not end by SIGSYS.
    let output = inside("panic")?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure(
        output.status.signal() != Some(libc::SIGSYS) && words.contains("on purpose"),
        &format!("panic: {}: {words}", output.status),
    )
}

fn log_mode_lets_calls_through() -> Verdict {
    expect_success("log")
}

/// A descriptor above 2, as the control socket is.
fn api_fd() -> io::Result<std::fs::File> {
    std::fs::File::open("/dev/null")
}

fn enter_jail(identity: Option<(u32, u32)>) -> Result<std::fs::File, Box<dyn Error>> {
    // A descriptor that must not survive.
    let leaked = std::fs::File::open("/")?;
    std::mem::forget(leaked);
    let kept = api_fd()?;
    let config = jail::Config {
        api_fd: kept.as_raw_fd(),
        identity,
    };
    for warning in jail::enter(&config)? {
        eprintln!("warning: {warning}");
    }
    Ok(kept)
}

fn inside_jailed() -> Verdict {
    let kept = enter_jail(Some((UID, UID)))?;
    nothing_left(UID)?;
    ensure(
        rustix::io::fcntl_getfd(&kept).is_ok(),
        "the kept descriptor is closed",
    )?;
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    ensure(
        limit.maximum.is_some_and(|most| most <= 2048),
        "no limit of open files",
    )
}

fn inside_nobody() -> Verdict {
    enter_jail(None)?;
    nothing_left(jail::NOBODY)
}

fn inside_root() -> Verdict {
    let kept = api_fd()?;
    let config = jail::Config {
        api_fd: kept.as_raw_fd(),
        identity: Some((0, 0)),
    };
    match jail::enter(&config) {
        Err(error) => ensure(error.to_string().contains("is root"), &error.to_string()),
        Ok(_) => Err("user 0 was accepted".into()),
    }
}

fn inside_unprivileged() -> Verdict {
    if is_root() {
        let uid = rustix::thread::Uid::from_raw(UID);
        let gid = rustix::thread::Gid::from_raw(UID);
        rustix::thread::set_thread_groups(&[])?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
        // What execve(2) would have done: the files in /proc are its own again.
        rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::Dumpable)?;
    }
    let uid = rustix::process::geteuid().as_raw();
    enter_jail(None)?;
    nothing_left(uid)
}

fn inside_together() -> Verdict {
    let _kept = enter_jail(is_root().then_some((UID, UID)))?;
    seccomp::start(Mode::Enforce)?;
    thread()?;
    memfd()?;
    on_thread(ThreadKind::Balloon, memory)
}

/// The checks of a jailed process of user `uid`.
fn nothing_left(uid: u32) -> Verdict {
    // Landlock forbids to read even the empty directory.
    ensure(
        std::fs::read_dir("/").is_ok_and(|mut root| root.next().is_none())
            || std::fs::read_dir("/").is_err(),
        "/ has files",
    )?;
    for path in [
        "/proc",
        "/dev/kvm",
        "/etc/passwd",
        "/sys",
        "../etc",
        "../../proc",
    ] {
        ensure(
            std::fs::metadata(path).is_err(),
            &format!("{path} is in sight"),
        )?;
    }
    ensure(std::fs::File::create("/file").is_err(), "/ is writable")?;
    let me = rustix::process::geteuid().as_raw();
    ensure(
        me == uid && rustix::process::getuid().as_raw() == uid,
        &format!("user is {me}"),
    )?;
    ensure(rustix::process::getegid().as_raw() != 0, "group is root's")?;
    let root = rustix::thread::Uid::ROOT;
    ensure(
        rustix::thread::set_thread_res_uid(root, root, root).is_err(),
        "can become root",
    )?;
    let caps = rustix::thread::capabilities(None)?;
    ensure(
        caps.effective.is_empty() && caps.permitted.is_empty() && caps.inheritable.is_empty(),
        &format!("capabilities {caps:?}"),
    )?;
    ensure(
        !rustix::thread::capability_is_in_bounding_set(rustix::thread::CapabilitySet::SYS_ADMIN)?,
        "the bounding set is not empty",
    )?;
    ensure(
        rustix::thread::no_new_privs()?,
        "new privileges are possible",
    )?;
    // No interface but a loopback that is down: nothing can be reached or listened on.
    ensure(
        std::net::TcpStream::connect("127.0.0.1:22").is_err(),
        "the network is there",
    )?;
    ensure(
        std::net::UdpSocket::bind("0.0.0.0:0")
            .and_then(|socket| socket.send_to(b"x", "192.0.2.1:9"))
            .is_err(),
        "datagrams get out",
    )?;
    // SAFETY: asks whether the process could be signalled, and sends nothing. 1 is init, or in a
    // namespace of its own this process itself.
    let init = unsafe { libc::kill(1, 0) };
    ensure(
        init != 0 || std::process::id() == 1,
        "the host's processes can be signalled",
    )?;
    let dumpable = rustix::process::dumpable_behavior()?;
    ensure(
        dumpable == rustix::process::DumpableBehavior::NotDumpable,
        "the process can be dumped",
    )
}

fn on_thread(kind: ThreadKind, work: fn() -> Verdict) -> Verdict {
    let thread = std::thread::spawn(move || {
        seccomp::enter(kind).map_err(|error| error.to_string())?;
        work().map_err(|error| error.to_string())
    });
    match thread.join() {
        Ok(result) => result.map_err(Into::into),
        Err(_) => Err("the thread panicked".into()),
    }
}

fn filtered(kind: ThreadKind, work: fn() -> Verdict) -> Verdict {
    seccomp::start(Mode::Enforce)?;
    match kind {
        ThreadKind::Api => work(),
        kind => on_thread(kind, work),
    }
}

fn fine_devices() -> Verdict {
    seccomp::start(Mode::Enforce)?;
    for kind in ThreadKind::ALL {
        if kind != ThreadKind::Api {
            on_thread(kind, memory)?;
        }
    }
    Ok(())
}

fn inside_log() -> Verdict {
    seccomp::start(Mode::Log)?;
    old_open()
}

/// The C library makes this call by itself, so it has to fail softly.
fn openat_is_unknown() -> Verdict {
    match std::fs::File::open("/dev/null") {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        other => Err(format!("{other:?}").into()),
    }
}

fn old_open() -> Verdict {
    // SAFETY: the path is a C string that lives as long as the program.
    let fd = unsafe { libc::syscall(libc::SYS_open, c"/dev/null".as_ptr(), libc::O_RDONLY) };
    ensure(fd >= 0, "open")
}

fn inet_socket() -> Verdict {
    std::net::UdpSocket::bind("127.0.0.1:0")?;
    Ok(())
}

fn inet_pair() -> Verdict {
    let mut pair = [0; 2];
    // SAFETY: `pair` has room for the two descriptors.
    let result =
        unsafe { libc::socketpair(libc::AF_INET, libc::SOCK_STREAM, 0, pair.as_mut_ptr()) };
    ensure(result == 0, "socketpair")
}

fn unix_pair() -> Verdict {
    std::os::unix::net::UnixStream::pair()?;
    Ok(())
}

fn exec() -> Verdict {
    use std::os::unix::process::CommandExt;
    Err(Command::new("/bin/true").exec().into())
}

fn executable_memory() -> Verdict {
    let protection = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::EXEC;
    // SAFETY: a new anonymous mapping, which nothing uses.
    unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            4096,
            protection,
            rustix::mm::MapFlags::PRIVATE,
        )
    }?;
    Ok(())
}

fn thread() -> Verdict {
    std::thread::Builder::new()
        .name("another".into())
        .spawn(|| ())?
        .join()
        .map_err(|_| "the thread panicked".into())
}

fn memfd() -> Verdict {
    let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC)?;
    rustix::fs::ftruncate(&fd, 4096)?;
    Ok(())
}

/// Allocations of many sizes, a hash map's random keys, and the clock.
fn memory() -> Verdict {
    let mut kept = std::collections::HashMap::new();
    for power in 0..24 {
        kept.insert(power, vec![1_u8; 1 << power]);
    }
    std::thread::sleep(std::time::Duration::from_micros(50));
    ensure(
        kept.values().map(Vec::len).sum::<usize>() == (1 << 24) - 1,
        "memory",
    )
}

/// Only whether the filter lets the request through: the descriptor is none.
fn ioctl(request: libc::c_ulong) -> Verdict {
    // SAFETY: descriptor -1 makes every request fail before it touches memory.
    let result = unsafe { libc::ioctl(-1, request, 0) };
    ensure(result == -1, "ioctl of no descriptor")
}

#[expect(clippy::panic, reason = "it is what is tested")]
fn panics() -> Verdict {
    panic!("on purpose")
}

fn process() -> Verdict {
    // SAFETY: the filter ends the process; were it not to, the child exits at once.
    match unsafe { libc::syscall(libc::SYS_fork) } {
        0 => std::process::exit(0),
        _ => Ok(()),
    }
}
