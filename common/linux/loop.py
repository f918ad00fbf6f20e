"""Loop devices: a file as a block device, for as long as it is mounted.

Source: loop(4) and <linux/loop.h>; ``LOOP_CONFIGURE`` is Linux 5.8's. With ``LO_FLAGS_AUTOCLEAR`` the kernel frees the
device with its last user, so whoever unmounts frees it, also a `delete` that knows nothing of it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_CONTROL = "/dev/loop-control"
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LO_FLAGS_READ_ONLY = 1
_LO_FLAGS_AUTOCLEAR = 4
_CONFIG = struct.Struct("=II 52x I 176x 64x")
"""struct loop_config: descriptor, block size, struct loop_info64 of which only ``lo_flags`` is set, reserved."""


@contextmanager
def device(path: str, *, is_read_only: bool) -> Iterator[str]:
    """A block device with a file's bytes; it stays as long as it is mounted, or open as it is in the ``with``.

    Raises:
        OSError: the file or a loop device cannot be opened.
    """
    access = os.O_RDONLY if is_read_only else os.O_RDWR
    file = os.open(path, access | os.O_CLOEXEC)
    try:
        node, loop = _configured(file, access, _LO_FLAGS_AUTOCLEAR | (_LO_FLAGS_READ_ONLY if is_read_only else 0))
    finally:
        os.close(file)
    try:
        yield node
    finally:
        os.close(loop)


def _configured(file: int, access: int, flags: int) -> tuple[str, int]:
    while True:
        control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
        try:
            node = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
        finally:
            os.close(control)
        loop = os.open(node, access | os.O_CLOEXEC)
        try:
            fcntl.ioctl(loop, _LOOP_CONFIGURE, _CONFIG.pack(file, 0, flags))
        except OSError as err:
            os.close(loop)
            if err.errno != errno.EBUSY:  # another was faster
                raise
        else:
            return node, loop
