"""What is behind a device on the host: looked at before anything is asked of a hypervisor.

A source is known by what it is and not by the path that leads to it: two names of one disk are one disk. Looking may
take as long as the file system does that holds it, so it runs in a thread.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import NotFoundError, UsageError
from common.linux import netns
from common.services.vmm import (
    BlockSpec,
    CpuSpec,
    MemorySpec,
    NetworkSpec,
    PmemSpec,
    ShareSpec,
    VfioSpec,
    VhostUserDiskSpec,
    VsockSpec,
)
from procs.device_manager import vfio

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.services.vmm import DeviceSpec

_BLOCK_MIB = 128
"""Memory that a guest adds or removes at once (``MIN_MEMORY_BLOCK_SIZE``, arch/x86/include/asm/sparsemem.h)."""
_PMEM_MIB = 2
_GUEST_CIDS = range(3, 0xFFFFFFFF)
"""The others are the hypervisor's, the host's own, the host, and any (include/uapi/linux/vm_sockets.h)."""
_MAC = re.compile(r"[0-9a-f][02468ace](:[0-9a-f]{2}){5}", re.IGNORECASE)
"""Of one device: the lowest bit of the first byte says group (IEEE 802-2014, 8.2)."""


async def examine(spec: DeviceSpec) -> str:
    """Return what a source is, for example ``file 2049:1234``; the same for every path that leads to it.

    What is a part of something that a sandbox has whole has that before a slash: ``iommu-group 12/0000:3b:00.0``.

    Raises:
        NotFoundError: there is nothing.
        UsageError: it is not what such a device can be made from; the message says what it is.
        StateError, UnsupportedError: see :func:`procs.device_manager.vfio.group_of`.
    """
    return await asyncio.to_thread(_examine, spec)


def _examine(spec: DeviceSpec) -> str:
    match spec:
        case ShareSpec():
            return _directory(spec)
        case BlockSpec():
            return _disk(spec)
        case PmemSpec():
            return _persistent_memory(spec)
        case VhostUserDiskSpec():
            return _socket(spec)
        case VfioSpec():
            return f"iommu-group {vfio.group_of(spec.source)}/{spec.source}"
        case VsockSpec():
            return _address(spec)
        case NetworkSpec():
            return _interface(spec)
        case CpuSpec() | MemorySpec():
            return _part(spec)


def _status(path: str) -> os.stat_result:
    if not path.startswith("/"):
        raise UsageError(f"source {path!r} is not an absolute path", hint="name the file by its whole path")
    try:
        return Path(path).stat()
    except OSError as err:
        raise NotFoundError(
            f"source {path} cannot be used: {err.strerror}", hint="check that it exists on the host"
        ) from err


def _directory(spec: ShareSpec) -> str:
    found = _status(spec.source)
    if not stat.S_ISDIR(found.st_mode):
        raise UsageError(f"source {spec.source} is {_kind(found)}; a share needs a directory")
    return f"directory {found.st_dev}:{found.st_ino}"


def _disk(spec: BlockSpec) -> str:
    found = _status(spec.source)
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


def _persistent_memory(spec: PmemSpec) -> str:
    found = _status(spec.source)
    if not stat.S_ISREG(found.st_mode):
        raise UsageError(f"source {spec.source} is {_kind(found)}; persistent memory needs a file")
    if not found.st_size or found.st_size % (_PMEM_MIB << 20):
        raise UsageError(
            f"source {spec.source} has {found.st_size} bytes",
            hint=f"guests map persistent memory in steps of {_PMEM_MIB} MiB: truncate -s makes a file of a size",
        )
    return f"file {found.st_dev}:{found.st_ino}"


def _socket(spec: VhostUserDiskSpec) -> str:
    """Whether a program listens there is the hypervisor's to see, which connects."""
    found = _status(spec.source)
    if not stat.S_ISSOCK(found.st_mode):
        raise UsageError(
            f"source {spec.source} is {_kind(found)}; a vhost-user disk needs the socket of the program that serves it",
            hint="attach a file or a block device as a block device",
        )
    return f"socket {found.st_dev}:{found.st_ino}"


def _part(spec: CpuSpec | MemorySpec) -> str:
    """A part of the machine itself has a number instead of a source; a sandbox has each number once."""
    if spec.number < 1:
        raise UsageError(f"there is no {spec.source}", hint="they are numbered from 1, without those of the boot")
    if isinstance(spec, MemorySpec) and (spec.size_mib < _BLOCK_MIB or spec.size_mib % _BLOCK_MIB):
        raise UsageError(
            f"{spec.source} has {spec.size_mib} MiB", hint=f"guests take memory in blocks of {_BLOCK_MIB} MiB"
        )
    return spec.source


def _address(spec: VsockSpec) -> str:
    """Whether another guest has it is the kernel's to say as well."""
    if spec.cid not in _GUEST_CIDS:
        raise UsageError(
            f"a guest cannot have the {spec.source}",
            hint=f"they have {_GUEST_CIDS.start} to {_GUEST_CIDS.stop - 1}",
        )
    return spec.source


def _interface(spec: NetworkSpec) -> str:
    """Whether the interface is there is the VM manager's to see, which opens it."""
    found = _status(spec.namespace)
    if not netns.is_network_namespace(spec.namespace):
        raise UsageError(
            f"source {spec.namespace} is {_kind(found)}; a network device needs a network namespace",
            hint="for example /var/run/netns/NAME or /proc/PID/ns/net",
        )
    if not netns.is_interface_name(spec.interface):
        raise UsageError(f"{spec.interface!r} cannot be the name of an interface", hint="1 to 15 letters and digits")
    if spec.mac and not _MAC.fullmatch(spec.mac):
        raise UsageError(f"{spec.mac!r} cannot be the address of one device", hint="for example 02:00:00:12:34:56")
    return f"interface {found.st_dev}:{found.st_ino}:{spec.interface}"


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
