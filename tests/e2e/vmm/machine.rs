//! A `caisson-vmm` process and the plan of its microVM.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use caisson_tests::{Host, seconds, until};
use caisson_vmm_api::{
    BlockConfig, BlockContents, BootConfig, Call, Channel, Description, DeviceConfig, Event,
    ExitReason, Fd, MemoryConfig, Message, Request, Response, RestoreConfig, VcpuConfig,
};

/// How long a guest may take for a step, in bare-metal seconds.
const STEP: f64 = 20.0;

/// An EROFS image of static busybox whose `/init` is the script, as [`Plan::root`] wants it.
pub fn root_image(host: &Host, script: &str) -> PathBuf {
    let tree = tempfile::tempdir_in(host.scratch()).unwrap();
    for directory in ["bin", "dev", "proc", "sys"] {
        fs::create_dir(tree.path().join(directory)).unwrap();
    }
    let run = |words: &[&str]| {
        caisson_tests::Command::new(words).run().ok();
    };
    let bin = tree.path().join("bin");
    fs::copy("/bin/busybox", bin.join("busybox")).expect("/bin/busybox, from busybox-static");
    let applets = caisson_tests::Command::new(["busybox", "--list"])
        .run()
        .ok();
    for applet in applets.stdout().lines().filter(|name| *name != "busybox") {
        std::os::unix::fs::symlink("busybox", bin.join(applet)).unwrap();
    }
    let init = tree.path().join("init");
    fs::write(&init, format!("#!/bin/sh\nexport PATH=/bin\n{script}")).unwrap();
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    run(&["chmod", "755", &path(&init)]);
    let image = tree.path().with_extension("erofs");
    run(&["mkfs.erofs", "--quiet", &path(&image), &path(tree.path())]);
    // virtio-pmem maps in units of 2 MiB.
    let file = File::options().write(true).open(&image).unwrap();
    let length = file.metadata().unwrap().len();
    file.set_len(length.next_multiple_of(2 << 20)).unwrap();
    image
}

/// What a microVM has, and the descriptors of its back ends.
pub struct Plan {
    fds: Vec<OwnedFd>,
    cmdline: String,
    devices: Vec<DeviceConfig>,
    hotplug_mib: u32,
    kernel: Fd,
}

impl Plan {
    pub fn new(host: &Host) -> Self {
        let mut plan = Self {
            fds: Vec::new(),
            cmdline: "console=hvc0 quiet reboot=k panic=-1 noreplace-smp 8250.nr_uarts=0 \
                      rootfstype=erofs ro init=/init"
                .into(),
            devices: Vec::new(),
            hotplug_mib: 0,
            kernel: Fd(0),
        };
        // The first descriptor is /dev/kvm, whatever else there is.
        let kvm = plan.open_for_writing(Path::new("/dev/kvm"));
        assert_eq!(kvm, Fd(0));
        plan.kernel = plan.open(&host.prefix().join("share/caisson/vmlinux"));
        plan
    }

    fn add(&mut self, fd: impl Into<OwnedFd>) -> Fd {
        self.fds.push(fd.into());
        Fd(u32::try_from(self.fds.len()).unwrap() - 1)
    }

    pub fn open(&mut self, path: &Path) -> Fd {
        let file = File::open(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        self.add(file)
    }

    pub fn open_for_writing(&mut self, path: &Path) -> Fd {
        let file = File::options().read(true).write(true).open(path);
        self.add(file.unwrap_or_else(|error| panic!("{}: {error}", path.display())))
    }

    pub fn device(&mut self, device: DeviceConfig) {
        self.devices.push(device);
    }

    /// The root file system as the first disk.
    pub fn root(&mut self, image: &Path) {
        let file = self.open(image);
        self.cmdline.push_str(" root=/dev/vda");
        self.device(DeviceConfig::Block(BlockConfig {
            serial: "root".into(),
            contents: BlockContents::File(file),
            read_only: true,
            rate_limit: None,
        }));
    }

    /// The root file system in persistent memory.
    pub fn root_on_pmem(&mut self, image: &Path) {
        let file = self.open(image);
        self.cmdline.push_str(" root=/dev/pmem0");
        self.device(DeviceConfig::Pmem {
            file,
            read_only: true,
        });
    }

    pub fn vsock(&mut self, path: &Path) {
        let listener = self.add(UnixListener::bind(path).unwrap());
        self.device(DeviceConfig::Vsock {
            cid: 3,
            listener,
            acceptor: None,
        });
    }

    pub fn hotplug_mib(&mut self, mib: u32) {
        self.hotplug_mib = mib;
    }

    fn memory(&self) -> MemoryConfig {
        MemoryConfig {
            boot_mib: 128,
            hotplug_mib: self.hotplug_mib,
            shared: false,
        }
    }
}

/// Files of a saved microVM.
#[derive(Debug)]
pub struct Saved {
    pub state: PathBuf,
    pub memory: PathBuf,
}

/// A running VMM; killed when dropped.
pub struct Machine {
    child: Child,
    channel: Option<Channel>,
    output: Arc<Mutex<Vec<u8>>>,
    next_call: u64,
}

impl Machine {
    /// Boots the plan, and panics if the VMM refuses it.
    pub fn boot(host: &Host, mut plan: Plan) -> Self {
        let (mut machine, console) = Self::spawn(host, &mut plan);
        plan.device(console);
        let memory = plan.memory();
        let config = BootConfig {
            kvm: Fd(0),
            kernel: plan.kernel,
            cmdline: plan.cmdline.clone(),
            vcpus: VcpuConfig { boot: 1, max: 1 },
            memory,
            devices: plan.devices.clone(),
        };
        machine.call_with(Request::Boot(Box::new(config)), &plan.fds);
        machine
    }

    /// Restores a saved microVM of the same plan; it is paused.
    pub fn restore(host: &Host, plan: Plan, saved: &Saved) -> Self {
        let (machine, result) = Self::try_restore(host, plan, saved);
        if let Err(message) = result {
            panic!("restore: {message}");
        }
        machine
    }

    pub fn expect_no_restore(host: &Host, plan: Plan, saved: &Saved, word: &str) {
        let (_machine, result) = Self::try_restore(host, plan, saved);
        let message = result.expect_err("a broken snapshot must be refused");
        assert!(message.contains(word), "no {word:?} in: {message}");
    }

    fn try_restore(host: &Host, mut plan: Plan, saved: &Saved) -> (Self, Result<Response, String>) {
        let (mut machine, console) = Self::spawn(host, &mut plan);
        plan.device(console);
        let config = RestoreConfig {
            kvm: Fd(0),
            state: plan.open(&saved.state),
            memory: plan.open(&saved.memory),
            devices: plan.devices.clone(),
        };
        let result = machine.try_call(Request::Restore(Box::new(config)), &plan.fds);
        (machine, result)
    }

    fn spawn(host: &Host, plan: &mut Plan) -> (Self, DeviceConfig) {
        let (ours, theirs) = Channel::pair().unwrap();
        let theirs = OwnedFd::from(theirs);
        rustix::io::fcntl_setfd(&theirs, rustix::io::FdFlags::empty()).unwrap();
        let child = Command::new(host.prefix().join("libexec/caisson/caisson-vmm"))
            .args(["--api-fd", &theirs.as_raw_fd().to_string()])
            .stdin(Stdio::null())
            .spawn()
            .expect("start caisson-vmm");
        let limit = Some(seconds(STEP));
        rustix::net::sockopt::set_socket_timeout(
            ours.as_fd(),
            rustix::net::sockopt::Timeout::Recv,
            limit,
        )
        .unwrap();
        let (mut console, writer) = std::io::pipe().unwrap();
        let output = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&output);
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = console.read(&mut buffer) {
                sink.lock().unwrap().extend_from_slice(&buffer[..count]);
            }
        });
        let console = DeviceConfig::Console {
            output: Some(plan.add(writer)),
        };
        let machine = Self {
            child,
            channel: Some(ours),
            output,
            next_call: 1,
        };
        (machine, console)
    }

    fn channel(&self) -> &Channel {
        self.channel.as_ref().expect("the control socket is open")
    }

    fn try_call(&mut self, request: Request, fds: &[OwnedFd]) -> Result<Response, String> {
        let id = self.next_call;
        self.next_call += 1;
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        let name = format!("{request:?}");
        self.channel().send(&Call { id, request }, &fds).unwrap();
        match self.channel().receive::<Message>() {
            Ok((Message::Reply { id: of, result }, _)) if of == id => {
                result.map_err(|failure| failure.message)
            }
            Ok((Message::Reply { id, .. }, _)) => panic!("an answer to call {id}"),
            Ok((Message::Event(event), _)) => {
                panic!("{name}: {event:?}; console:\n{}", self.output())
            }
            Err(error) => panic!("{name}: {error}; console:\n{}", self.output()),
        }
    }

    pub fn call_with(&mut self, request: Request, fds: &[OwnedFd]) -> Response {
        let name = format!("{request:?}");
        self.try_call(request, fds)
            .unwrap_or_else(|message| panic!("{name}: {message}"))
    }

    pub fn call(&mut self, request: Request) {
        assert_eq!(self.call_with(request, &[]), Response::Done);
    }

    pub fn describe(&mut self) -> Description {
        match self.call_with(Request::Describe, &[]) {
            Response::Description(description) => *description,
            other => panic!("describe: {other:?}"),
        }
    }

    pub fn try_save(&mut self, directory: &Path) -> Result<Saved, String> {
        let saved = Saved {
            state: directory.join("state"),
            memory: directory.join("memory"),
        };
        let create = |path: &Path| OwnedFd::from(File::create(path).unwrap());
        let request = Request::Save {
            state: Fd(0),
            memory: Fd(1),
        };
        self.try_call(request, &[create(&saved.state), create(&saved.memory)])?;
        Ok(saved)
    }

    pub fn save(&mut self, directory: &Path) -> Saved {
        self.try_save(directory)
            .unwrap_or_else(|message| panic!("save: {message}"))
    }

    /// All that the guest's console has printed.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&self.output.lock().unwrap()).replace('\r', "")
    }

    pub fn wait_for(&mut self, text: &str) {
        self.wait_until(text, |output| output.contains(text));
    }

    pub fn wait_until(&mut self, what: &str, satisfied: impl Fn(&str) -> bool) {
        let found = until(seconds(STEP), || satisfied(&self.output()).then_some(()));
        assert!(
            found.is_some(),
            "no {what} on the console:\n{}",
            self.output()
        );
    }

    pub fn wait_until_described(&mut self, what: &str, satisfied: impl Fn(&Description) -> bool) {
        let found = until(seconds(STEP), || satisfied(&self.describe()).then_some(()));
        assert!(found.is_some(), "no {what}: {:?}", self.describe());
    }

    /// Waits for the last event.
    pub fn wait_for_exit(mut self) -> (ExitReason, String) {
        loop {
            match self.channel().receive::<Message>() {
                Ok((
                    Message::Event(Event::Exited {
                        reason,
                        console_tail,
                    }),
                    _,
                )) => {
                    self.wait_for_process();
                    return (reason, console_tail);
                }
                Ok(_) => {}
                Err(error) => panic!("no exit: {error}; console:\n{}", self.output()),
            }
        }
    }

    /// Stops it, and panics unless it ends as asked.
    pub fn stop(mut self) {
        self.call(Request::Stop);
        assert_eq!(self.wait_for_exit().0, ExitReason::Stopped);
    }

    /// Closes the control socket, as a parent that died, and waits for the VMM to end.
    pub fn abandon(mut self) {
        self.channel = None;
        self.wait_for_process();
    }

    fn wait_for_process(&mut self) {
        let ended = until(seconds(STEP), || self.child.try_wait().unwrap());
        assert!(ended.is_some(), "caisson-vmm does not end");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
