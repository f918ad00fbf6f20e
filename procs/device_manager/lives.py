"""Every device's life as it is lived: each step is taken, recorded, and what it calls for is begun.

:meth:`Lives.begin` is the one way by which anything is set in motion. It does not wait, so a step and all that it
begins are one moment: commands are queued, timers started, those who wait are told, events published. What a command
brings comes back as the next event (:meth:`Lives.happen`). Nothing depends on who began it: after our own death the
successor finds the rows and resumes them.

A row is *in doubt* when it may not be true: it is a predecessor's, or the outcome of a call is not known, or events may
have been missed. What is in doubt is made sure before a sandbox is given anything new.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from typing import TYPE_CHECKING

from common import log
from common.errors import KataError
from common.services.device import DEVICE_LOST, DEVICE_QUARANTINED
from common.trace import reach
from procs.device_manager.commands import ANSWERS, Command, Commands, same
from procs.device_manager.rules import RULES, again_after_s
from procs.device_manager.sources import examine
from procs.device_manager.states import USABLE, Action, Event, State
from procs.device_manager.table import names

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from common.bus.client import BusClient
    from common.bus.events import Publisher
    from common.services.device import Device, Holder
    from common.services.vmm import DeviceSpec, PresentDevice
    from common.workers import Workers
    from procs.device_manager.rules import Rule
    from procs.device_manager.table import Table, Taken

REMOVAL_TIMEOUT_S = 15.0
"""How long a guest may take to let a device go."""

_DOUBTS = frozenset({Event.RESUMED, Event.LOST_ANSWER, Event.UNANSWERED})
_FACTS = frozenset({Event.ADDED, Event.ACCEPTED, Event.REFUSED, Event.PRESENT})
_DUE = {Action.WATCH: (State.DETACHING, Event.OVERDUE), Action.COOL: (State.QUARANTINED, Event.TRY_AGAIN)}
"""For which state a timer runs, and what its end means."""


class Lives:
    """Takes steps and begins what they call for.

    Args:
        table: the devices; those that are in it already are a predecessor's.
        bus: leads to the VM managers.
        publisher: tells who listens what became of a device.
        workers: runs commands and timers.
        look: says what a source is; see :func:`procs.device_manager.sources.examine`.
        sleep: waits for so many seconds.
        removal_timeout_s: see :data:`REMOVAL_TIMEOUT_S`.
        rules: say when a quarantined device's removal may be asked for again.

    Attributes:
        table: the devices.
        commands: what is being asked of the VM managers.
        look: says what a source is.
        lost: how many devices have vanished without our asking.
    """

    def __init__(
        self,
        table: Table,
        bus: BusClient,
        publisher: Publisher,
        workers: Workers,
        *,
        look: Callable[[DeviceSpec], Awaitable[str]] = examine,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        removal_timeout_s: float = REMOVAL_TIMEOUT_S,
        rules: Iterable[Rule] = RULES,
    ) -> None:
        self.table = table
        self.commands = Commands(bus, workers, self)
        self.look = look
        self.lost = 0
        self._publisher = publisher
        self._workers = workers
        self._sleep = sleep
        self._doubtful = {device.device_id for device in table}
        self._suspects: set[str] = set()
        self._failures: dict[str, KataError] = {}
        self._waiting: dict[str, list[asyncio.Future[tuple[Device, KataError | None]]]] = defaultdict(list)
        self._deeds: dict[Action, Callable[[Device], None]] = {
            Action.LEASE: self._start_leases,
            Action.WATCH: lambda device: self._start(Action.WATCH, device, removal_timeout_s),
            Action.COOL: lambda device: self._start(Action.COOL, device, again_after_s(device, rules)),
            Action.ANSWER: self._tell,
            Action.REPORT_LOST: self._report_lost,
            Action.REPORT_QUARANTINED: self._report_quarantined,
        }

    def current(self, device_id: str) -> Device | None:
        """Return a device as it is now."""
        return self.table.get(device_id)

    def happen(self, device_id: str, event: Event, failure: KataError | None = None, **learned: str | bool) -> None:
        """Take up an answer, a fact or a time that has passed; of a device that is gone it is no news.

        Args:
            device_id: which device.
            event: what happened.
            failure: the error that is behind it, for those who wait.
            learned: what is to be entered into the row.
        """
        if self.table.get(device_id) is None:
            return
        if event in _DOUBTS:
            self._doubtful.add(device_id)
        elif event in _FACTS:
            self._doubtful.discard(device_id)
        if failure is not None:
            self._failures[device_id] = failure
        device = self.begin(self.table.apply(device_id, event, detail=str(failure or ""), **learned))
        if event is Event.ADDED and device_id in self._suspects:
            self._suspects.discard(device_id)
            self.doubt([device])

    def begin(self, taken: Taken) -> Device:
        """Begin what a step calls for; return the device after the step."""
        device, actions = taken
        reach(f"{device.state}:recorded")
        for action in actions:
            if action in ANSWERS:
                self.commands.put(Command(action, device.sandbox_id, device.hypervisor, device))
            else:
                self._deeds[action](device)
        if device.state == State.GONE:
            self._doubtful.discard(device.device_id)
            self._suspects.discard(device.device_id)
            self._failures.pop(device.device_id, None)
        return device

    def doubt(self, devices: Iterable[Device]) -> None:
        """Have devices made sure whose events may have been missed."""
        for device in devices:
            is_resumed = device.device_id in self._doubtful
            self.happen(device.device_id, Event.RESUMED if is_resumed else Event.MISSED)

    def end(self, devices: Iterable[Device]) -> None:
        """Free devices whose VM has ended."""
        for device in devices:
            self.happen(device.device_id, Event.VM_ENDED)

    def suspect(self, devices: Iterable[Device]) -> None:
        """Have devices that are being added made sure once they are: one of them may have been removed already."""
        self._suspects.update(device.device_id for device in devices)

    async def compare(self, sandbox_id: str, hypervisor: str, present: tuple[PresentDevice, ...]) -> None:
        """Enter what the hypervisor has and nobody here knows, with what is behind it if that can be told."""
        known = self.table.of(sandbox_id)
        for unknown in [found for found in present if not any(same(device, found) for device in known)]:
            backing = await self._backing(unknown)
            device = self.begin(self.table.find(unknown, sandbox_id, hypervisor, backing))
            log.get().error("unknown device found: it keeps its place", **names(device))
        self.table.drop_strays(sandbox_id)

    async def _backing(self, unknown: PresentDevice) -> str:
        """Return what a device's source is; nothing if that is not told, or is not there any more."""
        try:
            return await self.look(unknown.spec) if unknown.spec is not None else ""
        except KataError as err:
            log.get().warning("an unknown device's source is not known", device=unknown.serial, error=str(err))
            return ""

    def told(self, device_id: str) -> asyncio.Future[tuple[Device, KataError | None]]:
        """Wait for news of a device: as it is then, and why it is not what was wanted, in an error of one's own."""
        future: asyncio.Future[tuple[Device, KataError | None]] = asyncio.get_running_loop().create_future()
        self._waiting[device_id].append(future)
        return future

    async def wait_while(self, device_id: str, states: tuple[State, ...]) -> tuple[Device | None, KataError | None]:
        """Wait as long as a device is in one of some states and nothing goes wrong.

        Returns:
            The device as it is then, or None if it is gone; and what went wrong.
        """
        failure = None
        while (device := self.table.get(device_id)) is not None and device.state in states and failure is None:
            news = self.told(device_id)
            self.stir([device])
            _, failure = await news
        return device, failure

    async def settle(self, sandbox_id: str) -> None:
        """Make sure of what a sandbox has.

        Raises:
            KataError: the VM manager does not tell.
        """
        doubtful = [
            device
            for device in self.table.of(sandbox_id)
            if device.device_id in self._doubtful and device.state in {State.ATTACHING, *USABLE}
        ]
        news = [self.told(device.device_id) for device in doubtful]
        self.stir(doubtful)
        for device, failure in await asyncio.gather(*news):
            if failure is not None and device.device_id in self._doubtful:
                raise failure

    def stir(self, devices: Iterable[Device]) -> None:
        """Resume those devices that are in doubt and that nothing is being asked about."""
        self.doubt(d for d in devices if d.device_id in self._doubtful and not self.commands.is_about(d))

    def _tell(self, device: Device) -> None:
        failure = self._failures.pop(device.device_id, None)
        for future in self._waiting.pop(device.device_id, ()):
            if not future.done():
                future.set_result((device, failure and failure.copy()))

    def _report_lost(self, device: Device) -> None:
        self.lost += 1
        log.get().error("device lost: removed without our asking", **names(device))
        self._workers.spawn(self._publisher.publish(DEVICE_LOST, device, audience=device.sandbox_id))

    def _report_quarantined(self, device: Device) -> None:
        log.get().error("device quarantined: the guest did not let go", **names(device))
        self._workers.spawn(self._publisher.publish(DEVICE_QUARANTINED, device, audience=device.sandbox_id))

    def _start_leases(self, device: Device) -> None:
        for holder in device.holders:
            if not holder.is_confirmed:
                self._workers.spawn(self._end_lease(device.device_id, holder))

    def _start(self, action: Action, device: Device, seconds: float | None) -> None:
        if seconds is not None:
            self._workers.spawn(self._time(action, device, seconds))

    async def _time(self, action: Action, device: Device, seconds: float) -> None:
        """Wait, and say that the time is over if the device is where it was; a later request has a time of its own."""
        await self._sleep(seconds)
        state, event = _DUE[action]
        now = self.table.get(device.device_id)
        if now is not None and now.state == state and now.removals == device.removals:
            self.happen(device.device_id, event)

    async def _end_lease(self, device_id: str, holder: Holder) -> None:
        """Wait, and take away a holder that has not confirmed; the last one takes the device along."""
        await self._sleep(holder.lease_s)
        now = self.table.get(device_id)
        if now is not None and now.state in USABLE and holder in now.holders:
            log.get().warning("lease ran out", **names(now), holder=holder.name)
            self.begin(self.table.release(device_id, holder.name, is_let_go=False))
