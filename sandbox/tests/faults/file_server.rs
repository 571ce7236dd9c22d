//! A file server that serves nobody: it has the mount namespace and the lifeline of the real one.

use std::{
    fs,
    io::{Read, Write},
    os::{fd::FromRawFd, unix::net::UnixStream},
    time::Duration,
};

use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount},
    process::{chdir, pivot_root},
    thread::{UnshareFlags, unshare_unsafe},
};

/// Runs until the lifeline ends.
pub fn run(behaviour: &str) -> ! {
    let mut arguments = std::env::args().skip_while(|argument| argument != "--lifeline-fd");
    let number = arguments.nth(1).unwrap().parse().unwrap();
    // SAFETY: the parent passed this descriptor for us to own.
    let mut lifeline = unsafe { UnixStream::from_raw_fd(number) };
    match behaviour {
        "exits" => std::process::exit(3),
        "silent" => std::thread::sleep(Duration::from_secs(60)),
        _ => {}
    }
    enter_empty_root();
    lifeline.write_all(b"ready\n").unwrap();
    let _ = lifeline.read(&mut [0]);
    std::process::exit(0);
}

fn enter_empty_root() {
    // SAFETY: NEWNS leaves descriptors shared; this process has one thread.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .unwrap();
    mount("root", "/tmp", "tmpfs", MountFlags::empty(), None).unwrap();
    fs::create_dir("/tmp/old").unwrap();
    chdir("/tmp").unwrap();
    pivot_root(".", "old").unwrap();
    chdir("/").unwrap();
    unmount("/old", UnmountFlags::DETACH).unwrap();
    fs::remove_dir("/old").unwrap();
    mount_change("/", MountPropagationFlags::PRIVATE).unwrap();
}
