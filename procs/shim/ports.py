"""One use of a stream port of the guest, whatever kind of device the port is on.

*Back-pressure*: a pump holds one chunk and takes the next when that one is written, so a client that does not read
stops its process, and a process that does not read stops its client.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Protocol

from common.channel import HEADER, MAX_CHUNK, StreamDecoder

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator

FRAME_TIMEOUT_S = 2
"""How long the guest may take to accept the rest of a frame whose process has ended."""


class Ports(Protocol):
    """Where a process gets its streams."""

    async def take(self, count: int, group: asyncio.TaskGroup) -> list[PortUse]:
        """Connect to as many ports, each under a stream number that was never used in this VM: all at once or none.

        Args:
            count: how many.
            group: where frames are sent.

        Raises:
            ExhaustedError: too many were taken for too long.
            UnavailableError: the VM is gone.
        """

    async def give_back(self, use: PortUse) -> None:
        """Disconnect."""


class PortUse:
    """One use of a port: payload both ways, under one stream number.

    Attributes:
        stream: the number, as the agent is told it.
        has_output: whether the guest sends on it, and so will send an end.
    """

    def __init__(self, stream: int, sock: socket.socket, group: asyncio.TaskGroup) -> None:
        self.stream = stream
        self.has_output = False
        self._socket = sock
        self._group = group
        self._decoder = StreamDecoder(stream)
        self._sending: asyncio.Task[None] | None = None

    async def payloads(self) -> AsyncIterator[bytes]:
        """Yield what the guest sends, until its end or the VM's; a guest that never pauses keeps nobody waiting."""
        loop = asyncio.get_running_loop()
        while not self._decoder.is_ended:
            data = await loop.sock_recv(self._socket, HEADER.size + MAX_CHUNK)
            if not data:
                return
            if payload := b"".join(self._decoder.feed(data)):
                yield payload
            await asyncio.sleep(0)  # sock_recv does not wait while there is more: others have their turn in between

    async def send(self, payload: bytes) -> None:
        """Send one frame; an empty payload is the end. When cancelled, the frame is still sent."""
        self._sending = self._group.create_task(self._send(HEADER.pack(self.stream, len(payload)) + payload))
        await self._sending_done(None)

    async def close(self) -> bool:
        """Disconnect from the port; return whether both directions were at their end or between frames."""
        is_whole = await self._sending_done(FRAME_TIMEOUT_S)
        if self._sending is not None:
            self._sending.cancel()
            await asyncio.wait({self._sending})
        self._socket.close()
        return is_whole and (self._decoder.is_ended or not self.has_output)

    async def _send(self, frame: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # the VM is gone, which its pidfd tells
            await asyncio.get_running_loop().sock_sendall(self._socket, frame)

    async def _sending_done(self, timeout_s: float | None) -> bool:
        if self._sending is None:
            return True
        done, _ = await asyncio.wait({self._sending}, timeout=timeout_s)
        return bool(done)
