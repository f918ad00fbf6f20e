"""What is behind a device on the host: looked at before anything is asked of a hypervisor.

A source is known by what it is and not by the path that leads to it: two names of one disk are one disk. Looking may
take as long as the file system does that holds it, so it runs in a thread.
"""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import NotFoundError, UsageError
from common.services.vmm import ShareSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.services.vmm import BlockSpec, DeviceSpec


async def examine(spec: DeviceSpec) -> str:
    """Return what a source is, for example ``file 2049:1234``; the same for every path that leads to it.

    Raises:
        NotFoundError: there is nothing.
        UsageError: it is not what such a device can be made from; the message says what it is.
    """
    return await asyncio.to_thread(_examine, spec)


def _examine(spec: DeviceSpec) -> str:
    if not spec.source.startswith("/"):
        raise UsageError(f"source {spec.source!r} is not an absolute path", hint="name the file by its whole path")
    try:
        found = Path(spec.source).stat()
    except OSError as err:
        raise NotFoundError(
            f"source {spec.source} cannot be used: {err.strerror}", hint="check that it exists on the host"
        ) from err
    return _directory(spec, found) if isinstance(spec, ShareSpec) else _disk(spec, found)


def _directory(spec: ShareSpec, found: os.stat_result) -> str:
    if not stat.S_ISDIR(found.st_mode):
        raise UsageError(f"source {spec.source} is {_kind(found)}; a share needs a directory")
    return f"directory {found.st_dev}:{found.st_ino}"


def _disk(spec: BlockSpec, found: os.stat_result) -> str:
    if stat.S_ISBLK(found.st_mode):
        backing = f"disk {os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
    elif stat.S_ISREG(found.st_mode):
        backing = f"file {found.st_dev}:{found.st_ino}"
    else:
        raise UsageError(
            f"source {spec.source} is {_kind(found)}; a block device needs a disk or a disk image",
            hint="attach a directory as a share",
        )
    if _size(spec.source) == 0:
        raise UsageError(f"source {spec.source} has a size of zero", hint="truncate -s makes an image of a size")
    return backing


def _size(path: str) -> int:
    """Return the bytes of a file or disk; only the end of a disk tells its size."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as err:
        raise UsageError(f"source {path} cannot be opened: {err.strerror}") from err
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISREG, "a file"),
    (stat.S_ISBLK, "a disk"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
)


def _kind(found: os.stat_result) -> str:
    return next((name for is_such, name in _KINDS if is_such(found.st_mode)), "no file")
