//! The last steps before a program runs: who it is, what it may, where it stands.

use std::{
    convert::Infallible,
    ffi::{CString, OsStr},
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::Path,
};

use oci_spec::runtime::{Hook, LinuxSeccomp, PosixRlimitType, Process};
use rustix::{
    fs::{Access, Mode, OFlags},
    io::Errno,
    process::{Gid, Resource, Rlimit, Uid},
};

use super::{hooks, paths, terminal};
use crate::{
    failure::{During, Failure, Kind, Result},
    oci::{capabilities::Sets, seccomp, user},
};

/// What to execute.
pub struct Program {
    /// As in the specification.
    pub process: Process,
    /// Overrides `process.user`.
    pub user: Option<String>,
    /// The filter it runs under.
    pub seccomp: Option<LinuxSeccomp>,
    /// Slave of its terminal.
    pub terminal: Option<OwnedFd>,
    /// Hooks that run first.
    pub start_hooks: Vec<Hook>,
    /// For them.
    pub about: hooks::About,
}

/// Most of /etc/passwd and /etc/group that is read.
const MAX_ACCOUNTS: u64 = 4 << 20;

/// Becomes the program.
///
/// # Errors
/// Whatever keeps it from running; on success it does not return.
pub fn run(program: Program) -> Result<()> {
    hooks::run(
        &program.start_hooks,
        hooks::Stage::StartContainer,
        &program.about,
    )?;
    let process = &program.process;
    refuse_unsupported(process)?;
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .during(|| "open the root".to_owned())?;
    let accounts = |name: &str| {
        paths::read_text(
            std::os::fd::AsFd::as_fd(&root),
            Path::new(name),
            MAX_ACCOUNTS,
        )
    };
    let passwd = accounts("/etc/passwd");
    let who = identity(&program, &passwd, || accounts("/etc/group"))?;
    let environment = environment(process, who.uid, &passwd);

    rustix::process::setsid().during(|| "start a session".to_owned())?;
    if let Some(slave) = &program.terminal {
        rustix::fs::fchown(slave, Some(Uid::from_raw(who.uid)), None)
            .during(|| "hand over the terminal".to_owned())?;
        terminal::adopt(slave)?;
    }
    drop(program.terminal);
    set_limits(process)?;
    let filter = program
        .seccomp
        .as_ref()
        .map(|profile| Ok::<_, Failure>((seccomp::compile(profile)?, seccomp::flags(profile)?)))
        .transpose()?;
    let no_new_privileges = process.no_new_privileges().unwrap_or(false);
    if no_new_privileges {
        rustix::thread::set_no_new_privs(true).during(|| "set no_new_privs".to_owned())?;
    }
    enter_directory(process.cwd())?;
    let sets = process.capabilities().as_ref().map(Sets::from);
    if let Some(sets) = &sets {
        sets.bound()?;
    }
    // Without no_new_privs a filter needs CAP_SYS_ADMIN, which is about to go.
    if let (Some((code, flags)), false) = (&filter, no_new_privileges) {
        seccomp::install(code, *flags).during(|| "install the seccomp filter".to_owned())?;
    }
    become_user(&who)?;
    if let Some(sets) = &sets {
        sets.apply()?;
    }
    if let Some(mask) = process.user().umask() {
        rustix::process::umask(Mode::from_raw_mode(mask & 0o777));
    } else {
        rustix::process::umask(Mode::from_raw_mode(0o022));
    }
    let path = find(process, &environment)?;
    if let (Some((code, flags)), true) = (&filter, no_new_privileges) {
        seccomp::install(code, *flags).during(|| "install the seccomp filter".to_owned())?;
    }
    match execute(&path, process, environment)? {}
}

/// Whether the program is there, as far as can be told before it is started: callers of a runtime
/// expect a missing one to fail the container's creation.
///
/// # Errors
/// It is not, or nobody may execute it.
pub fn check(process: &Process) -> Result<()> {
    let environment = process.env().clone().unwrap_or_default();
    let name = process
        .args()
        .as_ref()
        .and_then(|args| args.first())
        .map_or("", String::as_str);
    let by_directory = if name.contains('/') {
        !name.starts_with('/')
    } else {
        // The default has absolute ones only.
        environment
            .iter()
            .filter_map(|variable| variable.strip_prefix("PATH="))
            .any(|path| path.split(':').any(|directory| !directory.starts_with('/')))
    };
    // The working directory is entered with the user's rights, later.
    if by_directory {
        return Ok(());
    }
    find(process, &environment).map(drop)
}

/// What OCI knows and Caisson does not do is refused, never ignored.
fn refuse_unsupported(process: &Process) -> Result<()> {
    let refused = [
        (process.scheduler().is_some(), "process.scheduler"),
        (process.io_priority().is_some(), "process.ioPriority"),
        (
            process.exec_cpu_affinity().is_some(),
            "process.execCPUAffinity",
        ),
        (
            process
                .apparmor_profile()
                .as_ref()
                .is_some_and(|p| !p.is_empty() && p != "unconfined"),
            "process.apparmorProfile",
        ),
        (
            process
                .selinux_label()
                .as_ref()
                .is_some_and(|l| !l.is_empty()),
            "process.selinuxLabel",
        ),
    ];
    match refused.into_iter().find(|(there, _)| *there) {
        Some((_, name)) => Err(Failure::new(
            Kind::Unimplemented,
            format!("{name} is not supported inside a guest"),
        )),
        None => Ok(()),
    }
}

fn identity(
    program: &Program,
    passwd: &str,
    group: impl FnOnce() -> String,
) -> Result<user::Resolved> {
    let given = program.process.user();
    let mut who = match &program.user {
        Some(text) => user::resolve(text, passwd, &group())?,
        None => user::Resolved {
            uid: given.uid(),
            gid: given.gid(),
            groups: Vec::new(),
        },
    };
    for gid in given.additional_gids().iter().flatten() {
        if !who.groups.contains(gid) {
            who.groups.push(*gid);
        }
    }
    Ok(who)
}

fn environment(process: &Process, uid: u32, passwd: &str) -> Vec<String> {
    let mut environment = process.env().clone().unwrap_or_default();
    if !environment
        .iter()
        .any(|variable| variable.starts_with("HOME="))
    {
        let home = user::home(uid, passwd).unwrap_or_else(|| "/".to_owned());
        environment.push(format!("HOME={home}"));
    }
    environment
}

fn set_limits(process: &Process) -> Result<()> {
    for limit in process.rlimits().iter().flatten() {
        let resource = match limit.typ() {
            PosixRlimitType::RlimitCpu => Resource::Cpu,
            PosixRlimitType::RlimitFsize => Resource::Fsize,
            PosixRlimitType::RlimitData => Resource::Data,
            PosixRlimitType::RlimitStack => Resource::Stack,
            PosixRlimitType::RlimitCore => Resource::Core,
            PosixRlimitType::RlimitRss => Resource::Rss,
            PosixRlimitType::RlimitNproc => Resource::Nproc,
            PosixRlimitType::RlimitNofile => Resource::Nofile,
            PosixRlimitType::RlimitMemlock => Resource::Memlock,
            PosixRlimitType::RlimitAs => Resource::As,
            PosixRlimitType::RlimitLocks => Resource::Locks,
            PosixRlimitType::RlimitSigpending => Resource::Sigpending,
            PosixRlimitType::RlimitMsgqueue => Resource::Msgqueue,
            PosixRlimitType::RlimitNice => Resource::Nice,
            PosixRlimitType::RlimitRtprio => Resource::Rtprio,
            PosixRlimitType::RlimitRttime => Resource::Rttime,
        };
        let bound = |value: u64| Some(value).filter(|value| *value != u64::MAX);
        let value = Rlimit {
            current: bound(limit.soft()),
            maximum: bound(limit.hard()),
        };
        rustix::process::setrlimit(resource, value).during(|| {
            format!(
                "set the limit {:?} to {}:{}",
                limit.typ(),
                limit.soft(),
                limit.hard()
            )
        })?;
    }
    Ok(())
}

/// Missing directories are made, as docker does for WORKDIR.
fn enter_directory(directory: &Path) -> Result<()> {
    if !directory.is_absolute() {
        return Err(Failure::invalid(format!(
            "the working directory \"{}\" is not absolute",
            directory.display()
        )));
    }
    match rustix::process::chdir(directory) {
        Err(Errno::NOENT) => std::fs::create_dir_all(directory)
            .during(|| format!("create the working directory {}", directory.display()))
            .and_then(|()| {
                rustix::process::chdir(directory)
                    .during(|| format!("enter the working directory {}", directory.display()))
            }),
        result => result.during(|| format!("enter the working directory {}", directory.display())),
    }
}

fn become_user(who: &user::Resolved) -> Result<()> {
    let groups: Vec<Gid> = who.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    let (uid, gid) = (Uid::from_raw(who.uid), Gid::from_raw(who.gid));
    rustix::thread::set_keep_capabilities(true)
        .and_then(|()| rustix::thread::set_thread_groups(&groups))
        // The process has one thread, so these are the process's.
        .and_then(|()| rustix::thread::set_thread_res_gid(gid, gid, gid))
        .and_then(|()| rustix::thread::set_thread_res_uid(uid, uid, uid))
        .and_then(|()| rustix::thread::set_keep_capabilities(false))
        .during(|| format!("become user {}:{}", who.uid, who.gid))
}

/// Path of the program by execvp(3)'s rules, with runc's words for what is wrong.
fn find(process: &Process, environment: &[String]) -> Result<CString> {
    let name = process
        .args()
        .as_ref()
        .and_then(|arguments| arguments.first())
        .filter(|name| !name.is_empty())
        .ok_or_else(|| Failure::invalid("no command specified"))?;
    let denied = || {
        Failure::new(
            Kind::PermissionDenied,
            format!("exec: \"{name}\": permission denied"),
        )
    };
    let usable = |path: &Path| -> Result<Option<CString>> {
        let directory = match rustix::fs::stat(path) {
            Ok(stat) => {
                rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Directory
            }
            Err(Errno::ACCESS) => return Err(denied()),
            Err(_) => return Ok(None),
        };
        if directory || rustix::fs::access(path, Access::EXEC_OK).is_err() {
            return Err(denied());
        }
        Ok(CString::new(path.as_os_str().as_bytes()).ok())
    };
    if name.contains('/') {
        return usable(Path::new(name))?.ok_or_else(|| {
            Failure::new(
                Kind::NotFound,
                format!("exec: \"{name}\": stat {name}: no such file or directory"),
            )
        });
    }
    let path = environment
        .iter()
        .find_map(|variable| variable.strip_prefix("PATH="))
        .unwrap_or("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    let mut refused = None;
    for directory in path.split(':') {
        let directory = if directory.is_empty() { "." } else { directory };
        match usable(&Path::new(directory).join(OsStr::new(name))) {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => {}
            Err(failure) => refused = Some(failure),
        }
    }
    Err(refused.unwrap_or_else(|| {
        Failure::new(
            Kind::NotFound,
            format!("exec: \"{name}\": executable file not found in $PATH"),
        )
    }))
}

fn execute(path: &CString, process: &Process, environment: Vec<String>) -> Result<Infallible> {
    let strings = |list: Vec<String>| -> Result<Vec<CString>> {
        list.into_iter()
            .map(|text| {
                CString::new(text)
                    .map_err(|_| Failure::invalid("an argument or variable has a NUL byte"))
            })
            .collect()
    };
    let arguments = strings(process.args().clone().unwrap_or_default())?;
    let environment = strings(environment)?;
    let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
        list.iter()
            .map(|text| text.as_ptr())
            .chain([std::ptr::null()])
            .collect()
    };
    let (argv, envp) = (pointers(&arguments), pointers(&environment));
    // The agent ignores SIGPIPE (as Rust programs do) and ignored signals survive execve.
    // SAFETY: SIG_DFL is a valid disposition of every signal.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    // SAFETY: both arrays end in a null pointer and their strings live until the call fails.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    let error = std::io::Error::last_os_error();
    let name = path.to_string_lossy();
    let kind = match error.raw_os_error() {
        Some(libc::ENOENT) => Kind::NotFound,
        Some(libc::EACCES | libc::ENOEXEC | libc::EPERM | libc::ELIBBAD) => Kind::PermissionDenied,
        _ => Kind::Internal,
    };
    let text = match error.raw_os_error() {
        // The file is there, so what is missing is its interpreter.
        Some(libc::ENOENT) => "no such file or directory".to_owned(),
        Some(libc::ENOEXEC) => "exec format error".to_owned(),
        _ => error.to_string(),
    };
    Err(Failure::new(kind, format!("exec {name}: {text}")))
}
