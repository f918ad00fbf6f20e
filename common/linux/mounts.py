"""Mounts of the host: mount(2), umount2(2) and what is mounted below a directory. Standard library only.

Python has no wrapper for either call, so libc's are called through ``ctypes``, which is imported with the first call:
`delete` of a sandbox that left nothing behind never pays for it.

A *bind* mount takes no other flag in the call that makes it (mount(2), "Creating a bind mount"): a read-only one is
made by a second call, and :func:`mount` does that itself. Whoever passes ``ro`` gets ``ro``.
"""

from __future__ import annotations

import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

# <sys/mount.h>
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_REMOUNT = 32
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

_PROPAGATION = MS_SHARED | MS_SLAVE | MS_PRIVATE | MS_UNBINDABLE
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
        fstype: the file system; ``bind`` or empty with ``MS_BIND``.
        flags: ``MS_*``. With ``MS_BIND`` the others are set by a second call, propagation by a last one.
        data: the file system's own options, comma-separated.

    Raises:
        OSError: the kernel refused, or the data does not fit the page that it reads.
    """
    if len(os.fsencode(data)) > _MAX_DATA:
        raise OSError(errno.E2BIG, f"mount options of {len(data)} bytes exceed the kernel's {_MAX_DATA}", target)
    propagation = flags & (_PROPAGATION | MS_REC) if flags & _PROPAGATION else 0
    flags &= ~_PROPAGATION
    if flags & MS_BIND:
        _mount(source, target, "", flags & (MS_BIND | MS_REC), "")
        if flags & ~(MS_BIND | MS_REC):
            _mount("", target, "", MS_REMOUNT | flags & ~MS_REC, "")
    else:
        _mount(source, target, fstype, flags & ~MS_REC, data)
    if propagation:
        set_propagation(target, propagation)


def set_propagation(target: str, flags: int) -> None:
    """Make the mount at ``target`` shared, slave, private or unbindable (``MS_SHARED`` …, perhaps with ``MS_REC``)."""
    _mount("", target, "", flags, "")


def unmount(target: str) -> None:
    """Unmount ``target``; one that is in use is detached: gone from the tree now, freed with its last user.

    Raises:
        OSError: the kernel refused; nothing is mounted there (EINVAL, ENOENT) is no failure.
    """
    for flags in (_UMOUNT_NOFOLLOW, _UMOUNT_NOFOLLOW | _MNT_DETACH):
        error = _call("umount2", os.fsencode(target), flags)
        if error in (0, errno.EINVAL, errno.ENOENT):
            return
        if error != errno.EBUSY:
            raise OSError(error, os.strerror(error), target)
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), target)


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


def _mount(source: str, target: str, fstype: str, flags: int, data: str) -> None:
    arguments = (os.fsencode(source), os.fsencode(target), os.fsencode(fstype), flags, os.fsencode(data))
    error = _call("mount", *arguments)
    if error:
        raise OSError(error, os.strerror(error), target)


def _call(name: str, *arguments: bytes | int) -> int:
    """Call libc; return 0 or the error number."""
    import ctypes

    plain = [ctypes.c_ulong(value) if isinstance(value, int) else value for value in arguments]
    libc = ctypes.CDLL(None, use_errno=True)
    return 0 if getattr(libc, name)(*plain) == 0 else ctypes.get_errno()
