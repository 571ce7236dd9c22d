//! Messages of the control API.

use serde::{Deserialize, Serialize};

/// Index of a descriptor among those that came with the packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fd(pub u32);

/// A request with the id its reply will bear.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Call {
    /// Chosen by the caller.
    pub id: u64,
    /// What to do.
    pub request: Request,
}

/// What the VMM sends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    /// Answer to the call with this id.
    Reply {
        /// As in [`Call::id`].
        id: u64,
        /// What came of it.
        result: Result<Response, Failure>,
    },
    /// Something that happened by itself.
    Event(Event),
}

/// What the parent may ask.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Builds the microVM and starts it from its kernel. Answer: [`Response::Started`].
    Boot(Box<BootConfig>),
    /// Builds the microVM from a saved one; it stays paused. Answer: [`Response::Started`].
    Restore(Box<RestoreConfig>),
    /// Answer: [`Response::Description`].
    Describe,
    /// Fills a free slot. Answer: [`Response::Attached`].
    Attach(DeviceConfig),
    /// Empties a slot whose driver is unbound. Answer: [`Response::Done`].
    Detach {
        /// The slot to empty.
        slot: u32,
    },
    /// Stops vCPUs and device workers at a point where state is whole.
    Pause,
    /// Goes on after [`Request::Pause`] or [`Request::Restore`].
    Resume,
    /// Writes the paused microVM's state and memory.
    Save {
        /// Regular file, truncated and written: versioned state, no guest memory.
        state: Fd,
        /// Regular file, truncated and written sparsely: guest memory, region by region.
        memory: Fd,
    },
    /// Sets the size of the balloon.
    SetBalloon {
        /// Memory the guest shall give up.
        mib: u32,
    },
    /// Sets how much hotpluggable memory the guest shall have plugged (virtio-mem).
    SetHotplugMemory {
        /// At most `memory.hotplug_mib` of the boot configuration.
        mib: u32,
    },
    /// Ends the VMM without asking the guest. Answer: [`Response::Done`], then
    /// [`Event::Exited`] with [`ExitReason::Stopped`].
    Stop,
}

/// A new microVM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// `/dev/kvm`, open for reading and writing.
    pub kvm: Fd,
    /// Uncompressed ELF `vmlinux`, open for reading. Guests map it: replace the file by rename(2),
    /// never write to it.
    pub kernel: Fd,
    /// Kernel command line without what the VMM adds by itself (`virtio_mmio.device=` of every slot).
    pub cmdline: String,
    /// vCPUs.
    pub vcpus: VcpuConfig,
    /// Guest memory.
    pub memory: MemoryConfig,
    /// Devices that are there at boot, in slot order (the first block device is `/dev/vda`).
    pub devices: Vec<DeviceConfig>,
}

/// A microVM from a saved one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreConfig {
    /// `/dev/kvm`, open for reading and writing.
    pub kvm: Fd,
    /// State written by [`Request::Save`].
    pub state: Fd,
    /// Memory written by [`Request::Save`]; mapped `MAP_PRIVATE`, never written.
    pub memory: Fd,
    /// The same devices in the same slots as were saved, with their new back ends.
    pub devices: Vec<DeviceConfig>,
}

/// vCPUs of a microVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuConfig {
    /// Online when the guest boots, 1..=`max`.
    pub boot: u8,
    /// Described to the guest; the agent can bring them online later.
    pub max: u8,
}

/// Memory of a microVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// Boot memory, MiB.
    pub boot_mib: u32,
    /// Most that virtio-mem can add, MiB; 0 = none.
    pub hotplug_mib: u32,
    /// Shared mapping (memfd), which vhost-user devices need.
    pub shared: bool,
}

/// One device and the descriptors of its back end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum DeviceConfig {
    /// virtio-blk over one raw file, or several as the partitions of one disk.
    Block(BlockConfig),
    /// virtio-pmem over a raw file.
    Pmem {
        /// Opened `O_RDONLY` when `read_only`.
        file: Fd,
        /// A guest store then ends the guest's access with an error instead of reaching the file.
        read_only: bool,
    },
    /// virtio-vsock.
    Vsock {
        /// Guest CID, at least 3.
        cid: u32,
        /// Listening `SOCK_STREAM` unix socket. A host program connects, writes `CONNECT <port>\n`,
        /// reads `OK <host port>\n`, and then has the stream.
        listener: Fd,
        /// Connected `SOCK_SEQPACKET` unix socket on which the VMM sends each connection that the
        /// guest opens: one end of a fresh socket pair as `SCM_RIGHTS` with [`VsockIncoming`] as JSON.
        /// None: connections from the guest are refused (RST).
        acceptor: Option<Fd>,
    },
    /// virtio-console, one port (`hvc0`), output only.
    Console {
        /// Gets a copy of all output (a pipe or file; never blocks the guest: output that does not
        /// fit is dropped). The last 16 KiB are also kept for [`Event::Exited`].
        output: Option<Fd>,
    },
    /// virtio-rng from the host's getrandom(2).
    Rng,
    /// virtio-balloon with free page reporting.
    Balloon,
    /// virtio-mem over the `memory.hotplug_mib` region.
    Mem,
    /// virtio-net on a tap.
    Net(NetConfig),
    /// vhost-user-fs.
    Fs {
        /// Mount tag, at most 36 bytes.
        tag: String,
        /// Connected unix stream to the file server.
        socket: Fd,
        /// Request queues besides the high-priority one, 1..=8.
        queues: u16,
    },
}

/// virtio-blk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockConfig {
    /// Answer to `VIRTIO_BLK_T_GET_ID`, at most 20 bytes of `[0-9A-Za-z._-]`.
    pub serial: String,
    /// What the disk consists of.
    pub contents: BlockContents,
    /// Enforced by the VMM; a writable descriptor is not needed then.
    pub read_only: bool,
    /// Bytes and operations per second; None = unlimited.
    pub rate_limit: Option<RateLimit>,
}

/// Where a disk's bytes are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum BlockContents {
    /// One raw file or block device, a multiple of 512 bytes long.
    File(Fd),
    /// Read-only files, each a partition (`/dev/vdb1`, `/dev/vdb2`, …) behind a GPT that the VMM
    /// makes up in memory: how all layers of an image travel as one device. At most 120.
    Partitions(Vec<Fd>),
}

/// virtio-net.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Tap queues (`IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`, `IFF_MULTI_QUEUE` when several), one per queue pair.
    pub taps: Vec<Fd>,
    /// Open `/dev/vhost-net`s, one per queue pair: the host's kernel moves the frames. Or none: the
    /// VMM does, which alone knows rate limits.
    #[serde(default)]
    pub vhost_nets: Vec<Fd>,
    /// Address of the guest's interface.
    pub mac: [u8; 6],
    /// Bytes; offered as VIRTIO_NET_F_MTU.
    pub mtu: u16,
    /// To the guest.
    pub rx_rate_limit: Option<RateLimit>,
    /// From the guest.
    pub tx_rate_limit: Option<RateLimit>,
}

/// Token buckets; a member of 0 means unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    /// Sustained.
    pub bytes_per_second: u64,
    /// On top of the sustained rate after idle time.
    pub burst_bytes: u64,
    /// Sustained.
    pub operations_per_second: u64,
    /// On top of the sustained rate after idle time.
    pub burst_operations: u64,
}

/// Sent with each descriptor on a vsock acceptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockIncoming {
    /// Port that the guest connected to.
    pub port: u32,
    /// Port that it came from.
    pub peer_port: u32,
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// Nothing more to say.
    Done,
    /// The microVM was built.
    Started {
        /// Slot of each device of the configuration, in its order.
        slots: Vec<u32>,
    },
    /// The device sits in this slot.
    Attached {
        /// Number of the virtio-mmio slot (`virtio-mmio.<slot>` in the guest's sysfs).
        slot: u32,
    },
    /// See [`Description`].
    Description(Box<Description>),
}

/// The state of a microVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Version of the VMM.
    pub version: String,
    /// Running or not.
    pub state: RunState,
    /// As booted.
    pub vcpus: VcpuConfig,
    /// As booted.
    pub memory: MemoryConfig,
    /// Filled slots.
    pub slots: Vec<SlotDescription>,
    /// Number of slots, filled or not.
    pub slot_count: u32,
    /// Pages the guest gave to the balloon, MiB.
    pub balloon_mib: u32,
    /// virtio-mem memory plugged, MiB.
    pub hotplugged_mib: u32,
    /// KVM exits since the start, all vCPUs.
    pub vm_exits: u64,
    /// Nanoseconds from process start to: API configuration read, memory mapped, kernel loaded, vCPUs running.
    pub stages: Vec<(String, u64)>,
}

/// One filled slot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotDescription {
    /// Slot number.
    pub slot: u32,
    /// "block", "net", … as the `type` of [`DeviceConfig`].
    pub device: String,
    /// The driver set DRIVER_OK.
    pub active: bool,
    /// Requests completed since the start.
    pub requests: u64,
}

/// Whether vCPUs run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RunState {
    /// No Boot or Restore yet.
    Empty,
    /// vCPUs run.
    Running,
    /// vCPUs and device workers are stopped.
    Paused,
    /// The guest is gone; the process is about to end.
    Exited,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// For programs.
    pub kind: FailureKind,
    /// For people: what failed, with which device or file, and why.
    pub message: String,
}

/// Kinds of failure a parent acts on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The request makes no sense (sizes, indexes, kinds of descriptor).
    InvalidArgument,
    /// Not in this state (attach before boot, save while running).
    WrongState,
    /// No free slot, or out of memory.
    Exhausted,
    /// The kernel image is not one this VMM can boot.
    BadKernel,
    /// Saved state is broken or of another version.
    BadSnapshot,
    /// KVM refused; the message names the ioctl and errno.
    Kvm,
    /// Another system call failed.
    Io,
}

/// Things that happen by themselves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// Always the last packet.
    Exited {
        /// Why.
        reason: ExitReason,
        /// Last output of the guest's console (virtio-console or early serial), at most 16 KiB, lossy UTF-8
        /// without control characters but `\n` and `\t`. Empty when it does not fit into the packet.
        console_tail: String,
    },
    /// A device's back end failed, or its driver broke it; the guest sees I/O errors. A device that
    /// goes on failing is told of a few times only, of which the last says so.
    DeviceFailed {
        /// Its slot.
        slot: u32,
        /// What happened.
        message: String,
    },
}

/// Why a microVM ended. Also the VMM's exit status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The guest asked for a reset or power-off (keyboard-controller reset). Exit status 0.
    GuestShutdown,
    /// The console's last lines hold a kernel panic. Exit status 10.
    GuestPanic,
    /// KVM_EXIT_SHUTDOWN. Exit status 11.
    TripleFault,
    /// KVM could not run a vCPU (emulation failure, entry failure, unknown exit). Exit status 12.
    VcpuFailed {
        /// Exit reason and registers.
        message: String,
    },
    /// [`Request::Stop`], or the parent closed the API socket. Exit status 0.
    Stopped,
    /// The VMM itself failed. Exit status 13.
    Internal {
        /// What failed.
        message: String,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn comes_back<T>(value: &T)
    where
        T: Serialize + for<'a> Deserialize<'a> + PartialEq + std::fmt::Debug,
    {
        let text = serde_json::to_string(value).unwrap();
        let back: T = serde_json::from_str(&text).unwrap();
        assert_eq!(&back, value, "{text}");
    }

    fn devices() -> Vec<DeviceConfig> {
        let limit = RateLimit {
            bytes_per_second: 1 << 40,
            ..Default::default()
        };
        vec![
            DeviceConfig::Block(BlockConfig {
                serial: "layers".into(),
                contents: BlockContents::Partitions(vec![Fd(3), Fd(4)]),
                read_only: true,
                rate_limit: None,
            }),
            DeviceConfig::Block(BlockConfig {
                serial: "scratch".into(),
                contents: BlockContents::File(Fd(5)),
                read_only: false,
                rate_limit: Some(limit),
            }),
            DeviceConfig::Pmem {
                file: Fd(6),
                read_only: true,
            },
            DeviceConfig::Vsock {
                cid: 3,
                listener: Fd(7),
                acceptor: Some(Fd(8)),
            },
            DeviceConfig::Console { output: None },
            DeviceConfig::Rng,
            DeviceConfig::Balloon,
            DeviceConfig::Mem,
            DeviceConfig::Net(NetConfig {
                taps: vec![Fd(9)],
                vhost_nets: vec![Fd(10)],
                mac: [2, 0, 0, 0, 0, 1],
                mtu: 1500,
                rx_rate_limit: Some(limit),
                tx_rate_limit: None,
            }),
            DeviceConfig::Fs {
                tag: "volumes".into(),
                socket: Fd(11),
                queues: 1,
            },
        ]
    }

    #[test]
    fn requests_come_back() {
        let boot = BootConfig {
            kvm: Fd(0),
            kernel: Fd(1),
            cmdline: "quiet \"x\"".into(),
            vcpus: VcpuConfig { boot: 1, max: 4 },
            memory: MemoryConfig {
                boot_mib: 128,
                hotplug_mib: 1024,
                shared: true,
            },
            devices: devices(),
        };
        let restore = RestoreConfig {
            kvm: Fd(0),
            state: Fd(1),
            memory: Fd(2),
            devices: devices(),
        };
        for request in [
            Request::Boot(Box::new(boot)),
            Request::Restore(Box::new(restore)),
            Request::Describe,
            Request::Attach(DeviceConfig::Rng),
            Request::Detach { slot: 31 },
            Request::Pause,
            Request::Resume,
            Request::Save {
                state: Fd(0),
                memory: Fd(1),
            },
            Request::SetBalloon { mib: 7 },
            Request::SetHotplugMemory { mib: 256 },
            Request::Stop,
        ] {
            comes_back(&Call { id: 1, request });
        }
    }

    #[test]
    fn messages_come_back() {
        let failure = Failure {
            kind: FailureKind::Exhausted,
            message: "all slots are filled".into(),
        };
        let results = [
            Ok(Response::Done),
            Ok(Response::Started { slots: vec![0, 1] }),
            Err(failure),
        ];
        for result in results {
            comes_back(&Message::Reply { id: 2, result });
        }
        for reason in [
            ExitReason::GuestShutdown,
            ExitReason::VcpuFailed {
                message: "rip 0".into(),
            },
        ] {
            comes_back(&Message::Event(Event::Exited {
                reason,
                console_tail: "\u{fffd}".into(),
            }));
        }
    }

    #[test]
    fn unknown_members_are_refused() {
        for text in [
            r#"{"attach":{"type":"console","output":null,"speed":1}}"#,
            r#"{"attach":{"type":"floppy"}}"#,
            r#"{"detach":{"slot":1,"force":true}}"#,
            r#"{"reboot":null}"#,
        ] {
            let parsed = serde_json::from_str::<Request>(text);
            assert!(parsed.is_err(), "{text}: {parsed:?}");
        }
    }
}
