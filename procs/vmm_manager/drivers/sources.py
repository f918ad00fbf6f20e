"""The host's files that VMs get as disks or memory: looked at before a hypervisor is, whose words help less."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from common.errors import NotFoundError, UsageError

_SECTOR_SIZE = 512


def is_block_device(source: str) -> bool:
    """Return whether a disk's source is a block device; otherwise it is a regular file.

    Raises:
        NotFoundError: there is no such file.
        UsageError: it is no disk.
    """
    if not source.startswith("/"):
        raise UsageError(f"disk {source!r} is not an absolute path")
    try:
        status = Path(source).stat()
    except FileNotFoundError as err:
        raise NotFoundError(f"disk {source} does not exist") from err
    is_device = stat.S_ISBLK(status.st_mode)
    if not is_device and not stat.S_ISREG(status.st_mode):
        raise UsageError(f"disk {source} is neither a regular file nor a block device")
    size = _device_size(status.st_rdev) if is_device else status.st_size
    if size < _SECTOR_SIZE:
        raise UsageError(f"disk {source} has {size} bytes, not even a sector")
    return is_device


def file_size(source: str) -> int:
    """Return the size of a file that is to be mapped, in bytes.

    Raises:
        NotFoundError: there is no such file; a hypervisor might make one.
    """
    try:
        return Path(source).stat().st_size
    except FileNotFoundError as err:
        raise NotFoundError(f"{source} does not exist") from err


def _device_size(device: int) -> int:
    """Return a block device's size in bytes, without opening it (Documentation/ABI/stable/sysfs-block of Linux)."""
    sectors = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/size").read_text()
    return int(sectors) * _SECTOR_SIZE
