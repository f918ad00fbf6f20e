"""One process of the guest, as the host sees it: its state, its streams, its end.

The order in which things are told is the point of this module. A start is published before an exit, however short the
process lived; output has reached its FIFO before the exit is known; the exit of a container's own process is published
after those of its execs, which died with it.
"""

from __future__ import annotations

import asyncio
import time
from signal import SIGKILL
from typing import TYPE_CHECKING

from common import log
from common.errors import KataError, NotFoundError, UnavailableError
from common.protocols.events import TaskExit
from common.protocols.task import Timestamp
from procs.shim.outlets import Owner
from procs.shim.ports import ProcessName
from procs.shim.streams import Streams
from procs.shim.tasks import UNKNOWN_STATUS, Ask, Process, State

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from common.protocols.events import TaskEvent
    from procs.shim.events import EventSender
    from procs.shim.sandbox import Guest
    from procs.shim.streams import StreamNumbers

KILLED = 128 + SIGKILL
DRAIN_TIMEOUT_S = 10
"""How long a client may take to read the rest of the output before the exit is told without it (runc's figure)."""

LAST_TIMEOUT_S = 5
"""How long the guest may take, after that, to tell the end of a container that was killed."""

REFUSED_TIMEOUT_S = 1
"""How long the guest may take to end the streams of a process that it could not start."""

_log = log.get()


class GuestProcess:
    """Runs one :class:`procs.shim.tasks.Process` in the guest.

    Attributes:
        process: its record.
        exited: set when its end is known and told.
    """

    def __init__(self, process: Process, guest: Guest, events: EventSender, group: asyncio.TaskGroup) -> None:
        self.process = process
        self.exited = asyncio.Event()
        self._guest = guest
        self._events = events
        self._group = group
        owner = Owner(
            id=process.exec_id or process.container_id, namespace=events.namespace, sandbox_id=guest.sandbox_id
        )
        self._streams = Streams(process.stdio, owner, group)
        self._output: asyncio.Task[None] | None = None
        self._input: asyncio.Task[None] | None = None
        self._start_is_settled = asyncio.Event()
        self._start_is_settled.set()

    async def connect(self) -> StreamNumbers:
        """Connect the streams to ports of the VM and begin to carry output.

        Raises:
            KataError: not enough ports are free, or where output goes cannot be opened.
        """
        process = self.process
        name = ProcessName(
            container_id=process.container_id,
            exec_id=process.exec_id or process.container_id,
            is_terminal=process.stdio.is_terminal,
        )
        numbers = await self._streams.connect(self._guest.ports, name)
        self._output = self._group.create_task(self._streams.pump_output())
        return numbers

    def note_known(self) -> None:
        """Note that the guest knows the process."""
        self._streams.begin(is_known=True)

    async def start(self, begin: Callable[[], Awaitable[None]], news: TaskEvent) -> None:
        """Start it.

        Args:
            begin: asks the guest.
            news: the event that says so.

        Raises:
            KataError: its state does not allow it, or the guest could not; then it counts as ended.
        """
        await self._start_is_settled.wait()
        self.process.check(Ask.START)
        self.process.move(State.STARTING)
        self._start_is_settled.clear()
        try:
            await begin()
        except BaseException:
            self._streams.begin(is_known=False)
            await self._stop_streams(REFUSED_TIMEOUT_S)
            self._end(UNKNOWN_STATUS)
            raise
        else:
            self.note_known()
            self.process.move(State.RUNNING)
            self._events.publish(news)
            self._input = self._group.create_task(self._streams.pump_input())
        finally:
            self._start_is_settled.set()

    async def follow(self, others: Callable[[], Iterable[GuestProcess]] = tuple) -> None:
        """Wait for its end, in the guest or with it, and tell.

        Args:
            others: processes whose ends are told first.
        """
        status = await self._status()
        await self._start_is_settled.wait()
        await self._stop_streams(DRAIN_TIMEOUT_S)
        for other in others():
            self._group.create_task(other.let_go())
            await other.exited.wait()
        if self.process.state is not State.STOPPED:
            self._end(status)
            self._publish_exit()

    async def wait_settled(self) -> None:
        """Wait until a start that is under way has succeeded or failed."""
        await self._start_is_settled.wait()

    def lose(self) -> None:
        """Note that the VM ended before it was started."""
        if self.process.state is State.CREATED:
            self._end(KILLED)

    async def kill(self, signal: int, *, is_all: bool) -> None:
        """Send a signal to it, or to every process of its container. One that is starting gets it when it has.

        Raises:
            NotFoundError: it has ended.
            StateError: it is an exec that was not started.
        """
        await self._start_is_settled.wait()
        process = self.process
        process.check(Ask.KILL)
        target = "" if is_all and not process.exec_id else process.exec_id or process.container_id
        if signal == SIGKILL:
            self._group.create_task(self.let_go())
        try:
            await self._guest.agent.signal_process(process.container_id, target, signal)
        except UnavailableError as err:
            if signal != SIGKILL:
                raise NotFoundError("process already finished") from err

    async def let_go(self) -> None:
        """See to it that what was killed ends, though nobody reads its output, and though its guest hangs.

        The guest tells the end of a process after its output. If it does not tell the end of the container's own
        process, the VM ends: nothing in a guest may keep a container from being killed.
        """
        if await self._ends_within(DRAIN_TIMEOUT_S):
            return
        _log.warning("output dropped, nobody reads it", exec_id=self.process.exec_id)
        self._streams.drop_output()
        if self.process.exec_id or await self._ends_within(LAST_TIMEOUT_S):
            return
        _log.warning("the guest does not end a process that was killed, ending the VM")
        await self._guest.end()

    async def _ends_within(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                return await self.exited.wait()
        except TimeoutError:
            return False

    async def resize(self, *, rows: int, columns: int) -> None:
        """Set the size of its terminal; without one, or when it does not run, there is nothing to set."""
        process = self.process
        if process.stdio.is_terminal and process.state is State.RUNNING:
            exec_id = process.exec_id or process.container_id
            await self._guest.agent.resize(process.container_id, exec_id, rows=rows, columns=columns)

    def end_input(self) -> None:
        """Let standard input end (CloseIO)."""
        self._streams.end_input()

    async def discard(self) -> None:
        """Give up the streams of a process that is forgotten; a logger has had its time then."""
        await self._stop_streams(0)
        await self._streams.finish()

    async def _status(self) -> int:
        """Return the exit status: the guest's word, or 137 if the VM ended."""
        process = self.process
        if self._guest.ports.by_call:
            await self._read_out()
        try:
            return await self._guest.agent.wait_process(process.container_id, process.exec_id or process.container_id)
        except UnavailableError:
            await self._guest.is_gone.wait()
            return KILLED
        except KataError as err:
            _log.error("exit status not known", exec_id=process.exec_id, error=str(err))
            return UNKNOWN_STATUS

    async def _read_out(self) -> None:
        """Wait until the output has ended, or the VM."""
        gone = self._group.create_task(self._guest.is_gone.wait())
        await asyncio.wait({gone} | ({self._output} if self._output else set()), return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()

    async def _stop_streams(self, drain_s: float) -> None:
        """Wait until the output is with the client, then give up the streams."""
        if self._output is not None:
            _, late = await asyncio.wait({self._output}, timeout=drain_s)
            if late and drain_s:
                _log.warning("output dropped, nobody reads it", exec_id=self.process.exec_id)
        for pump in (self._output, self._input):
            if pump is not None:
                pump.cancel()
                await asyncio.wait({pump})
        self._streams.close()

    def _end(self, status: int) -> None:
        self.process.exited(status, time.time_ns())
        _log.info("process ended", exec_id=self.process.exec_id, status=status)
        self.exited.set()

    def _publish_exit(self) -> None:
        process = self.process
        self._events.publish(
            TaskExit(
                container_id=process.container_id,
                id=process.exec_id or process.container_id,
                pid=self._guest.pid,
                exit_status=process.exit_status,
                exited_at=Timestamp.from_ns(process.exited_at_ns),
            )
        )
