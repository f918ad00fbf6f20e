"""The host's end of standard streams: FIFOs that containerd's client made.

A FIFO has an end of file as soon as nobody holds its other end, and clients come and go: ``ctr task attach`` opens what
``ctr run --detach`` closed. So the shim holds both ends itself: an :class:`Outlet` is open for reading too, and an
:class:`Inlet` keeps a writer until CloseIO. Nothing here blocks: a client that does not read or write stops one stream.
"""

from __future__ import annotations

import asyncio
import os
import stat
from typing import TYPE_CHECKING

from common.errors import NotFoundError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable


class Inlet:
    """Standard input: what clients write into its FIFO."""

    def __init__(self, path: str) -> None:
        self._fd = _open(path, os.O_RDONLY)
        self._keeper: int | None = _open(path, os.O_WRONLY)

    async def read(self, size: int) -> bytes:
        """Return at most ``size`` bytes as soon as there are any; nothing means that standard input has ended."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                return os.read(self._fd, size)
            except BlockingIOError:
                await _wait(self._fd, loop.add_reader, loop.remove_reader)

    def end(self) -> None:
        """Let standard input end when its FIFO is empty and no client holds it."""
        if self._keeper is not None:
            os.close(self._keeper)
            self._keeper = None

    def close(self) -> None:
        """Give up the FIFO."""
        self.end()
        os.close(self._fd)


class Outlet:
    """Standard output or error: what clients read from its FIFO."""

    def __init__(self, path: str) -> None:
        self._fd = _open(path, os.O_RDWR)

    async def write(self, data: bytes) -> None:
        """Write all of ``data``, at the pace of the client that reads."""
        loop = asyncio.get_running_loop()
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._fd, left) :]
            except BlockingIOError:
                await _wait(self._fd, loop.add_writer, loop.remove_writer)

    def close(self) -> None:
        """Give up the FIFO: its reader sees the end once it has read what is in it."""
        os.close(self._fd)


def _open(path: str, mode: int) -> int:
    """Open a FIFO without waiting for its other end.

    Raises:
        UnsupportedError: a client asks for another kind of stream, such as ``binary://``.
        NotFoundError: there is nothing.
        UsageError: it is no FIFO.
    """
    if "://" in path:
        raise UnsupportedError(f"standard stream {path} is not supported", hint="only FIFOs are; omit --log-uri")
    try:
        fd = os.open(path, mode | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as err:
        raise NotFoundError(f"standard stream {path} does not exist") from err
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        os.close(fd)
        raise UsageError(f"standard stream {path} is not a FIFO")
    return fd


async def _wait(fd: int, add: Callable[..., None], remove: Callable[[int], bool]) -> None:
    """Wait until a descriptor is ready; ``add`` and ``remove`` are the loop's for reading or for writing."""
    ready = asyncio.Event()
    add(fd, ready.set)
    try:
        await ready.wait()
    finally:
        remove(fd)
