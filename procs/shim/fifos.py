"""FIFOs that containerd's client made for standard streams.

A FIFO has an end of file as soon as nobody holds its other end, and clients come and go: ``ctr task attach`` opens what
``ctr run --detach`` closed. So the shim holds both ends itself: an output is opened for reading too
(:mod:`procs.shim.outlets`), and an :class:`Inlet` keeps a writer until CloseIO.
"""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path

from common.errors import NotFoundError, UsageError


class Inlet:
    """Standard input: what clients write into its FIFO."""

    def __init__(self, path: str) -> None:
        self._fd = open_fifo(path, os.O_RDONLY)
        self._keeper: int | None = open_fifo(path, os.O_WRONLY)

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


def check(path: str) -> None:
    """Refuse what is no FIFO.

    Raises:
        NotFoundError: there is nothing.
        UsageError: it is something else.
    """
    try:
        mode = Path(path).stat().st_mode
    except FileNotFoundError as err:
        raise NotFoundError(f"standard stream {path} does not exist") from err
    if not stat.S_ISFIFO(mode):
        raise UsageError(f"standard stream {path} is not a FIFO")


def open_fifo(path: str, mode: int) -> int:
    """Open a FIFO without waiting for its other end.

    Raises:
        KataError: it is none.
    """
    check(path)
    return os.open(path, mode | os.O_NONBLOCK | os.O_CLOEXEC)
