//! A FUSE client (`include/uapi/linux/fuse.h`) on a vhost-user front end: one
//! request at a time, on a queue in memory shared with the server.

use std::{
    fs::File,
    os::unix::net::UnixStream,
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use vhost::{
    VhostBackend, VhostUserMemoryRegionInfo, VringConfigData,
    vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures},
};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// The root's node number.
pub const ROOT: u64 = 1;

const MEMORY_BYTES: u64 = 1 << 20;
const QUEUE_SIZE: u16 = 16;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const REQUEST: u64 = 0x1_0000;
const ANSWER: u64 = 0x2_0000;
const ANSWER_BYTES: u32 = 0x1_0000;
/// Queue 0 is for forgets.
const QUEUE: usize = 1;

const LOOKUP: u32 = 1;
const SETATTR: u32 = 4;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RMDIR: u32 = 11;
const RENAME: u32 = 12;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const SETXATTR: u32 = 21;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const CREATE: u32 = 35;

type Answer = Result<Vec<u8>, i32>;

/// A mounted file system, so to say.
pub struct Client {
    memory: GuestMemoryMmap,
    _frontend: Frontend,
    kick: EventFd,
    available: u16,
    user: (u32, u32),
}

impl Client {
    /// Sets the connection and the FUSE session up.
    pub fn connect(stream: UnixStream) -> Self {
        let file =
            File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(MEMORY_BYTES).unwrap();
        let offset = FileOffset::new(file, 0);
        let ranges = [(GuestAddress(0), MEMORY_BYTES as usize, Some(offset))];
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
        let mut frontend = Frontend::from_stream(stream, 2);
        frontend.set_owner().unwrap();
        let features = frontend.get_features().unwrap();
        frontend
            .set_features(features & (1 << 32 | 1 << 30))
            .unwrap();
        frontend.get_protocol_features().unwrap();
        frontend
            .set_protocol_features(VhostUserProtocolFeatures::MQ)
            .unwrap();
        assert_eq!(frontend.get_queue_num().unwrap(), 2);
        let region = vm_memory::GuestMemory::find_region(&memory, GuestAddress(0)).unwrap();
        let region = VhostUserMemoryRegionInfo::from_guest_region(region).unwrap();
        let base = region.userspace_addr;
        frontend.set_mem_table(&[region]).unwrap();
        let kick = EventFd::new(0).unwrap();
        let config = VringConfigData {
            queue_max_size: QUEUE_SIZE,
            queue_size: QUEUE_SIZE,
            flags: 0,
            desc_table_addr: base + DESCRIPTORS,
            used_ring_addr: base + USED,
            avail_ring_addr: base + AVAILABLE,
            log_addr: None,
        };
        frontend.set_vring_num(QUEUE, QUEUE_SIZE).unwrap();
        frontend.set_vring_addr(QUEUE, &config).unwrap();
        frontend.set_vring_base(QUEUE, 0).unwrap();
        let call = EventFd::new(0).unwrap();
        frontend.set_vring_call(QUEUE, &call).unwrap();
        frontend.set_vring_kick(QUEUE, &kick).unwrap();
        frontend.set_vring_enable(QUEUE, true).unwrap();
        let mut client = Self {
            memory,
            _frontend: frontend,
            kick,
            available: 0,
            user: (0, 0),
        };
        const HANDLE_KILLPRIV_V2: u32 = 1 << 28;
        let mut init = words(&[7, 38, 0x2_0000, HANDLE_KILLPRIV_V2]);
        init.resize(64, 0);
        let answer = client.request(INIT, 0, &[&init]).unwrap();
        assert_eq!(u32_at(&answer, 0), 7);
        client
    }

    /// The guest's user that acts from now on.
    pub fn act_as(&mut self, uid: u32, gid: u32) {
        self.user = (uid, gid);
    }

    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        let answer = self.request(LOOKUP, parent, &[&text(name)])?;
        Ok(u64_at(&answer, 0))
    }

    pub fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let answer = self.request(OPEN, node, &[&words(&[flags as u32, 0])])?;
        Ok(u64_at(&answer, 0))
    }

    pub fn read(&mut self, node: u64) -> Answer {
        let handle = self.open(node, libc::O_RDONLY)?;
        self.read_with(READ, node, handle)
    }

    /// Node and handle.
    pub fn create(&mut self, parent: u64, name: &str, mode: u32) -> Result<(u64, u64), i32> {
        let flags = (libc::O_CREAT | libc::O_RDWR | libc::O_EXCL) as u32;
        let head = words(&[flags, mode | libc::S_IFREG, 0, 0]);
        let answer = self.request(CREATE, parent, &[&head, &text(name)])?;
        Ok((u64_at(&answer, 0), u64_at(&answer, 128)))
    }

    /// As a user whose writing takes set-id bits away.
    pub fn write(&mut self, (node, handle): (u64, u64), bytes: &[u8]) -> Answer {
        const WRITE_KILL_SUIDGID: u32 = 1 << 2;
        let mut head = handle.to_le_bytes().to_vec();
        let size = bytes.len() as u32;
        head.extend(words(&[0, 0, size, WRITE_KILL_SUIDGID, 0, 0, 0, 0]));
        self.request(WRITE, node, &[&head, bytes])
    }

    pub fn chmod(&mut self, node: u64, mode: u32) -> Answer {
        const FATTR_MODE: u32 = 1;
        let mut head = words(&[FATTR_MODE, 0]);
        head.resize(68, 0);
        head.extend(words(&[mode, 0, 0, 0, 0]));
        self.request(SETATTR, node, &[&head])
    }

    pub fn mknod(&mut self, parent: u64, name: &str, mode: u32, device: u32) -> Answer {
        let head = words(&[mode, device, 0, 0]);
        self.request(MKNOD, parent, &[&head, &text(name)])
    }

    pub fn mkdir(&mut self, parent: u64, name: &str) -> Answer {
        self.request(MKDIR, parent, &[&words(&[0o755, 0]), &text(name)])
    }

    pub fn symlink(&mut self, parent: u64, name: &str, target: &str) -> Answer {
        self.request(SYMLINK, parent, &[&text(name), &text(target)])
    }

    pub fn link(&mut self, node: u64, parent: u64, name: &str) -> Answer {
        self.request(LINK, parent, &[&node.to_le_bytes(), &text(name)])
    }

    /// Within one directory.
    pub fn rename(&mut self, parent: u64, name: &str, new_name: &str) -> Answer {
        let head = parent.to_le_bytes();
        self.request(RENAME, parent, &[&head, &text(name), &text(new_name)])
    }

    pub fn rmdir(&mut self, parent: u64, name: &str) -> Answer {
        self.request(RMDIR, parent, &[&text(name)])
    }

    pub fn unlink(&mut self, parent: u64, name: &str) -> Answer {
        self.request(UNLINK, parent, &[&text(name)])
    }

    pub fn set_xattr(&mut self, node: u64, name: &str, value: &[u8]) -> Result<(), i32> {
        let head = words(&[value.len() as u32, 0]);
        self.request(SETXATTR, node, &[&head, &text(name), value])
            .map(drop)
    }

    /// Sorted, without "." and "..".
    pub fn list(&mut self, node: u64) -> Result<Vec<String>, i32> {
        let opened = self.request(OPENDIR, node, &[&words(&[0, 0])])?;
        let entries = self.read_with(READDIR, node, u64_at(&opened, 0))?;
        let mut names = Vec::new();
        let mut at = 0;
        while at < entries.len() {
            let length = u32_at(&entries, at + 16) as usize;
            let name = String::from_utf8(entries[at + 24..][..length].to_vec()).unwrap();
            if name != "." && name != ".." {
                names.push(name);
            }
            at += (24 + length).next_multiple_of(8);
        }
        names.sort();
        Ok(names)
    }

    fn read_with(&mut self, opcode: u32, node: u64, handle: u64) -> Answer {
        let mut head = handle.to_le_bytes().to_vec();
        head.extend(words(&[0, 0, 4096, 0, 0, 0, 0, 0]));
        self.request(opcode, node, &[&head])
    }

    /// Puts a request on the queue and waits for the answer.
    fn request(&mut self, opcode: u32, node: u64, parts: &[&[u8]]) -> Answer {
        const HEADER_BYTES: usize = 40;
        let body: Vec<u8> = parts.concat();
        let unique = u64::from(self.available) + 1;
        let mut request = words(&[(HEADER_BYTES + body.len()) as u32, opcode]);
        request.extend(unique.to_le_bytes());
        request.extend(node.to_le_bytes());
        request.extend(words(&[self.user.0, self.user.1, 1, 0]));
        request.extend(body);
        self.memory
            .write_slice(&request, GuestAddress(REQUEST))
            .unwrap();
        self.descriptor(0, REQUEST, request.len() as u32, 1, 1);
        self.descriptor(1, ANSWER, ANSWER_BYTES, 2, 0);
        let slot = u64::from(self.available % QUEUE_SIZE);
        self.memory
            .write_obj(0u16, GuestAddress(AVAILABLE + 4 + 2 * slot))
            .unwrap();
        self.available += 1;
        self.memory
            .store(
                self.available,
                GuestAddress(AVAILABLE + 2),
                Ordering::SeqCst,
            )
            .unwrap();
        self.kick.write(1).unwrap();
        self.wait_used();
        let mut answer = vec![0; ANSWER_BYTES as usize];
        self.memory
            .read_slice(&mut answer, GuestAddress(ANSWER))
            .unwrap();
        answer.truncate(u32_at(&answer, 0) as usize);
        assert_eq!(u64_at(&answer, 8), unique);
        match u32_at(&answer, 4) as i32 {
            0 => Ok(answer.split_off(16)),
            error => Err(-error),
        }
    }

    fn wait_used(&self) {
        let start = Instant::now();
        while self
            .memory
            .load::<u16>(GuestAddress(USED + 2), Ordering::SeqCst)
            .unwrap()
            != self.available
        {
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "the server does not answer"
            );
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    fn descriptor(&self, index: u64, address: u64, length: u32, flags: u16, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory
            .write_slice(&bytes, GuestAddress(DESCRIPTORS + 16 * index))
            .unwrap();
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn text(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.push(0);
    bytes
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}
