"""The standard streams of a process: between FIFOs, files or programs of the host and stream ports of the guest."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from common import log
from common.channel import BY_CALL, MAX_CHUNK, NO_STREAM, ChannelError
from procs.shim import fifos, outlets

if TYPE_CHECKING:
    from procs.shim.ports import Ports, ProcessName, StreamUse
    from procs.shim.tasks import Stdio


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamNumbers:
    """What the agent is told: stream numbers, or ``BY_CALL``, or ``NO_STREAM``."""

    stdin: int
    stdout: int
    stderr: int


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
        self._main: StreamUse | None = None
        self._error: StreamUse | None = None
        self._finishing: asyncio.Task[None] | None = None

    async def connect(self, ports: Ports, process: ProcessName) -> StreamNumbers:
        """Open where output goes, and as many ports as the process needs.

        Raises:
            ExhaustedError: there are not enough.
            KataError: output cannot be opened.
        """
        self._ports = ports
        self._outlets = await outlets.open_outlets(self._stdio, self._owner)
        stdio = self._stdio
        has_output = ports.by_call or bool(stdio.stdout or stdio.is_terminal)
        has_main = has_output or bool(stdio.stdin)
        has_error = not stdio.is_terminal if ports.by_call else bool(stdio.stderr)
        uses = list(await ports.take(has_main + has_error, process, self._group))
        if has_main:
            self._main = uses.pop(0)
            self._main.has_output = has_output
        if has_error:
            self._error = uses.pop()
            self._error.has_output = True
        return self._numbers()

    def begin(self, *, is_known: bool) -> None:
        """Note that the agent knows the process, or never will. The first word counts."""
        for use in (self._main, self._error):
            if use is not None:
                use.begin(is_known=is_known)

    async def pump_output(self) -> None:
        """Carry output to the clients until the guest has ended every stream, or the VM is gone."""
        async with asyncio.TaskGroup() as group:
            for use, outlet in ((self._main, self._outlets.stdout), (self._error, self._outlets.stderr)):
                if use is not None and use.has_output:
                    group.create_task(_pump_out(use, outlet))

    async def pump_input(self) -> None:
        """Carry input to the guest until it ends."""
        if self._main is None:
            return
        if not self._stdio.stdin:
            if self._ports is not None and self._ports.by_call:
                await self._main.send(b"")
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
        none = BY_CALL if self._ports is not None and self._ports.by_call else NO_STREAM
        main, error = self._main, self._error
        has_input = self._stdio.stdin or self._stdio.is_terminal
        return StreamNumbers(
            stdin=main.stream if main and has_input else none,
            stdout=main.stream if main and main.has_output else none,
            stderr=error.stream if error else none,
        )


async def _pump_out(use: StreamUse, outlet: outlets.Outlet | None) -> None:
    """Carry one output stream; without a FIFO (a terminal that nobody looks at) its bytes are dropped."""
    try:
        await use.carry(outlet)
    except ConnectionError:
        pass  # the VM is gone, which its pidfd tells
    except ChannelError as err:
        log.get().warning("output of the guest dropped", stream=use.stream, error=str(err))
