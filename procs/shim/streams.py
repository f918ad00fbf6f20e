"""Standard streams between FIFOs of the host and stream ports of the VM.

A VM has a fixed number of ports (:mod:`common.channel`). A process uses one for standard input and output, which go
opposite ways, and another for standard error; with a terminal, which has no standard error, only the first.

*Back-pressure*: a pump holds one chunk and takes the next when that one is written, so a client that does not read
stops its process, and a process that does not read stops its client.

*When a port may be used again*: once the guest's end frame has come and no frame of ours is half written. Otherwise
bytes of this use would reach the next one; such a port stays taken until the VM ends. A frame whose process has ended
is therefore still written to its end, for which the guest has a moment.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from common import log
from common.channel import HEADER, MAX_CHUNK, ChannelError, StreamDecoder, port_of, stream_number
from common.errors import ExhaustedError
from procs.shim import fifos, outlets, unix

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncIterator, Sequence

    from procs.shim.tasks import Stdio


PORTS_TIMEOUT_S = 30
"""How long a process waits for ports: many short ones may begin at once, a few long ones must not keep all others."""

FRAME_TIMEOUT_S = 2
"""How long the guest may take to accept the rest of a frame whose process has ended."""


class StreamPorts:
    """Which ports of a VM are free. The one that rested longest is taken first.

    Args:
        sockets: where to connect to each port.
        wait_s: how long a process waits for ports that others have, in seconds.
    """

    def __init__(self, sockets: Sequence[str], wait_s: float = PORTS_TIMEOUT_S) -> None:
        self._sockets = sockets
        self._wait_s = wait_s
        self._free = deque(range(len(sockets)))
        self._generation = 0
        self._changed = asyncio.Condition()

    async def take(self, count: int, group: asyncio.TaskGroup) -> list[PortUse]:
        """Connect to free ports, each under a stream number that was never used in this VM.

        All at once or none: two processes that hold one each and want another would wait for one another.

        Args:
            count: how many.
            group: where frames are sent.

        Raises:
            ExhaustedError: too many were taken for too long.
            UnavailableError: the VM is gone.
        """
        try:
            async with asyncio.timeout(self._wait_s), self._changed:
                await self._changed.wait_for(lambda: len(self._free) >= count)
                return [self._connect(group) for _ in range(count)]
        except TimeoutError as err:
            raise ExhaustedError(
                f"all {len(self._sockets)} stream ports of the VM are in use",
                hint="a process takes one with a terminal and two without; end one first",
            ) from err

    def _connect(self, group: asyncio.TaskGroup) -> PortUse:
        port = self._free.popleft()
        self._generation += 1
        return PortUse(stream_number(self._generation, port), unix.connect(self._sockets[port]), group)

    async def give_back(self, use: PortUse) -> None:
        """Disconnect; the port is free again if nothing of this use can reach the next."""
        if await use.close():
            async with self._changed:
                self._free.append(port_of(use.stream))
                self._changed.notify_all()
        else:
            log.get().warning("stream port stays taken", port=port_of(use.stream))


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


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamNumbers:
    """What the agent is told: stream numbers, 0 for a stream that the process does not have."""

    stdin: int = 0
    stdout: int = 0
    stderr: int = 0


class Streams:
    """The standard streams of one process.

    Output FIFOs and ports are opened by :meth:`connect`, before the guest may use them. The input FIFO is opened when
    the process runs, and not before: a client's first write waits for that, and so its CloseIO cannot come before the
    client knows the process (ctr would lose it).
    """

    def __init__(self, stdio: Stdio, owner: outlets.Owner, group: asyncio.TaskGroup) -> None:
        self._owner = owner
        self._stdio = stdio = replace(stdio, stderr="") if stdio.is_terminal else stdio
        outlets.check(stdio)
        if stdio.stdin:
            fifos.check(stdio.stdin)
        self._group = group
        self._is_input_over = False
        self._inlet: fifos.Inlet | None = None
        self._outlets = outlets.Outlets()
        self._ports: StreamPorts | None = None
        self._main: PortUse | None = None
        self._error: PortUse | None = None
        self._finishing: asyncio.Task[None] | None = None

    async def connect(self, ports: StreamPorts) -> StreamNumbers:
        """Open where output goes, and as many ports as the process needs.

        Raises:
            ExhaustedError: there are not enough.
            KataError: output cannot be opened.
        """
        self._ports = ports
        self._outlets = await outlets.open_outlets(self._stdio, self._owner)
        stdio = self._stdio
        has_main, has_error = bool(stdio.stdin or stdio.stdout or stdio.is_terminal), bool(stdio.stderr)
        uses = await ports.take(has_main + has_error, self._group)
        self._main = uses.pop(0) if has_main else None
        self._error = uses.pop() if has_error else None
        return self._numbers()

    async def pump_output(self) -> None:
        """Carry output to the clients until the guest has ended every stream, or the VM is gone."""
        async with asyncio.TaskGroup() as group:
            for use, outlet in ((self._main, self._outlets.stdout), (self._error, self._outlets.stderr)):
                if use is not None and use.has_output:
                    group.create_task(_pump_out(use, outlet))

    async def pump_input(self) -> None:
        """Carry input to the guest until it ends."""
        if not self._stdio.stdin or self._main is None:
            return
        self._inlet = fifos.Inlet(self._stdio.stdin)
        if self._is_input_over:
            self._inlet.end()
        while data := await self._inlet.read(MAX_CHUNK):
            await self._main.send(data)
        await self._main.send(b"")

    def end_input(self) -> None:
        """Let standard input end (CloseIO); what is in the FIFO still arrives. It may be asked before the start."""
        self._is_input_over = True
        if self._inlet is not None:
            self._inlet.end()

    def drop_output(self) -> None:
        """Drop the rest of the output: nobody reads it."""
        self._outlets.drop()

    def close(self) -> None:
        """Give up ports and the host's ends. The pumps must have ended."""
        self._close_ends()
        for use in (self._main, self._error):
            if use is not None and self._ports is not None:
                self._group.create_task(self._ports.give_back(use))
        self._main = self._error = None

    async def finish(self) -> None:
        """Wait until whoever logs the output has done so, but not for long."""
        if self._finishing is not None:
            await asyncio.wait({self._finishing})

    def _close_ends(self) -> None:
        """Give up what is the host's: clients see the end of output."""
        if self._inlet is not None:
            self._inlet.close()
            self._inlet = None
        self._outlets.close()
        if self._outlets.logger is not None:
            self._finishing = self._group.create_task(self._outlets.finish())
        self._outlets = outlets.Outlets()

    def _numbers(self) -> StreamNumbers:
        """Name the streams for the guest, which from then on owes an end for each output."""
        stdio = self._stdio
        numbers = StreamNumbers(
            stdin=self._main.stream if self._main and (stdio.stdin or stdio.is_terminal) else 0,
            stdout=self._main.stream if self._main and (stdio.stdout or stdio.is_terminal) else 0,
            stderr=self._error.stream if self._error else 0,
        )
        for use, number in ((self._main, numbers.stdout), (self._error, numbers.stderr)):
            if use is not None:
                use.has_output = number != 0
        return numbers


async def _pump_out(use: PortUse, outlet: outlets.Outlet | None) -> None:
    """Carry one output stream; without a FIFO (a terminal that nobody looks at) its bytes are dropped."""
    try:
        async for payload in use.payloads():
            if outlet is not None:
                await outlet.write(payload)
    except ConnectionError:
        pass  # the VM is gone, which its pidfd tells
    except ChannelError as err:
        log.get().warning("output of the guest dropped", stream=use.stream, error=str(err))
