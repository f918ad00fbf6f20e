"""The standard streams of a process: between FIFOs, files or programs of the host and stream ports of the guest."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from common import log
from common.channel import MAX_CHUNK, ChannelError
from procs.shim import fifos, outlets

if TYPE_CHECKING:
    from procs.shim.ports import Ports, PortUse
    from procs.shim.tasks import Stdio


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
        self._ports: Ports | None = None
        self._main: PortUse | None = None
        self._error: PortUse | None = None
        self._finishing: asyncio.Task[None] | None = None

    async def connect(self, ports: Ports) -> StreamNumbers:
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
