"""Mounts of the host: mount(2), umount2(2) and what is mounted below a directory. Standard library only.

Python has no wrapper for either call, so libc's are called through ``ctypes``, which is imported with the first call:
`delete` of a sandbox that left nothing behind never pays for it.

A *bind* mount is made with open_tree(2), mount_setattr(2) and move_mount(2), not with mount(2): mount(2) makes it
writable first and read-only by a second call, and in between it has spread, writable for good, to every mount that it
propagates to. The new calls set what it may do before anybody can see it, and do so for the mounts below it as well.
Linux 5.12 has them all.
"""

from __future__ import annotations

# ruff: noqa: PLC0414  # an alias of the same name is how a re-export is declared
import errno
import os
import struct

from common.mount_options import MS_BIND as MS_BIND
from common.mount_options import MS_NODEV as MS_NODEV
from common.mount_options import MS_NOEXEC as MS_NOEXEC
from common.mount_options import MS_NOSUID as MS_NOSUID
from common.mount_options import MS_PRIVATE as MS_PRIVATE
from common.mount_options import MS_RDONLY as MS_RDONLY
from common.mount_options import MS_REC as MS_REC
from common.mount_options import MS_SHARED as MS_SHARED
from common.mount_options import MS_SLAVE as MS_SLAVE
from common.mount_options import parse_options as parse_options

# <sys/mount.h>
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
_CLONE_NEWNS = 0x20000
_ATTRIBUTES = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
"""Flags that a bind mount can have of its own; ``MOUNT_ATTR_*`` have the same values for these four."""

_MAX_DATA = 4095
"""Bytes of mount data: the kernel copies one page, silently cutting the rest, and wants a NUL (mount(2), NOTES)."""


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


def mount_into(namespace: int, source: str, target: str, flags: int) -> None:
    """Show ``source`` at ``target`` of another mount namespace, which this process is in from then on.

    Args:
        namespace: a descriptor of it (namespaces(7)).
        source: path in this process's own mounts.
        target: path in the others.
        flags: what may not be done in it.

    Raises:
        OSError: the kernel refused, for example because this process has threads.
    """
    _bind(source, target, flags, namespace)


def enter(namespace: int) -> None:
    """Go into another mount namespace. Raises as :func:`mount_into` does."""
    _checked("", "setns", namespace, _CLONE_NEWNS)


def _bind(source: str, target: str, flags: int, namespace: int = -1) -> None:
    """Show ``source`` at ``target`` too, perhaps of another namespace."""
    recursive = _AT_RECURSIVE if flags & MS_REC else 0
    clone = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | recursive
    tree = _checked(source, "syscall", _SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(source), clone)
    try:
        attributes = struct.pack(
            "=4Q", flags & _ATTRIBUTES, 0, 0, 0
        )  # struct mount_attr: set, clear, propagation, userns
        scope = _AT_EMPTY_PATH | recursive
        _checked(target, "syscall", _SYS_MOUNT_SETATTR, tree, b"", scope, attributes, len(attributes))
        if namespace >= 0:
            enter(namespace)
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
