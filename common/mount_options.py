"""Mount options as containerd sends them, told apart: flags of mount(2), and the file system's own. Host and guest.

Sources: mount(8) for the names, <sys/mount.h> for the numbers.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_DIRSYNC = 128
MS_NOATIME = 1024
MS_NODIRATIME = 2048
MS_BIND = 4096
MS_MOVE = 8192
MS_REC = 16384
MS_UNBINDABLE = 1 << 17
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MS_SHARED = 1 << 20
MS_RELATIME = 1 << 21
MS_STRICTATIME = 1 << 24

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

MOUNT_OPTIONS = frozenset(_OPTIONS)
"""Options that have a meaning of their own for every file system."""


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
