//! Guests of a few instructions on the real `/dev/kvm`, driven through the control API.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "the whole file is a test program"
)]

use std::{
    fs::{File, OpenOptions},
    io::Write,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    thread::JoinHandle,
    time::Duration,
};

use caisson_vmm::{
    api::{Server, exit_status},
    machine::Stages,
};
use caisson_vmm_api::{
    BootConfig, Call, Channel, Description, DeviceConfig, Event, ExitReason, Failure, FailureKind,
    Fd, MemoryConfig, Message, Request, Response, RestoreConfig, RunState, VcpuConfig,
};

/// Where the guests' code lies and starts.
const ENTRY: u64 = 0x100_0000;
/// `mov al, 0xfe; out 0x64, al; hlt`
const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xf4];
/// `jmp $`
const SPIN: &[u8] = &[0xeb, 0xfe];
/// `ud2`: without an interrupt table the third fault ends the processor.
const FAULT: &[u8] = &[0x0f, 0x0b];

/// The host's KVM; without one the test says so and passes.
fn kvm() -> Option<OwnedFd> {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(file) => Some(file.into()),
        Err(error) => {
            eprintln!("skipped: /dev/kvm: {error}");
            None
        }
    }
}

/// An ELF image with one segment of `code` at [`ENTRY`].
fn kernel(code: &[u8]) -> OwnedFd {
    let mut image = vec![0u8; 64 + 56];
    image[..8].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1, 0]);
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(16, &2u16.to_le_bytes());
    put(18, &62u16.to_le_bytes());
    put(20, &1u32.to_le_bytes());
    put(24, &ENTRY.to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &64u16.to_le_bytes());
    put(54, &56u16.to_le_bytes());
    put(56, &1u16.to_le_bytes());
    put(64, &1u32.to_le_bytes());
    put(68, &5u32.to_le_bytes());
    put(72, &4096u64.to_le_bytes());
    put(80, &ENTRY.to_le_bytes());
    put(88, &ENTRY.to_le_bytes());
    put(96, &(code.len() as u64).to_le_bytes());
    put(104, &(code.len() as u64).to_le_bytes());
    put(112, &4096u64.to_le_bytes());
    image.resize(4096, 0);
    image.extend_from_slice(code);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&image).unwrap();
    file.into()
}

/// Prints `text` on the serial port, then resets.
fn printer(text: &str) -> Vec<u8> {
    // mov dx, 0x3f8
    let mut code = vec![0x66, 0xba, 0xf8, 0x03];
    for byte in text.bytes() {
        // mov al, byte; out dx, al
        code.extend_from_slice(&[0xb0, byte, 0xee]);
    }
    code.extend_from_slice(RESET);
    code
}

fn boot_config(devices: Vec<DeviceConfig>) -> BootConfig {
    BootConfig {
        kvm: Fd(0),
        kernel: Fd(1),
        cmdline: "quiet".into(),
        vcpus: VcpuConfig { boot: 1, max: 1 },
        memory: MemoryConfig {
            boot_mib: 64,
            hotplug_mib: 0,
            shared: false,
        },
        devices,
    }
}

struct Parent {
    channel: Channel,
    server: JoinHandle<ExitReason>,
    calls: u64,
}

impl Parent {
    fn new() -> Self {
        let (channel, theirs) = Channel::pair().unwrap();
        rustix::net::sockopt::set_socket_timeout(
            channel.as_fd(),
            rustix::net::sockopt::Timeout::Recv,
            Some(Duration::from_secs(60)),
        )
        .unwrap();
        let server = Server::new(theirs, Stages::start()).unwrap();
        Self {
            channel,
            server: std::thread::spawn(move || server.serve()),
            calls: 0,
        }
    }

    fn call(&mut self, request: Request, fds: &[OwnedFd]) -> Result<Response, Failure> {
        self.calls += 1;
        let call = Call {
            id: self.calls,
            request,
        };
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        self.channel.send(&call, &borrowed).unwrap();
        match self.channel.receive::<Message>().unwrap().0 {
            Message::Reply { id, result } if id == self.calls => result,
            other => panic!("unexpected packet {other:?}"),
        }
    }

    fn boot(&mut self, kvm: OwnedFd, code: &[u8], devices: Vec<DeviceConfig>) -> Vec<u32> {
        let request = Request::Boot(Box::new(boot_config(devices)));
        match self.call(request, &[kvm, kernel(code)]).unwrap() {
            Response::Started { slots } => slots,
            other => panic!("unexpected answer {other:?}"),
        }
    }

    fn describe(&mut self) -> Description {
        match self.call(Request::Describe, &[]).unwrap() {
            Response::Description(description) => *description,
            other => panic!("unexpected answer {other:?}"),
        }
    }

    /// Waits for the end; the exit reason, the console's tail, and the exit status.
    fn end(self) -> (ExitReason, String, i32) {
        let (message, _) = self.channel.receive::<Message>().unwrap();
        let Message::Event(Event::Exited {
            reason,
            console_tail,
        }) = message
        else {
            panic!("unexpected packet {message:?}");
        };
        let served = self.server.join().unwrap();
        assert_eq!(served, reason);
        let status = exit_status(&served);
        (reason, console_tail, status)
    }
}

#[test]
fn a_reset_ends_the_guest() {
    let Some(kvm) = kvm() else { return };
    let mut parent = Parent::new();
    parent.boot(kvm, &printer("last words"), Vec::new());
    let end = parent.end();
    assert_eq!(end, (ExitReason::GuestShutdown, "last words".into(), 0));
}

#[test]
fn a_panic_is_told_from_a_reset() {
    let Some(kvm) = kvm() else { return };
    let mut parent = Parent::new();
    let code = printer("Kernel panic - not syncing: test");
    parent.boot(kvm, &code, Vec::new());
    let (reason, _, status) = parent.end();
    assert_eq!((reason, status), (ExitReason::GuestPanic, 10));
}

#[test]
fn a_triple_fault_is_reported() {
    let Some(kvm) = kvm() else { return };
    let mut parent = Parent::new();
    parent.boot(kvm, FAULT, Vec::new());
    let (reason, _, status) = parent.end();
    assert_eq!((reason, status), (ExitReason::TripleFault, 11));
}

#[test]
fn a_spinning_guest_can_be_paused_resumed_and_stopped() {
    let Some(kvm) = kvm() else { return };
    let mut parent = Parent::new();
    parent.boot(kvm, SPIN, vec![DeviceConfig::Rng]);
    for _ in 0..3 {
        assert_eq!(parent.describe().state, RunState::Running);
        parent.call(Request::Pause, &[]).unwrap();
        parent.call(Request::Pause, &[]).unwrap();
        assert_eq!(parent.describe().state, RunState::Paused);
        parent.call(Request::Resume, &[]).unwrap();
    }
    let description = parent.describe();
    assert_eq!(description.slot_count, 32);
    assert!(description.stages.is_sorted_by_key(|(_, at)| *at));
    parent.call(Request::Stop, &[]).unwrap();
    let (reason, _, status) = parent.end();
    assert_eq!((reason, status), (ExitReason::Stopped, 0));
}

#[test]
fn the_guest_ends_with_its_parent() {
    let Some(kvm) = kvm() else { return };
    let mut parent = Parent::new();
    parent.boot(kvm, SPIN, Vec::new());
    drop(parent.channel);
    assert_eq!(parent.server.join().unwrap(), ExitReason::Stopped);
}

#[test]
fn devices_come_and_go_late() {
    let Some(kvm) = kvm() else { return };
    let mut parent = Parent::new();
    let slots = parent.boot(kvm, SPIN, vec![DeviceConfig::Rng]);
    assert_eq!(slots, [0]);
    for expected in 1..32 {
        let attached = parent.call(Request::Attach(DeviceConfig::Rng), &[]);
        assert_eq!(attached, Ok(Response::Attached { slot: expected }));
    }
    let full = parent.call(Request::Attach(DeviceConfig::Rng), &[]);
    assert_eq!(full.unwrap_err().kind, FailureKind::Exhausted);
    parent.call(Request::Detach { slot: 7 }, &[]).unwrap();
    let again = parent.call(Request::Detach { slot: 7 }, &[]);
    assert_eq!(again.unwrap_err().kind, FailureKind::InvalidArgument);
    let beyond = parent.call(Request::Detach { slot: 99 }, &[]);
    assert_eq!(beyond.unwrap_err().kind, FailureKind::InvalidArgument);
    let console = DeviceConfig::Console { output: None };
    let attached = parent.call(Request::Attach(console), &[]);
    assert_eq!(attached, Ok(Response::Attached { slot: 7 }));
    let names = parent.describe().slots;
    assert_eq!(names.len(), 32);
    assert_eq!(names[7].device, "console");
}

#[test]
fn a_device_that_its_guest_breaks_for_ever_is_told_of_a_few_times() {
    let Some(kvm) = kvm() else { return };
    let mut parent = Parent::new();
    // mov ebx, 0xd0000000 (slot 0)
    let mut code = vec![0xbb, 0x00, 0x00, 0x00, 0xd0];
    // Status: reset; driver features: VERSION_1; status: DRIVER_OK, without a queue.
    for (register, value) in [(0x70, 0), (0x24, 1), (0x20, 1), (0x70, 0xf)] {
        // mov dword [rbx+register], value
        code.extend_from_slice(&[0xc7, 0x43, register, value, 0, 0, 0]);
    }
    // jmp to the first of them
    code.extend_from_slice(&[0xeb, 0xe2]);
    parent.boot(kvm, &code, vec![DeviceConfig::Rng]);
    let messages: Vec<String> = (0..9)
        .map(|_| match parent.channel.receive::<Message>().unwrap().0 {
            Message::Event(Event::DeviceFailed { slot: 0, message }) => message,
            other => panic!("unexpected packet {other:?}"),
        })
        .collect();
    assert!(messages[0].ends_with("queue 0 is not enabled"));
    assert!(messages[8].ends_with("no more is told of this slot"));
    // From here on there are answers only, and the broken device is in none of their ways.
    for expected in 1..32 {
        let attached = parent.call(Request::Attach(DeviceConfig::Rng), &[]);
        assert_eq!(attached, Ok(Response::Attached { slot: expected }));
        let slots = parent.describe().slots;
        assert_eq!(slots.len(), expected as usize + 1);
        assert_eq!((slots[0].slot, slots[0].device.as_str()), (0, "rng"));
    }
    parent.call(Request::Stop, &[]).unwrap();
    assert_eq!(parent.end().0, ExitReason::Stopped);
}

#[test]
fn a_saved_guest_goes_on_in_another_machine() {
    let Some(first_kvm) = kvm() else { return };
    let second_kvm = kvm().unwrap();
    let mut parent = Parent::new();
    // Counts in memory until told otherwise at 0x1100000, then prints and resets:
    // mov rbx, 0x1100000; again: inc qword [rbx+8]; cmp byte [rbx], 0; je again
    let mut code = vec![0x48, 0xc7, 0xc3, 0x00, 0x00, 0x10, 0x01];
    code.extend_from_slice(&[0x48, 0xff, 0x43, 0x08, 0x80, 0x3b, 0x00, 0x74, 0xf7]);
    code.extend_from_slice(&printer("gone on"));
    parent.boot(first_kvm, &code, vec![DeviceConfig::Rng]);
    let files = || -> [OwnedFd; 2] {
        [
            tempfile::tempfile().unwrap().into(),
            tempfile::tempfile().unwrap().into(),
        ]
    };
    let [state, memory] = files();
    let save = Request::Save {
        state: Fd(0),
        memory: Fd(1),
    };
    let clone = |fd: &OwnedFd| fd.try_clone().unwrap();
    let running = parent.call(save.clone(), &[clone(&state), clone(&memory)]);
    assert_eq!(running.unwrap_err().kind, FailureKind::WrongState);
    parent.call(Request::Pause, &[]).unwrap();
    parent.call(save, &[clone(&state), clone(&memory)]).unwrap();
    parent.call(Request::Stop, &[]).unwrap();

    // What the guest waits for arrives in the saved memory.
    let file = File::from(clone(&memory));
    std::os::unix::fs::FileExt::write_all_at(&file, &[1], 0x110_0000).unwrap();
    let mut restored = Parent::new();
    let config = RestoreConfig {
        kvm: Fd(0),
        state: Fd(1),
        memory: Fd(2),
        devices: vec![DeviceConfig::Rng],
    };
    let fds = [second_kvm, state, memory];
    let started = restored.call(Request::Restore(Box::new(config)), &fds);
    assert_eq!(started, Ok(Response::Started { slots: vec![0] }));
    assert_eq!(restored.describe().state, RunState::Paused);
    restored.call(Request::Resume, &[]).unwrap();
    let (reason, tail, _) = restored.end();
    assert_eq!(
        (reason, tail.as_str()),
        (ExitReason::GuestShutdown, "gone on")
    );
}

#[test]
fn requests_that_make_no_sense_are_refused() {
    let Some(kvm) = kvm() else { return };
    let mut parent = Parent::new();
    let early = parent.call(Request::Pause, &[]);
    assert_eq!(early.unwrap_err().kind, FailureKind::WrongState);
    let clone = || kvm.try_clone().unwrap();
    let mut boot = |change: &dyn Fn(&mut BootConfig), fds: &[OwnedFd]| {
        let mut config = boot_config(Vec::new());
        change(&mut config);
        let failure = parent
            .call(Request::Boot(Box::new(config)), fds)
            .unwrap_err();
        (failure.kind, failure.message)
    };
    let fds = [clone(), kernel(RESET)];
    for (boots, max) in [(0, 1), (2, 1), (1, 65)] {
        let vcpus = VcpuConfig { boot: boots, max };
        let (kind, _) = boot(&|config| config.vcpus = vcpus, &fds);
        assert_eq!(kind, FailureKind::InvalidArgument);
    }
    let (kind, message) = boot(&|config| config.memory.boot_mib = 1, &fds);
    assert_eq!(kind, FailureKind::InvalidArgument);
    assert!(message.contains("boot memory of 1 MiB"), "{message}");
    let (kind, message) = boot(&|config| config.cmdline = "x".repeat(1500), &fds);
    assert_eq!(kind, FailureKind::InvalidArgument);
    assert!(message.contains("command line"), "{message}");
    let (kind, message) = boot(&|_| {}, &[clone()]);
    assert_eq!(kind, FailureKind::InvalidArgument);
    assert!(message.contains("kernel: descriptor 1 of 1"), "{message}");
    let null = File::open("/dev/null").unwrap().into();
    let (kind, message) = boot(&|_| {}, &[null, kernel(RESET)]);
    assert_eq!(kind, FailureKind::InvalidArgument);
    assert!(message.contains("/dev/kvm"), "{message}");
    let (kind, message) = boot(&|_| {}, &[clone(), tempfile::tempfile().unwrap().into()]);
    assert_eq!(kind, FailureKind::BadKernel);
    assert!(message.contains("vmlinux"), "{message}");
    // None of this has made a microVM.
    let mut parent = parent;
    parent.boot(clone(), RESET, Vec::new());
    assert_eq!(parent.end().0, ExitReason::GuestShutdown);
}
