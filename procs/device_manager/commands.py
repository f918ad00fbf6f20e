"""What is asked of the VM managers: one queue per sandbox, one command at a time, and what each answer means.

A hypervisor has one command stream, so the commands of a sandbox follow one another; those of other sandboxes do not
wait for them. Nothing here waits for a guest: a removal has been carried out when it is *accepted*, and what comes of
it is heard or asked later.

An add bears its device's id as call id. So one that may still be running can be repeated: the VM manager has the second
call join the first, or gives it the same answer. A removal bears its number as well, since it may be meant twice.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec

from common import log
from common.errors import DeadlineError, InterruptedCallError, KataError, NotFoundError, UnavailableError
from common.services import vmm
from common.trace import reach
from procs.device_manager.states import Action, Event

if TYPE_CHECKING:
    from common.bus.client import BusClient
    from common.bus.wire import Verb
    from common.services.device import Device
    from common.workers import Workers

Q = TypeVar("Q", bound=msgspec.Struct)
R = TypeVar("R", bound=msgspec.Struct)

CALL_TIMEOUT_S = 15.0
"""How long a VM manager may take to answer; some devices take longer to be plugged."""

ANSWERS: dict[Action, tuple[tuple[type[Exception], Event], ...]] = {
    Action.ADD: (
        (UnavailableError, Event.UNREACHED),
        (InterruptedCallError, Event.LOST_ANSWER),
        (TimeoutError, Event.UNANSWERED),
        (KataError, Event.REFUSED),
    ),
    Action.REPEAT: (
        (UnavailableError, Event.LOST_ANSWER),  # this time, but the first time it was asked
        (InterruptedCallError, Event.LOST_ANSWER),
        (TimeoutError, Event.UNANSWERED),
        (KataError, Event.REFUSED),
    ),
    Action.REMOVE: (
        (UnavailableError, Event.LOST_ANSWER),
        (InterruptedCallError, Event.LOST_ANSWER),
        (TimeoutError, Event.UNANSWERED),
        (NotFoundError, Event.ABSENT),
        (KataError, Event.REFUSED),
    ),
    Action.ASK: (
        (NotFoundError, Event.VM_ENDED),
        (TimeoutError, Event.UNANSWERED),
        (KataError, Event.LOST_ANSWER),
    ),
}
"""What an error means for the device that a command was about; the first class that fits counts."""


@dataclass(frozen=True, slots=True)
class Command:
    """Something to ask of a VM manager: about a device, or if that is None about all of a sandbox."""

    action: Action
    sandbox_id: str
    hypervisor: str
    device: Device | None = None


class Listener(Protocol):
    """Who hears how a command went."""

    def current(self, device_id: str) -> Device | None:
        """Return a device as it is now."""

    def happen(self, device_id: str, event: Event, failure: KataError | None = None, **learned: str | bool) -> None:
        """Take up what an answer means for a device."""

    async def compare(self, sandbox_id: str, hypervisor: str, present: tuple[vmm.PresentDevice, ...]) -> None:
        """Take up a hypervisor's list: look for what nobody here knows."""


class Commands:
    """Carries out commands, each sandbox's in order."""

    def __init__(self, bus: BusClient, workers: Workers, listener: Listener) -> None:
        self._bus = bus
        self._workers = workers
        self._listener = listener
        self._queues: dict[str, deque[Command]] = {}
        self._calls = {
            Action.ADD: self._add,
            Action.REPEAT: self._add,
            Action.REMOVE: self._remove,
            Action.ASK: self._ask,
        }

    @property
    def waiting(self) -> int:
        """How many commands are carried out or wait for their turn."""
        return sum(map(len, self._queues.values()))

    def is_about(self, device: Device) -> bool:
        """Return whether a command about a device is carried out or waits for its turn."""
        queue = self._queues.get(device.sandbox_id, ())
        return any(command.device and command.device.device_id == device.device_id for command in queue)

    def put(self, command: Command) -> None:
        """Carry out a command when its turn comes."""
        queue = self._queues.get(command.sandbox_id)
        if queue is not None:
            queue.append(command)
            return
        self._queues[command.sandbox_id] = deque([command])
        self._workers.spawn(self._work(command.sandbox_id))

    async def _work(self, sandbox_id: str) -> None:
        """Empty a sandbox's queue; a command stays in it until it is done. One list answers all who ask for it."""
        queue = self._queues[sandbox_id]
        while queue:
            action = queue[0].action
            batch = list(takewhile(lambda other: other.action is Action.ASK, queue)) or [queue[0]]
            due = [command for command in batch if self._is_due(command)]
            if due:
                await self._carry_out(action, due)
            for _ in batch:
                queue.popleft()
        del self._queues[sandbox_id]

    def _is_due(self, command: Command) -> bool:
        """Return whether a device is still in the state that the command was given for."""
        if command.device is None:
            return True
        device = self._listener.current(command.device.device_id)
        return device is not None and device.state == command.device.state

    async def _carry_out(self, action: Action, batch: list[Command]) -> None:
        try:
            async with asyncio.timeout(_patience_s(batch[0])):
                await self._calls[action](batch)
        except (KataError, TimeoutError) as err:
            event = next(event for kind, event in ANSWERS[action] if isinstance(err, kind))
            failure = err if isinstance(err, KataError) else _unanswered(batch[0])
            for command in batch:
                self._answer(command, event, failure)

    async def _add(self, batch: list[Command]) -> None:
        (command,) = batch
        device = command.device
        assert device is not None
        assert device.spec is not None
        reach("add:intended")
        request = vmm.AddDevice(
            sandbox_id=device.sandbox_id, spec=device.spec, bus=device.bus, slot=device.slot, serial=device.serial
        )
        added = await self._call(command, vmm.ADD_DEVICE, request, call_id=device.device_id)
        reach("add:answered")
        self._answer(
            command,
            Event.ADDED,
            hypervisor_id=added.hypervisor_id,
            guest_path=added.guest_path,
            storage_options=added.storage_options,
            is_guest_first=added.is_guest_first,
        )

    async def _remove(self, batch: list[Command]) -> None:
        (command,) = batch
        device = command.device
        assert device is not None
        reach("remove:intended")
        request = vmm.RemoveDevice(sandbox_id=device.sandbox_id, hypervisor_id=device.hypervisor_id)
        await self._call(command, vmm.REMOVE_DEVICE, request, call_id=f"{device.device_id}.{device.removals}")
        reach("remove:accepted")
        self._answer(command, Event.ACCEPTED)

    async def _ask(self, batch: list[Command]) -> None:
        sandbox_id = batch[0].sandbox_id
        request = vmm.SandboxRef(sandbox_id=sandbox_id)
        present = (await self._call(batch[0], vmm.LIST_PRESENT_DEVICES, request)).devices
        for command in batch:
            if command.device is not None:
                found = _find(command.device, present)
                event = Event.PRESENT if found else Event.ABSENT
                self._answer(command, event, None, **_learned(found))
        await self._listener.compare(sandbox_id, batch[0].hypervisor, present)

    async def _call(self, command: Command, verb: Verb[Q, R], request: Q, *, call_id: str | None = None) -> R:
        """Call a VM manager; :meth:`_carry_out` limits the time, which tells our own patience from a peer's."""
        service = vmm.service_name(command.hypervisor)
        return await self._bus.call(service, verb, request, timeout_s=2 * _patience_s(command), call_id=call_id)

    def _answer(self, command: Command, event: Event, failure: KataError | None = None, **learned: str | bool) -> None:
        """Tell what an answer means, unless the device has meanwhile gone on to where it means something else."""
        if command.device is not None and self._is_due(command):
            self._listener.happen(command.device.device_id, event, failure, **learned)
        elif command.device is None and failure is not None:
            log.get().warning("devices not compared", sandbox=command.sandbox_id, error=str(failure))


def same(device: Device, present: vmm.PresentDevice) -> bool:
    """Return whether a device of ours is one in the hypervisor's list: by serial, else by its place."""
    if present.serial:
        return present.serial == device.serial
    return (present.bus, present.slot) == (device.bus, device.slot)


def _learned(present: vmm.PresentDevice | None) -> dict[str, str | bool]:
    """Return what a hypervisor's list tells of a device."""
    if present is None:
        return {}
    names = ("hypervisor_id", "guest_path", "storage_options", "is_guest_first")
    return {name: getattr(present, name) for name in names}


def _find(device: Device, listed: tuple[vmm.PresentDevice, ...]) -> vmm.PresentDevice | None:
    return next((present for present in listed if same(device, present)), None)


def _patience_s(command: Command) -> float:
    spec = command.device.spec if command.action is Action.ADD and command.device else None
    return CALL_TIMEOUT_S + (vmm.extra_s(spec) if spec else 0)


def _unanswered(command: Command) -> DeadlineError:
    return DeadlineError(
        f"{vmm.service_name(command.hypervisor)} did not answer within {_patience_s(command):g} s: {command.action}",
        hint="what it did is found out; ask again",
    )
