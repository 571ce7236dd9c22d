//! What a guest may not do to a share although the server's user could.
//!
//! On a share that is mounted `nosuid` the guest cannot make set-user-id or
//! set-group-id programs nor set file capabilities: the host's users could run
//! them. The mount's flag by itself would only keep the server from running
//! such files. Device nodes need no rule: the server lacks CAP_MKNOD.
//!
//! That rule is of a share, so a name has to stay in its directory: virtiofsd hands names to the
//! host's kernel as they come, and the guest's own kernel, which never sends a path, may be any.
//!
//! And how long a guest may believe what it has been told: the name of a symbolic
//! link never without asking again. Whoever publishes a new version of a directory
//! swaps a link to it (Kubernetes' configMap and secret volumes do), and a guest
//! that has seen one file of the new version must not see another of the old.

use std::{
    ffi::CStr,
    fs::File,
    io,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use virtiofsd::{
    filesystem::{
        Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply,
        OpenOptions, SerializableFileSystem, SetattrValid, SetxattrFlags, ZeroCopyReader,
        ZeroCopyWriter,
    },
    fuse,
    passthrough::PassthroughFs,
};

/// The xattr that makes a file a program with capabilities.
const FILE_CAPABILITIES: &[u8] = b"security.capability";

type Inode = <PassthroughFs as FileSystem>::Inode;

/// virtiofsd's file system with this module's rules.
pub struct SharePolicy(PassthroughFs);

impl SharePolicy {
    /// Guards `inner`.
    pub fn new(inner: PassthroughFs) -> Self {
        Self(inner)
    }

    /// EPERM when `inode` is on a share without set-id files.
    fn check_set_id_allowed(&self, ctx: Context, inode: Inode) -> io::Result<()> {
        if self.0.statfs(ctx, inode)?.f_flag & libc::ST_NOSUID == 0 {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::EPERM))
        }
    }
}

/// Whether a program of this mode runs with its owner's or group's rights. (Without execution
/// for the group, S_ISGID once meant mandatory locking and is left alone.)
fn sets_id(mode: u32) -> bool {
    let group = libc::S_ISGID | libc::S_IXGRP;
    mode & libc::S_ISUID != 0 || mode & group == group
}

/// EINVAL for what is not the name of an entry: a path could lead into another share.
fn check_name(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        // Only a server that offers FUSE_EXPORT_SUPPORT is asked for the dots.
        b"" | b"." | b".." => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        name if name.contains(&b'/') => Err(io::Error::from_raw_os_error(libc::EINVAL)),
        _ => Ok(()),
    }
}

fn is_directory(mode: u32) -> bool {
    mode & libc::S_IFMT == libc::S_IFDIR
}

/// The entry as the guest may keep it.
fn validity(mut entry: Entry) -> Entry {
    if entry.attr.mode & libc::S_IFMT == libc::S_IFLNK {
        entry.entry_timeout = Duration::ZERO;
    }
    entry
}

/// Methods that are the inner file system's.
macro_rules! delegate {
    ($(fn $name:ident $(<$generic:ident: $bound:path>)? (&self $(, $argument:ident: $kind:ty)* $(,)?) $(-> $result:ty)?;)*) => {
        $(
            fn $name $(<$generic: $bound>)? (&self $(, $argument: $kind)*) $(-> $result)? {
                self.0.$name($($argument),*)
            }
        )*
    };
}

impl FileSystem for SharePolicy {
    type Inode = Inode;
    type Handle = <PassthroughFs as FileSystem>::Handle;
    type DirIter = <PassthroughFs as FileSystem>::DirIter;

    delegate! {
        fn init(&self, capable: FsOptions) -> io::Result<FsOptions>;
        fn destroy(&self);
        fn forget(&self, ctx: Context, inode: Self::Inode, count: u64);
        fn batch_forget(&self, ctx: Context, requests: Vec<(Self::Inode, u64)>);
        fn getattr(&self, ctx: Context, inode: Self::Inode, handle: Option<Self::Handle>) -> io::Result<(fuse::Attr, Duration)>;
        fn readlink(&self, ctx: Context, inode: Self::Inode) -> io::Result<Vec<u8>>;
        fn open(&self, ctx: Context, inode: Self::Inode, kill_priv: bool, flags: u32) -> io::Result<(Option<Self::Handle>, OpenOptions)>;
        fn read<W: ZeroCopyWriter>(&self, ctx: Context, inode: Self::Inode, handle: Self::Handle, to: W, size: u32, offset: u64, lock_owner: Option<u64>, flags: u32) -> io::Result<usize>;
        fn write<R: ZeroCopyReader>(&self, ctx: Context, inode: Self::Inode, handle: Self::Handle, from: R, size: u32, offset: u64, lock_owner: Option<u64>, delayed: bool, kill_priv: bool, flags: u32) -> io::Result<usize>;
        fn flush(&self, ctx: Context, inode: Self::Inode, handle: Self::Handle, lock_owner: u64) -> io::Result<()>;
        fn fsync(&self, ctx: Context, inode: Self::Inode, data_only: bool, handle: Self::Handle) -> io::Result<()>;
        fn fallocate(&self, ctx: Context, inode: Self::Inode, handle: Self::Handle, mode: u32, offset: u64, length: u64) -> io::Result<()>;
        fn release(&self, ctx: Context, inode: Self::Inode, flags: u32, handle: Self::Handle, flush: bool, flock_release: bool, lock_owner: Option<u64>) -> io::Result<()>;
        fn statfs(&self, ctx: Context, inode: Self::Inode) -> io::Result<libc::statvfs64>;
        fn getxattr(&self, ctx: Context, inode: Self::Inode, name: &CStr, size: u32) -> io::Result<GetxattrReply>;
        fn listxattr(&self, ctx: Context, inode: Self::Inode, size: u32) -> io::Result<ListxattrReply>;
        fn removexattr(&self, ctx: Context, inode: Self::Inode, name: &CStr) -> io::Result<()>;
        fn opendir(&self, ctx: Context, inode: Self::Inode, flags: u32) -> io::Result<(Option<Self::Handle>, OpenOptions)>;
        fn readdir(&self, ctx: Context, inode: Self::Inode, handle: Self::Handle, size: u32, offset: u64) -> io::Result<Self::DirIter>;
        fn fsyncdir(&self, ctx: Context, inode: Self::Inode, data_only: bool, handle: Self::Handle) -> io::Result<()>;
        fn releasedir(&self, ctx: Context, inode: Self::Inode, flags: u32, handle: Self::Handle) -> io::Result<()>;
        fn access(&self, ctx: Context, inode: Self::Inode, mask: u32) -> io::Result<()>;
        fn lseek(&self, ctx: Context, inode: Self::Inode, handle: Self::Handle, offset: u64, whence: u32) -> io::Result<u64>;
        fn copyfilerange(&self, ctx: Context, inode_in: Self::Inode, handle_in: Self::Handle, offset_in: u64, inode_out: Self::Inode, handle_out: Self::Handle, offset_out: u64, length: u64, flags: u64) -> io::Result<usize>;
        fn syncfs(&self, ctx: Context, inode: Self::Inode) -> io::Result<()>;
    }

    // Also what READDIRPLUS tells comes from here.
    fn lookup(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        Ok(validity(self.0.lookup(ctx, parent, name)?))
    }

    fn mkdir(
        &self,
        ctx: Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        check_name(name)?;
        self.0.mkdir(ctx, parent, name, mode, umask, extensions)
    }

    fn unlink(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<()> {
        check_name(name)?;
        self.0.unlink(ctx, parent, name)
    }

    fn rmdir(&self, ctx: Context, parent: Inode, name: &CStr) -> io::Result<()> {
        check_name(name)?;
        self.0.rmdir(ctx, parent, name)
    }

    fn rename(
        &self,
        ctx: Context,
        parent: Inode,
        name: &CStr,
        new_parent: Inode,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        check_name(name)?;
        check_name(new_name)?;
        self.0
            .rename(ctx, parent, name, new_parent, new_name, flags)
    }

    fn symlink(
        &self,
        ctx: Context,
        target: &CStr,
        parent: Inode,
        name: &CStr,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        check_name(name)?;
        let made = self.0.symlink(ctx, target, parent, name, extensions)?;
        Ok(validity(made))
    }

    fn link(&self, ctx: Context, inode: Inode, parent: Inode, name: &CStr) -> io::Result<Entry> {
        check_name(name)?;
        Ok(validity(self.0.link(ctx, inode, parent, name)?))
    }

    fn setattr(
        &self,
        ctx: Context,
        inode: Inode,
        attributes: fuse::SetattrIn,
        handle: Option<Self::Handle>,
        valid: SetattrValid,
    ) -> io::Result<(fuse::Attr, Duration)> {
        if valid.contains(SetattrValid::MODE) && sets_id(attributes.mode) {
            // The type within the request's mode is the guest's word only.
            let (now, _) = self.0.getattr(ctx, inode, None)?;
            if !is_directory(now.mode) {
                self.check_set_id_allowed(ctx, inode)?;
            }
        }
        self.0.setattr(ctx, inode, attributes, handle, valid)
    }

    fn mknod(
        &self,
        ctx: Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        check_name(name)?;
        if sets_id(mode) {
            self.check_set_id_allowed(ctx, parent)?;
        }
        self.0
            .mknod(ctx, parent, name, mode, rdev, umask, extensions)
    }

    fn create(
        &self,
        ctx: Context,
        parent: Inode,
        name: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<Self::Handle>, OpenOptions)> {
        check_name(name)?;
        if sets_id(mode) {
            self.check_set_id_allowed(ctx, parent)?;
        }
        self.0
            .create(ctx, parent, name, mode, kill_priv, flags, umask, extensions)
    }

    fn setxattr(
        &self,
        ctx: Context,
        inode: Inode,
        name: &CStr,
        value: &[u8],
        flags: u32,
        extra_flags: SetxattrFlags,
    ) -> io::Result<()> {
        if name.to_bytes() == FILE_CAPABILITIES {
            self.check_set_id_allowed(ctx, inode)?;
        }
        self.0.setxattr(ctx, inode, name, value, flags, extra_flags)
    }
}

// The backend's type demands it; the VMM never asks for a migration.
impl SerializableFileSystem for SharePolicy {
    delegate! {
        fn prepare_serialization(&self, cancel: Arc<AtomicBool>);
        fn serialize(&self, state_pipe: File) -> io::Result<()>;
        fn deserialize_and_apply(&self, state_pipe: File) -> io::Result<()>;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_asked_for_each_time() {
        let entry = |mode| Entry {
            inode: 1,
            generation: 0,
            attr: fuse::Attr {
                mode,
                ..Default::default()
            },
            attr_timeout: Duration::from_secs(1),
            entry_timeout: Duration::from_secs(1),
        };
        let kept = |mode| validity(entry(mode)).entry_timeout;
        assert_eq!(kept(libc::S_IFLNK | 0o777), Duration::ZERO);
        assert_eq!(kept(libc::S_IFREG | 0o644), Duration::from_secs(1));
        assert_eq!(kept(libc::S_IFDIR | 0o755), Duration::from_secs(1));
    }

    #[test]
    fn programs_with_other_rights_are_recognized() {
        assert!(sets_id(0o104755));
        assert!(sets_id(0o102755));
        assert!(sets_id(0o4000));
        assert!(!sets_id(0o102644));
        assert!(!sets_id(0o100755));
        assert!(!sets_id(0o1777));
    }
}
