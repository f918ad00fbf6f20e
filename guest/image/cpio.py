"""An archive in cpio's "newc" format, as the kernel unpacks it into its first root file system.

Source: Documentation/driver-api/early-userspace/buffer-format.rst of the Linux kernel.
"""

from __future__ import annotations

import stat
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"


class Entry(NamedTuple):
    """One file: its mode with the type bits, and its content, target (of a link) or nothing (a directory)."""

    mode: int
    data: bytes = b""


class Archive:
    """Files by absolute path; the directories above a file come of themselves."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def add_file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self._add(path, Entry(stat.S_IFREG | mode, data))

    def add_link(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(path, Entry(stat.S_IFLNK | 0o777, target.encode()))

    def add_directory(self, path: str) -> None:
        """Add a directory, unless it is there."""
        if path != "/":
            self._entries.setdefault(path, Entry(stat.S_IFDIR | 0o755))
            self.add_directory(str(PurePosixPath(path).parent))

    def __contains__(self, path: str) -> bool:
        return path in self._entries

    def encode(self) -> bytes:
        """Return the archive's bytes; they depend on its entries alone."""
        members = [*sorted(self._entries.items()), (_TRAILER, Entry(0))]
        return b"".join(part for number, (path, entry) in enumerate(members) for part in _member(number, path, entry))

    def _add(self, path: str, entry: Entry) -> None:
        self.add_directory(str(PurePosixPath(path).parent))
        self._entries[path] = entry


def _member(inode: int, path: str, entry: Entry) -> Iterator[bytes]:
    """Yield header, name and content, each padded to four bytes."""
    name = path.lstrip("/").encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    #        inode, mode, uid, gid, nlink, mtime, size, device (2), special device (2), name size, checksum
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
    header = _MAGIC + b"".join(b"%08X" % field for field in fields) + name
    yield header + _padding(len(header))
    yield entry.data + _padding(len(entry.data))


def _padding(size: int) -> bytes:
    return b"\0" * (-size % 4)
