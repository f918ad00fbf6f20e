"""Standard streams by calls to the agent, for agents that have no stream ports: upstream's.

Such an agent has a pipe or a terminal for every process, whoever reads it. Three things follow. Output is read though
nobody wants it, since a process whose pipe is full stands still. Input that a process does not have is closed. And a
process's end is asked for after its output has ended: whoever hears the end finds the pipes closed.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from common import log
from common.channel import BY_CALL
from common.errors import KataError

if TYPE_CHECKING:
    from procs.shim.agent import Agent
    from procs.shim.outlets import Outlet
    from procs.shim.ports import ProcessName, StreamUse, TellTaken

_READERS = ("ReadStdout", "ReadStderr")


class CallPorts:
    """See :class:`procs.shim.ports.Ports`."""

    by_call = True
    tell_taken: TellTaken | None = None
    """Unused: each call asks for more."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def take(self, count: int, process: ProcessName, _group: asyncio.TaskGroup) -> list[StreamUse]:
        """Return standard input and output, and with a second one standard error. Nothing can be exhausted."""
        return [CallUse(self._agent, process, reader) for reader in _READERS[:count]]

    async def give_back(self, use: StreamUse) -> None:
        """Do nothing: the agent forgets the streams with their process."""


class CallUse:
    """The streams of one process; see :class:`procs.shim.ports.StreamUse`."""

    stream = BY_CALL

    def __init__(self, agent: Agent, process: ProcessName, reader: str) -> None:
        self.has_output = True
        self._agent = agent
        self._process = process
        self._reader = reader
        self._is_settled = asyncio.Event()
        self._is_known = False

    def begin(self, *, is_known: bool) -> None:
        """Note that the agent knows the process, or never will. The first word counts."""
        self._is_known = self._is_known or (is_known and not self._is_settled.is_set())
        self._is_settled.set()

    async def carry(self, outlet: Outlet | None) -> None:
        """Write what the process writes, from when the agent knows it until the agent says that there is no more."""
        await self._is_settled.wait()
        while self._is_known:
            try:
                data = await self._agent.read_stream(self._reader, self._process)
            except KataError as err:  # how upstream's agent says the end; or the VM is gone, which its pidfd tells
                log.get().debug("output ended", process=self._process.exec_id, reason=str(err))
                return
            if not data:
                return
            if outlet is not None:
                await outlet.write(data)

    async def send(self, payload: bytes) -> None:
        """Write; an empty payload is the end. What a process does not take any more is dropped."""
        try:
            if payload:
                await self._agent.write_stdin(self._process, payload)
            elif not self._process.is_terminal:  # the end of a terminal would be the end of its process
                await self._agent.close_stdin(self._process)
        except KataError as err:
            log.get().debug("input dropped", process=self._process.exec_id, reason=str(err))
