"""The host's end of standard streams: FIFOs that containerd's client made.

A FIFO has an end of file as soon as nobody holds its other end, and clients come and go: ``ctr task attach`` opens what
``ctr run --detach`` closed. So the shim holds both ends itself: an :class:`Outlet` is open for reading too, and an
:class:`Inlet` keeps a writer until CloseIO. Nothing here blocks: a client that does not read or write stops one stream.
"""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

from common.errors import NotFoundError, UnsupportedError, UsageError


class Inlet:
    """Standard input: what clients write into its FIFO."""

    def __init__(self, path: str) -> None:
        self._fd = _open(path, os.O_RDONLY)
        self._keeper: int | None = _open(path, os.O_WRONLY)

    async def read(self, size: int) -> bytes:
        """Return at most ``size`` bytes as soon as there are any; nothing means that standard input has ended."""
        while True:
            try:
                return os.read(self._fd, size)
            except BlockingIOError:
                await self._wait_readable()

    def end(self) -> None:
        """Let standard input end when its FIFO is empty and no client holds it."""
        if self._keeper is not None:
            os.close(self._keeper)
            self._keeper = None

    def close(self) -> None:
        """Give up the FIFO."""
        self.end()
        os.close(self._fd)

    async def _wait_readable(self) -> None:
        loop = asyncio.get_running_loop()
        has_data = asyncio.Event()
        loop.add_reader(self._fd, has_data.set)
        try:
            await has_data.wait()
        finally:
            loop.remove_reader(self._fd)


class Outlet:
    """Standard output or error: what clients read from its FIFO."""

    def __init__(self, path: str) -> None:
        self._fd = _open(path, os.O_RDWR)
        self._may_go_on = asyncio.Event()
        self._is_dropping = False

    async def write(self, data: bytes) -> None:
        """Write all of ``data``, at the pace of the client that reads."""
        left = memoryview(data)
        while left and not self._is_dropping:
            try:
                left = left[os.write(self._fd, left) :]
            except BlockingIOError:
                await self._wait_writable()

    def drop(self) -> None:
        """Drop what is still to be written, now and from now on: nobody reads it."""
        self._is_dropping = True
        self._may_go_on.set()

    def close(self) -> None:
        """Give up the FIFO: its reader sees the end once it has read what is in it."""
        os.close(self._fd)

    async def _wait_writable(self) -> None:
        loop = asyncio.get_running_loop()
        self._may_go_on.clear()
        loop.add_writer(self._fd, self._may_go_on.set)
        try:
            await self._may_go_on.wait()
        finally:
            loop.remove_writer(self._fd)


def check(path: str) -> None:
    """Refuse a standard stream that is not what this module can open.

    Raises:
        UnsupportedError: a client asks for another kind of stream, such as ``binary://``.
        NotFoundError: there is nothing.
        UsageError: it is no FIFO.
    """
    if "://" in path:
        raise UnsupportedError(f"standard stream {path} is not supported", hint="only FIFOs are; omit --log-uri")
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError as err:
        raise NotFoundError(f"standard stream {path} does not exist") from err
    if not stat.S_ISFIFO(mode):
        raise UsageError(f"standard stream {path} is not a FIFO")


def _open(path: str, mode: int) -> int:
    """Open a FIFO without waiting for its other end."""
    check(path)
    return os.open(path, mode | os.O_NONBLOCK | os.O_CLOEXEC)
