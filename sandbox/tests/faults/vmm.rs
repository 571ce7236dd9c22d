//! A VMM without a virtual machine.

use std::{
    fs::OpenOptions,
    io::Write,
    os::{
        fd::{FromRawFd, OwnedFd},
        unix::net::UnixListener,
    },
    path::{Path, PathBuf},
    time::Duration,
};

use caisson_vmm_api::{
    Call, Channel, Description, DeviceConfig, Event, ExitReason, Failure, FailureKind,
    MemoryConfig, Message, Request, Response, RunState, VcpuConfig,
};

use crate::agent;

/// Adds a line to the file that [`crate::host::Host::requests`] reads.
pub fn note(directory: &Path, line: &str) {
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(directory.join("requests"))
        .unwrap();
    file.write_all(format!("{line}\n").as_bytes()).unwrap();
}

struct Vmm {
    behaviour: String,
    directory: PathBuf,
    vcpus: VcpuConfig,
    memory: MemoryConfig,
    plugged: u32,
    next_slot: u32,
}

/// Serves one parent, then exits.
pub fn run(behaviour: &str, directory: &Path) -> ! {
    let mut arguments = std::env::args().skip_while(|argument| argument != "--api-fd");
    let number = arguments.nth(1).unwrap().parse().unwrap();
    // SAFETY: the parent passed this descriptor for us to own.
    let channel = Channel::from(unsafe { OwnedFd::from_raw_fd(number) });
    if behaviour == "exits" {
        eprintln!("no such luck");
        std::process::exit(7);
    }
    let mut vmm = Vmm {
        behaviour: behaviour.to_owned(),
        directory: directory.to_owned(),
        vcpus: VcpuConfig { boot: 1, max: 1 },
        memory: MemoryConfig {
            boot_mib: 0,
            hotplug_mib: 0,
            shared: true,
        },
        plugged: 0,
        next_slot: 5,
    };
    while let Ok((call, fds)) = channel.receive::<Call>() {
        let stop = call.request == Request::Stop;
        let Some(result) = vmm.answer(&channel, call.request, fds) else {
            continue;
        };
        let id = call.id;
        let _ = channel.send(&Message::Reply { id, result }, &[]);
        if stop {
            break;
        }
    }
    let event = Event::Exited {
        reason: ExitReason::Stopped,
        console_tail: String::new(),
    };
    let _ = channel.send(&Message::Event(event), &[]);
    std::process::exit(0);
}

impl Vmm {
    fn answer(
        &mut self,
        channel: &Channel,
        request: Request,
        mut fds: Vec<OwnedFd>,
    ) -> Option<Result<Response, Failure>> {
        Some(Ok(match request {
            Request::Boot(config) => {
                match self.behaviour.as_str() {
                    "silent" => return None,
                    "dies-at-boot" => std::process::exit(9),
                    "killed-at-boot" => std::process::abort(),
                    "garbage" => {
                        channel.send(&"42", &[]).unwrap();
                        std::thread::sleep(Duration::from_secs(60));
                    }
                    "refuses" => {
                        return Some(Err(Failure {
                            kind: FailureKind::InvalidArgument,
                            message: "not with me".to_owned(),
                        }));
                    }
                    _ => {}
                }
                note(
                    &self.directory,
                    &format!(
                        "boot {} of {} vCPUs, {} and {} MiB",
                        config.vcpus.boot,
                        config.vcpus.max,
                        config.memory.boot_mib,
                        config.memory.hotplug_mib
                    ),
                );
                (self.vcpus, self.memory) = (config.vcpus, config.memory);
                let listener = UnixListener::from(fds.swap_remove(3));
                let (behaviour, directory) = (self.behaviour.clone(), self.directory.clone());
                let boot_cpus = u32::from(config.vcpus.boot);
                std::thread::spawn(move || agent::run(&behaviour, directory, listener, boot_cpus));
                Response::Started {
                    slots: (0..u32::try_from(config.devices.len()).unwrap()).collect(),
                }
            }
            Request::Attach(device) => {
                let kind = match device {
                    DeviceConfig::Block(config) => format!("block {}", config.serial),
                    DeviceConfig::Fs { tag, .. } => format!("fs {tag}"),
                    other => format!("{other:?}"),
                };
                note(&self.directory, &format!("attach {kind}"));
                self.next_slot += 1;
                Response::Attached {
                    slot: self.next_slot,
                }
            }
            Request::Detach { slot } => {
                note(&self.directory, &format!("detach {slot}"));
                Response::Done
            }
            Request::SetHotplugMemory { mib } => {
                note(&self.directory, &format!("hotplug {mib} MiB"));
                if self.behaviour != "never-plugs" {
                    self.plugged = mib;
                }
                Response::Done
            }
            Request::Describe => Response::Description(Box::new(self.describe())),
            _ => Response::Done,
        }))
    }

    fn describe(&self) -> Description {
        Description {
            version: String::new(),
            state: RunState::Running,
            vcpus: self.vcpus,
            memory: self.memory,
            slots: Vec::new(),
            slot_count: 0,
            balloon_mib: 0,
            hotplugged_mib: self.plugged,
            vm_exits: 0,
            stages: Vec::new(),
        }
    }
}
