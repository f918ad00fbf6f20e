"""What VMMs and virtiofsd print, bounded.

A guest can make both complain for ever: QEMU writes a line for each malformed message on virtio-serial's control
queue. So their output goes into a FIFO and not into a file on the run directory's tmpfs. It is opened for reading and
writing, so it has a reader whether this manager runs or not, and non-blocking: when its 64 KiB are full, further lines
are dropped and nobody waits (pipe(7), fifo(7)). What is in it stays as long as the process or this manager holds it
open, so the last words of a process can be read after its end, and a manager that starts again finds them by name.
"""

from __future__ import annotations

import asyncio
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING

from common import text
from procs.vmm_manager.drivers import TAIL_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_CAPACITY = 64 << 10


class Output:
    """The output of one process; closed by whoever made it.

    Attributes:
        fd: to be the process's standard output and error.
    """

    def __init__(self, path: Path) -> None:
        with suppress(FileExistsError):
            os.mkfifo(path, 0o600)
        self.fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        self._kept = b""
        self._take: Callable[[bytes], object] = len
        self._is_followed = False

    def follow(self, take: Callable[[bytes], object] = len) -> None:
        """Read what is printed as it comes: of a process that prints much the last words count, not the first.

        Args:
            take: is given all of it, in pieces.
        """
        self._take = take
        if stat.S_ISFIFO(os.fstat(self.fd).st_mode):  # in a jail somebody else may have put something in its place
            asyncio.get_running_loop().add_reader(self.fd, self.tail)
            self._is_followed = True

    def tail(self) -> str:
        """Return the last of what was printed so far, made safe to show."""
        if self.fd >= 0:
            with suppress(BlockingIOError):  # nothing new
                printed = os.read(self.fd, _CAPACITY)
                self._kept = (self._kept + printed)[-TAIL_SIZE:]
                self._take(printed)
        return readable(self._kept)

    def close(self) -> None:
        """Stop listening; what was printed is still known."""
        self.tail()
        if self._is_followed:
            asyncio.get_running_loop().remove_reader(self.fd)
        os.close(self.fd)
        self.fd = -1


def readable(data: bytes) -> str:
    """Return the tail of what a guest had a hand in as text that cannot command a terminal."""
    return text.readable(data[-TAIL_SIZE:].decode("utf-8", "replace").replace("\r\n", "\n"))
