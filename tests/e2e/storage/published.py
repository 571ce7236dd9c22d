"""Waits for two new versions of a published directory, by what inotify(7) says of it."""

import ctypes
import os
import struct

IN_MOVED_TO, IN_CREATE, IN_DELETE, IN_DELETE_SELF = 0x80, 0x100, 0x200, 0x400
libc = ctypes.CDLL(None)
os.chdir("/data")
fd = libc.inotify_init1(0)


def watch(path, mask):
    watched = libc.inotify_add_watch(fd, os.fsencode(path), mask)
    assert watched > 0, path
    return watched


def until(*wanted):
    wanted = set(wanted)
    while wanted:
        buffer = os.read(fd, 4096)
        while buffer:
            watched, mask, _, length = struct.unpack_from("iIII", buffer)
            wanted.discard((watched, mask, buffer[16 : 16 + length].rstrip(b"\0")))
            buffer = buffer[16 + length :]


directory = watch(".", IN_MOVED_TO | IN_CREATE | IN_DELETE)
# As programs watch a file that they have resolved: that of the old version goes.
file = watch(os.path.realpath("key"), IN_DELETE_SELF)
print("watching 1", flush=True)
until(
    (directory, IN_MOVED_TO, b"..data"),
    (directory, IN_CREATE, b"new"),
    (directory, IN_DELETE, b"old"),
    (file, IN_DELETE_SELF, b""),
)
for round in (2, 3):
    if round == 3:
        print("watching 2", flush=True)
        until((directory, IN_MOVED_TO, b"..data"))
    # What is old goes last.
    while sorted(os.listdir()) != ["..data", f"..version_{round}", "key", "new"]:
        pass
    with open("key") as key, open("new") as new:
        assert new.read() == f"{round}\n"
        print(f"key: {key.read().strip()} of mode {os.fstat(key.fileno()).st_mode & 0o777:o}, and new", flush=True)
