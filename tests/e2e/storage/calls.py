"""System calls that programs rely on, on the directory that the first word names. Says "ok" for
each group and ends with a traceback at what fails."""
import ctypes
import errno
import fcntl
import mmap
import os
import struct
import sys

os.chdir(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
AT_FDCWD, AT_SYMLINK_FOLLOW = -100, 0x400


def put(name, contents):
    with open(name, "wb") as file:
        file.write(contents)


def get(name):
    with open(name, "rb") as file:
        return file.read()


def fails(wanted, call, *arguments):
    try:
        call(*arguments)
    except OSError as error:
        assert error.errno == wanted, (call, arguments, error)
    else:
        raise AssertionError((call, arguments, "did not fail"))


def in_child(work):
    """Whether `work` is true in another process."""
    child = os.fork()
    if child == 0:
        os._exit(0 if work() else 1)
    return os.waitpid(child, 0)[1] == 0


def rename_over_an_open_file():
    put("old", b"old")
    put("new", b"new")
    with open("old", "rb") as before:
        os.rename("new", "old")
        assert before.read() == b"old"
        assert get("old") == b"new"
    assert not os.path.exists("new")


def unlink_of_an_open_file():
    fd = os.open("gone", os.O_RDWR | os.O_CREAT, 0o600)
    os.write(fd, b"before")
    os.unlink("gone")
    os.write(fd, b" after")
    assert os.pread(fd, 100, 0) == b"before after"
    assert os.fstat(fd).st_size == 12
    os.ftruncate(fd, 6)
    os.fsync(fd)
    assert os.pread(fd, 100, 0) == b"before"
    os.close(fd)
    assert "gone" not in os.listdir(".")


def extended_attributes():
    put("file", b"")
    os.makedirs("directory", exist_ok=True)
    for name in ("file", "directory"):
        os.setxattr(name, "user.colour", b"blue")
        os.setxattr(name, "user.empty", b"")
        assert os.getxattr(name, "user.colour") == b"blue"
        assert sorted(os.listxattr(name)) == ["user.colour", "user.empty"]
        fails(errno.EEXIST, os.setxattr, name, "user.colour", b"red", os.XATTR_CREATE)
        os.removexattr(name, "user.empty")
        fails(errno.ENODATA, os.getxattr, name, "user.empty")


def locks():
    put("lock", b"")

    def free(lock):
        with open("lock", "r+b") as other:
            try:
                lock(other)
            except BlockingIOError:
                return False
            return True

    def flock(file):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def posix(file):
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, 0)

    def open_file_description(file):
        wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 10, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, wanted)

    for lock in (flock, posix, open_file_description):
        with open("lock", "r+b") as held:
            lock(held)
            assert not in_child(lambda: free(lock)), lock
        assert in_child(lambda: free(lock)), lock
    with open("lock", "r+b") as held:
        open_file_description(held)
        # Unlike a process's lock, it also keeps the same process out.
        assert not free(open_file_description)


def space():
    fd = os.open("space", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    os.posix_fallocate(fd, 0, 1 << 20)
    full = os.fstat(fd)
    assert full.st_size == 1 << 20 and full.st_blocks >= 2048, full
    os.pwrite(fd, b"x" * (1 << 20), 0)
    os.fsync(fd)
    keep_size_and_punch_hole = ctypes.c_int(3)
    done = libc.fallocate(
        fd, keep_size_and_punch_hole, ctypes.c_long(256 << 10), ctypes.c_long(512 << 10)
    )
    assert done == 0, os.strerror(ctypes.get_errno())
    holed = os.fstat(fd)
    assert holed.st_size == 1 << 20 and holed.st_blocks <= full.st_blocks - 1000, holed
    assert os.pread(fd, 4096, 300 << 10) == bytes(4096)
    assert os.pread(fd, 1, (256 << 10) - 1) == b"x"
    assert os.lseek(fd, 0, os.SEEK_HOLE) == 256 << 10
    assert os.lseek(fd, 256 << 10, os.SEEK_DATA) == 768 << 10
    os.close(fd)


def shared_mapping():
    put("mapped", bytes(3 * 4096))
    with open("mapped", "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[4096:4104] = b"by store"
        # Another process maps the same pages.
        with open("mapped", "rb") as other:
            assert other.read()[4096:4104] == b"by store"
        memory.flush()
        os.pwrite(file.fileno(), b"by write", 0)
        assert memory[:8] == b"by write"


def copies():
    put("source", b"0123456789" * 1000)
    with open("source", "rb") as source, open("copy", "wb") as copy:
        assert os.copy_file_range(source.fileno(), copy.fileno(), 10_000) == 10_000
    assert get("copy") == get("source")
    os.link("copy", "second name")
    assert os.stat("copy").st_nlink == 2
    os.unlink("copy")
    assert get("second name") == get("source")


def notices():
    IN_MODIFY, IN_MOVED_TO, IN_CREATE, IN_DELETE = 0x2, 0x80, 0x100, 0x200
    os.makedirs("watched", exist_ok=True)
    fd = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(fd, b"watched", IN_MODIFY | IN_MOVED_TO | IN_CREATE | IN_DELETE) > 0

    def by_another():
        put("watched/one", b"1")
        os.rename("watched/one", "watched/two")
        os.unlink("watched/two")
        return True

    assert in_child(by_another)
    seen, buffer = [], os.read(fd, 4096)
    while buffer:
        _, mask, _, length = struct.unpack_from("iIII", buffer)
        seen.append((mask, buffer[16 : 16 + length].rstrip(b"\0")))
        buffer = buffer[16 + length :]
    assert seen == [
        (IN_CREATE, b"one"),
        (IN_MODIFY, b"one"),
        (IN_MOVED_TO, b"two"),
        (IN_DELETE, b"two"),
    ], seen
    os.close(fd)


def unnamed_files():
    """FUSE servers in general cannot make them: programs see EOPNOTSUPP and take a name."""
    fails(errno.EOPNOTSUPP, os.open, ".", os.O_TMPFILE | os.O_RDWR, 0o600)
    # The container's own root is a disk.
    fd = os.open("/root", os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(fd, b"unnamed")
    path = f"/proc/self/fd/{fd}".encode()
    done = libc.linkat(AT_FDCWD, path, AT_FDCWD, b"/root/named", AT_SYMLINK_FOLLOW)
    assert done == 0, os.strerror(ctypes.get_errno())
    assert get("/root/named") == b"unnamed"


for group in (
    rename_over_an_open_file,
    unlink_of_an_open_file,
    extended_attributes,
    locks,
    space,
    shared_mapping,
    copies,
    notices,
    unnamed_files,
):
    group()
    print("ok", group.__name__, flush=True)
