"""A connection to the API: bytes, and descriptors that come beside them (SCM_RIGHTS, unix(7))."""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from typing import Self

_CHUNK = 1024
_MAX_FDS = 16


class Connection:
    """One connection; a context manager that closes it, and the descriptors that nobody took."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._rest = b""
        self._fds: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        for fd in self.take_fds():
            os.close(fd)

    def take_fds(self) -> list[int]:
        """Return the descriptors that have come since; they are the caller's now."""
        fds, self._fds = self._fds, []
        return fds

    async def read_until(self, mark: bytes) -> bytes:
        """Return what comes up to a mark and with it.

        Raises:
            EOFError: the connection ends before.
        """
        while mark not in self._rest:
            await self._receive()
        return self._take(self._rest.index(mark) + len(mark))

    async def read_exactly(self, size: int) -> bytes:
        """Return the next so many bytes. Raises as :meth:`read_until` does."""
        while len(self._rest) < size:
            await self._receive()
        return self._take(size)

    async def write(self, data: bytes) -> None:
        """Send bytes; whoever has gone meanwhile goes without."""
        with suppress(OSError):
            await asyncio.get_running_loop().sock_sendall(self._socket, data)

    def _take(self, size: int) -> bytes:
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    async def _receive(self) -> None:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(self._socket, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._socket)
        data, fds, _, _ = socket.recv_fds(self._socket, _CHUNK, _MAX_FDS, socket.MSG_CMSG_CLOEXEC)
        self._fds += fds
        if not data:
            raise EOFError
        self._rest += data
