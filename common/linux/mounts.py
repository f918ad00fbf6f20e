"""Mounts of the host: mount(2), umount2(2) and what is mounted below a directory. Standard library only.

Python has no wrapper for either call, so libc's are called through ``ctypes``, which is imported with the first call:
`delete` of a sandbox that left nothing behind never pays for it.

A *bind* mount is made with open_tree(2), mount_setattr(2) and move_mount(2), not with mount(2): mount(2) makes it
writable first and read-only by a second call, and in between it has spread, writable for good, to every mount that it
propagates to. The new calls set what it may do before anybody can see it, and do so for the mounts below it as well.
Linux 5.12 has them all.
"""

from __future__ import annotations

import errno
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

# <sys/mount.h>
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_DIRSYNC = 128
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_BIND = 4096
MS_REC = 16384
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8

# <linux/mount.h>, <linux/fcntl.h>; these system calls have the same numbers on every architecture that we run on.
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_MOUNT_SETATTR = 442
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_RECURSIVE = 0x8000
_OPEN_TREE_CLONE = 1
_OPEN_TREE_CLOEXEC = os.O_CLOEXEC
_MOVE_MOUNT_F_EMPTY_PATH = 4
_ATTRIBUTES = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
"""Flags that a bind mount can have of its own; ``MOUNT_ATTR_*`` have the same values for these four."""

_MAX_DATA = 4095
"""Bytes of mount data: the kernel copies one page, silently cutting the rest, and wants a NUL (mount(2), NOTES)."""

# Options that are flags of mount(2), with whether they set or clear one. What is not here is the file system's.
_OPTIONS: dict[str, tuple[bool, int]] = {
    "async": (False, MS_SYNCHRONOUS),
    "atime": (False, MS_NOATIME),
    "bind": (True, MS_BIND),
    "defaults": (True, 0),
    "dev": (False, MS_NODEV),
    "diratime": (False, MS_NODIRATIME),
    "dirsync": (True, MS_DIRSYNC),
    "exec": (False, MS_NOEXEC),
    "noatime": (True, MS_NOATIME),
    "nodev": (True, MS_NODEV),
    "nodiratime": (True, MS_NODIRATIME),
    "noexec": (True, MS_NOEXEC),
    "nosuid": (True, MS_NOSUID),
    "private": (True, MS_PRIVATE),
    "rbind": (True, MS_BIND | MS_REC),
    "relatime": (True, MS_RELATIME),
    "ro": (True, MS_RDONLY),
    "rprivate": (True, MS_PRIVATE | MS_REC),
    "rshared": (True, MS_SHARED | MS_REC),
    "rslave": (True, MS_SLAVE | MS_REC),
    "rw": (False, MS_RDONLY),
    "shared": (True, MS_SHARED),
    "slave": (True, MS_SLAVE),
    "strictatime": (True, MS_STRICTATIME),
    "suid": (False, MS_NOSUID),
    "sync": (True, MS_SYNCHRONOUS),
}


def parse_options(options: Iterable[str]) -> tuple[int, str]:
    """Split mount options, as containerd sends them, into flags and the file system's own data."""
    flags = 0
    data = []
    for option in options:
        known = _OPTIONS.get(option)
        if known is None:
            data.append(option)
        elif known[0]:
            flags |= known[1]
        else:
            flags &= ~known[1]
    return flags, ",".join(data)


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """Mount ``source`` on ``target``.

    Args:
        source: what to mount: a device, a directory, or a name that the file system ignores.
        target: an existing directory, or a file for a bind mount of one.
        fstype: the file system; not used with ``MS_BIND``.
        flags: ``MS_*``. With ``MS_BIND``: perhaps ``MS_REC``, and what may not be done in it.
        data: the file system's own options, comma-separated.

    Raises:
        OSError: the kernel refused, or the data does not fit the page that it reads.
    """
    if len(os.fsencode(data)) > _MAX_DATA:
        raise OSError(errno.E2BIG, f"mount options of {len(data)} bytes exceed the kernel's {_MAX_DATA}", target)
    if flags & MS_BIND:
        _bind(source, target, flags)
    else:
        arguments = (os.fsencode(source), os.fsencode(target), os.fsencode(fstype), flags, os.fsencode(data))
        _checked(target, "mount", *arguments)


def set_propagation(target: str, flags: int) -> None:
    """Make the mount at ``target`` shared, slave, private or unbindable (``MS_SHARED`` …, perhaps with ``MS_REC``)."""
    _checked(target, "mount", b"", os.fsencode(target), b"", flags, b"")


def unmount(target: str) -> None:
    """Unmount ``target``; one that is in use is detached: gone from the tree now, freed with its last user.

    Raises:
        OSError: the kernel refused; nothing is mounted there (EINVAL, ENOENT) is no failure.
    """
    try:
        _checked(target, "umount2", os.fsencode(target), _UMOUNT_NOFOLLOW)
    except OSError as err:
        if err.errno == errno.EBUSY:
            _checked(target, "umount2", os.fsencode(target), _UMOUNT_NOFOLLOW | _MNT_DETACH)
        elif err.errno not in (errno.EINVAL, errno.ENOENT):
            raise


def mounted_below(directory: str) -> list[str]:
    """Return what is mounted at or below a directory, in the order in which it can be unmounted."""
    top = os.fsencode(os.path.realpath(directory))
    found = []
    with open("/proc/self/mountinfo", "rb") as table:  # noqa: PTH123 - `delete` does not import pathlib
        for line in table:
            point = _unescape(line.split(b" ", 5)[4])
            if point == top or point.startswith(top + b"/"):
                found.append(os.fsdecode(point))
    return found[::-1]


def unmount_below(directory: str) -> None:
    """Unmount all that is mounted at or below a directory.

    Raises:
        OSError: a mount is still there; what lies below it belongs to somebody else and must not be removed.
    """
    for point in mounted_below(directory):
        unmount(point)
    left = mounted_below(directory)
    if left:
        raise OSError(errno.EBUSY, f"{len(left)} mounts remain", left[0])


def _unescape(field: bytes) -> bytes:
    """Undo mountinfo's octal escapes (proc_pid_mountinfo(5)): space, tab, newline, backslash last."""
    return field.replace(b"\\040", b" ").replace(b"\\011", b"\t").replace(b"\\012", b"\n").replace(b"\\134", b"\\")


def _bind(source: str, target: str, flags: int) -> None:
    """Show ``source`` at ``target`` too."""
    recursive = _AT_RECURSIVE if flags & MS_REC else 0
    clone = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | recursive
    tree = _checked(source, "syscall", _SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(source), clone)
    try:
        attributes = struct.pack(
            "=4Q", flags & _ATTRIBUTES, 0, 0, 0
        )  # struct mount_attr: set, clear, propagation, userns
        scope = _AT_EMPTY_PATH | recursive
        _checked(target, "syscall", _SYS_MOUNT_SETATTR, tree, b"", scope, attributes, len(attributes))
        arguments = (tree, b"", _AT_FDCWD, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)
        _checked(target, "syscall", _SYS_MOVE_MOUNT, *arguments)
    finally:
        os.close(tree)


def _checked(path: str, name: str, *arguments: bytes | int) -> int:
    """Call libc; return its result, or raise the error as one about ``path``."""
    import ctypes

    plain = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(getattr(libc, name)(*plain))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), path)
    return result
