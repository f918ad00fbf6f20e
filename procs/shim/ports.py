"""Where the streams of a process are in the guest, and one use of a stream port, whatever kind of device that is on.

*Back-pressure*: a pump holds one chunk and takes the next when that one is written, so a client that does not read
stops its process, and a process that does not read stops its client.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from common.channel import HEADER, WINDOW, StreamDecoder
from common.errors import KataError

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Sequence

    from procs.shim.outlets import Outlet

    TellTaken = Callable[[int, int], Awaitable[None]]
    """Takes a stream's number and how many more bytes of it were handed on."""

READ_SIZE = 64 << 10
"""Bytes that are read at once, for which one stream holds the loop."""
_HEAD_SIZE = 4 << 10
"""Bytes that are read at the beginning of a frame that is expected to be large."""
_LARGE = 32 << 10
"""Bytes from which on it is worth while to splice them."""

FRAME_TIMEOUT_S = 2
"""How long the guest may take to accept the rest of a frame whose process has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessName:
    """How the agent calls a process; the container's own has the container's id as ``exec_id``."""

    container_id: str
    exec_id: str
    is_terminal: bool


class StreamUse(Protocol):
    """Two streams of a process that go opposite ways.

    Attributes:
        has_output: whether the guest sends on it, and so will send an end.
    """

    has_output: bool

    @property
    def stream(self) -> int:
        """The number that the agent is told."""

    def begin(self, *, is_known: bool) -> None:
        """Note that the agent knows the process, or never will."""

    async def carry(self, outlet: Outlet | None) -> None:
        """Write what the guest sends, or drop it if there is nowhere to write it, until its end or the VM's."""

    async def send(self, payload: bytes) -> None:
        """Send; an empty payload is the end."""


class Ports(Protocol):
    """Where a process gets its streams.

    Attributes:
        by_call: whether streams are calls to the agent (:mod:`procs.shim.calls`).
        tell_taken: tells the guest what was handed on, if there is something to tell.
    """

    by_call: bool
    tell_taken: TellTaken | None

    async def take(self, count: int, process: ProcessName, group: asyncio.TaskGroup) -> Sequence[StreamUse]:
        """Take as many uses, all at once or none.

        Args:
            count: how many.
            process: whose streams they are.
            group: where what is sent is sent.

        Raises:
            ExhaustedError: too many were taken for too long.
            UnavailableError: the VM is gone.
        """

    async def give_back(self, use: Any) -> None:  # noqa: ANN401 - one that the same object gave
        """Disconnect."""


class PortUse:
    """One use of a port: payload both ways, under one stream number.

    Attributes:
        stream: the number, as the agent is told it.
        has_output: whether the guest sends on it, and so will send an end.
    """

    def __init__(
        self, stream: int, sock: socket.socket, group: asyncio.TaskGroup, tell_taken: TellTaken | None = None
    ) -> None:
        self.stream = stream
        self.has_output = False
        self._socket = sock
        self._group = group
        self._decoder = StreamDecoder(stream)
        self._tell_taken = tell_taken
        self._untold = 0
        self._sending: asyncio.Task[None] | None = None

    def begin(self, *, is_known: bool) -> None:
        """Do nothing: the agent was told the number before it knows the process, and sends an end in any case."""

    async def carry(self, outlet: Outlet | None) -> None:
        """Write what the guest sends, or drop it if there is nowhere to write it, until its end or the VM's.

        Large payloads are spliced. A guest that never pauses keeps nobody waiting.
        """
        buffer = memoryview(bytearray(READ_SIZE))
        size = len(buffer)
        while not self._decoder.is_ended:
            if outlet is not None and outlet.can_splice and self._decoder.missing >= _LARGE:
                taken = await outlet.splice(self._socket, self._decoder.missing)
                if not taken and outlet.can_splice:
                    return
                self._decoder.skip(taken)
                size = _HEAD_SIZE
            else:
                received = await asyncio.get_running_loop().sock_recv_into(self._socket, buffer[:size])
                if not received:
                    return
                size = len(buffer)
                taken = await self._write(outlet, buffer[:received])
            self._note_taken(taken)
            await asyncio.sleep(0)  # neither waits while there is more: others have their turn in between

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

    async def _write(self, outlet: Outlet | None, data: memoryview) -> int:
        """Write the payload that is in what was received; return its size."""
        parts = list(self._decoder.feed(data))
        payload = parts[0] if len(parts) == 1 else b"".join(parts)
        if outlet is not None and payload:
            await outlet.write(payload)
        return len(payload)

    def _note_taken(self, size: int) -> None:
        """Tell the guest now and then, and do not wait for its answer."""
        self._untold += size
        if self._tell_taken is not None and self._untold >= WINDOW // 2:
            self._group.create_task(self._tell(self._untold))
            self._untold = 0

    async def _tell(self, size: int) -> None:
        with contextlib.suppress(KataError):  # the VM is gone
            if self._tell_taken is not None:
                await self._tell_taken(self.stream, size)

    async def _send(self, frame: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # the VM is gone, which its pidfd tells
            await asyncio.get_running_loop().sock_sendall(self._socket, frame)

    async def _sending_done(self, timeout_s: float | None) -> bool:
        if self._sending is None:
            return True
        done, _ = await asyncio.wait({self._sending}, timeout=timeout_s)
        return bool(done)
