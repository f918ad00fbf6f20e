"""A shard's devices in memory and in the journal, which agree at every moment. No bus, no waiting.

Every change of a device is one step of its life (``states``), taken by :meth:`Table.apply`: on disk first, then in
memory; the actions that the step calls for are the caller's. What no two devices may share is decided here as well: a
place on a bus (``topology``) and a source. A source belongs to one device of a sandbox, whose holders share it. What
sandboxes may not share, whichever shard they are in, is claimed (``claims``) for as long as the device has a row.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from common import log
from common.errors import AlreadyExistsError, NotFoundError, UnavailableError
from common.services.device import Chapter, Device, Holder
from common.trace import reach
from procs.device_manager.database import MAKE_ROOM
from procs.device_manager.states import LEAVING, LIVE, USABLE, Action, Event, State, after
from procs.device_manager.topology import free_place

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import Protocol

    from common.services.device import Attach
    from common.services.vmm import PresentDevice
    from procs.device_manager.topology import Place

    class Rows(Protocol):
        """Where rows are kept: :class:`procs.device_manager.journal.Journal`."""

        def load(self) -> list[Device]:
            """Return the rows that a predecessor left."""

        def save(self, device: Device, chapter: Chapter) -> None:
            """Write a row and what happened to it."""

        def remove(self, device: Device, chapter: Chapter) -> None:
            """Remove a row, and write what happened to it."""

    class HostClaims(Protocol):
        """What the host's sandboxes claim: :class:`procs.device_manager.claims.Claims`."""

        def take(self, device: Device) -> None:
            """Claim what a device needs."""

        def restore(self, devices: Iterable[Device]) -> None:
            """Enter claims that may be missing."""

        def drop(self, device_id: str) -> None:
            """Give back what a device had."""

        def sandboxes(self, hypervisor: str) -> set[str]:
            """Return who claims something."""

        def drop_strays(self, sandbox_id: str, known: Iterable[Device]) -> None:
            """Give back what is claimed for devices that are not there."""


Taken = tuple[Device, tuple[Action, ...]]
"""A device after a step, and what is to be done."""


class Table:
    """Every device, by id, oldest first.

    Args:
        journal: where rows are kept; what is in it is taken over.
        claims: what the devices need of the host.
        clock: seconds since the epoch.
    """

    def __init__(self, journal: Rows, claims: HostClaims, clock: Callable[[], float] = time.time) -> None:
        self._journal = journal
        self._claims = claims
        self._clock = clock
        self._devices = {device.device_id: device for device in journal.load()}
        claims.restore(self)
        self._freed: dict[str, dict[Place, float]] = {}

    def __iter__(self) -> Iterator[Device]:
        """Iterate over a copy: rows may go meanwhile."""
        return iter(tuple(self._devices.values()))

    def get(self, device_id: str) -> Device | None:
        """Return a device as it is now, or None if it is gone."""
        return self._devices.get(device_id)

    def known(self, device_id: str) -> Device:
        """Return a device as it is now.

        Raises:
            NotFoundError: it is gone or never was.
        """
        device = self._devices.get(device_id)
        if device is None:
            raise NotFoundError(
                f"no device {device_id!r}",
                hint=f"its VM or its lease has ended, or it was lost: `kata-runtime devices story {device_id}` tells",
            )
        return device

    def of(self, sandbox_id: str) -> list[Device]:
        """Return the devices of a sandbox."""
        return [device for device in self if device.sandbox_id == sandbox_id]

    def counts(self) -> dict[State, int]:
        """Return how many devices are in each state."""
        counted = Counter(device.state for device in self)
        return {state: counted[state] for state in LIVE}

    def holding(self, request: Attach, backing: str) -> Device | None:
        """Return the sandbox's device that has a source already.

        Raises:
            AlreadyExistsError: the source is held in a way that allows no second use.
        """
        for device in self.of(request.sandbox_id):
            if device.backing == backing:
                _require_same(device, request)
                return device
        return None

    def begin(self, request: Attach, backing: str) -> Taken:
        """Enter a device that is wanted; from here on its place is taken.

        Raises:
            ExhaustedError: every place is taken; the message says by how many devices in which state.
            AlreadyExistsError: another sandbox of the host has what only one may have.
            UnavailableError: it cannot be written.
        """
        bus, slot = free_place(request, self.of(request.sandbox_id), self._freed.get(request.sandbox_id, {}))
        device = Device(
            device_id=self._new_id(),
            sandbox_id=request.sandbox_id,
            hypervisor=request.hypervisor,
            version=request.version,
            bus=bus,
            slot=slot,
            state=State.NEW,
            since=self._clock(),
            spec=request.spec,
            backing=backing,
            holders=(self._holder(request),),
        )
        self._claims.take(device)
        reach("claim:taken")
        try:
            detail = f"{request.spec.source} for {request.holder or 'the sandbox'}"
            return self._wished(device, Event.WANTED, detail=detail)
        except UnavailableError:
            self._claims.drop(device.device_id)
            raise

    def find(self, present: PresentDevice, sandbox_id: str, hypervisor: str, backing: str) -> Taken:
        """Enter a device that the hypervisor has and that nobody here knows; it keeps its place and its source.

        Its serial is the id that it had here before it was forgotten. Who holds it is not known.
        """
        device = Device(
            device_id=present.serial or self._new_id(),
            sandbox_id=sandbox_id,
            hypervisor=hypervisor,
            hypervisor_id=present.hypervisor_id,
            bus=present.bus,
            slot=present.slot,
            guest_path=present.guest_path,
            storage_options=present.storage_options,
            is_guest_first=present.is_guest_first,
            state=State.NEW,
            since=self._clock(),
            spec=present.spec,
            backing=backing,
        )
        self._claims.restore([device] if backing else [])
        return self._step(device, Event.FOUND, detail=present.hypervisor_id)

    def apply(self, device_id: str, event: Event, *, detail: str = "", **learned: str | bool) -> Taken:
        """Take one step of a device's life.

        Args:
            device_id: the device; it must exist.
            event: what happened to it.
            detail: more for the device's history; without it, what the hypervisor calls the device.
            learned: fields of the device that are learned now; an empty one says nothing new.

        Raises:
            StateError: this may not happen to a device in its state.
            NotFoundError: there is no such device.
        """
        before = self.known(device_id)
        device = msgspec.structs.replace(before, **{name: value for name, value in learned.items() if value})
        return self._step(device, event, detail=detail or str(learned.get("hypervisor_id", "")))

    def hold(self, device_id: str, request: Attach) -> Taken:
        """Add a holder, whose lease begins; one that is there already stays as it is."""
        device = self.known(device_id)
        if request.holder in _names(device):
            return device, ()
        holders = (*device.holders, self._holder(request))
        return self._wished(msgspec.structs.replace(device, holders=holders), Event.HELD, detail=request.holder)

    def confirm(self, device_id: str, name: str) -> Taken:
        """Note that a holder uses a device.

        Raises:
            NotFoundError: the device is gone, or its holder's lease has run out.
            StateError: it is on its way out.
        """
        device = self.known(device_id)
        if device.state in USABLE and name not in _names(device):
            raise NotFoundError(
                f"device {device_id} has no holder {name!r}", hint="its lease has run out: attach again"
            )
        holders = tuple(_confirmed(holder) if holder.name == name else holder for holder in device.holders)
        return self._wished(msgspec.structs.replace(device, holders=holders), Event.CONFIRMED, detail=name)

    def release(self, device_id: str, name: str, *, is_let_go: bool) -> Taken:
        """Take a holder away; the last one takes the device along. One that is not there changes nothing.

        Args:
            device_id: which device.
            name: of the holder.
            is_let_go: whether the holder says that the guest has let go of the device.

        Raises:
            NotFoundError: the device is gone.
            StateError: it is quarantined, and it is not for want of the guest's word.
        """
        device = self.known(device_id)
        holders = tuple(holder for holder in device.holders if holder.name != name)
        if device.state in LEAVING or (holders and holders == device.holders):
            return device, ()
        last = Event.DETACH if is_let_go else Event.ABORTED
        event = Event.RELEASED if holders else last
        return self._wished(msgspec.structs.replace(device, holders=holders), event, detail=name)

    def forget(self, sandbox_id: str) -> None:
        """Forget which places of a sandbox were taken once, and what it claims: its VM has ended."""
        self._freed.pop(sandbox_id, None)
        self.drop_strays(sandbox_id)

    def claimants(self, hypervisor: str) -> set[str]:
        """Return the sandboxes that claim something of the host, by a device or by a stray."""
        return self._claims.sandboxes(hypervisor)

    def drop_strays(self, sandbox_id: str) -> None:
        """Give back what is claimed for devices that a sandbox does not have."""
        self._claims.drop_strays(sandbox_id, self.of(sandbox_id))

    def _wished(self, device: Device, event: Event, *, detail: str) -> Taken:
        """Take a step that a caller wants.

        Raises:
            UnavailableError: it cannot be written, so it is not taken. A step that follows from what has happened
                cannot be left out: there the process ends, and its successor asks what is true.
        """
        try:
            return self._step(device, event, detail=detail)
        except OSError as err:
            raise UnavailableError(
                f"device {device.device_id} cannot be {event}: {err.strerror}",
                hint=MAKE_ROOM,
            ) from err

    def _step(self, device: Device, event: Event, *, detail: str = "") -> Taken:
        """Take a step with a device whose other fields are as they are to be after it."""
        before, is_guest_first = State(device.state), device.is_guest_first
        state, actions = after(before, event, device.device_id, is_guest_first=is_guest_first)
        now = self._clock()
        stepped = msgspec.structs.replace(
            device,
            state=state,
            since=device.since if state == device.state else now,
            removals=device.removals + (Action.REMOVE in actions and event is not Event.RESUMED),
        )
        chapter = Chapter(at=now, event=event.value, state=state, detail=detail)
        if state is State.GONE:
            self._journal.remove(stepped, chapter)
            reach("row:removed")
            self._claims.drop(device.device_id)
            del self._devices[device.device_id]
            self._freed.setdefault(device.sandbox_id, {})[device.bus, device.slot] = now
        else:
            self._journal.save(stepped, chapter)
            self._devices[device.device_id] = stepped
        log.get().info("device", **names(stepped), state=state.value, was=device.state, cause=event.value)
        return stepped, actions

    def _holder(self, request: Attach) -> Holder:
        return Holder(name=request.holder, since=self._clock(), lease_s=request.lease_s)

    def _new_id(self) -> str:
        """Return an id that sorts by age: 20 hexadecimal characters."""
        return f"{time.time_ns():016x}{secrets.token_hex(2)}"


def names(device: Device) -> dict[str, str]:
    """Return what a log record says to name a device."""
    return {
        "device": device.device_id,
        "sandbox": device.sandbox_id,
        "hypervisor_id": device.hypervisor_id,
        "place": f"{device.bus}/{device.slot}",
    }


def _require_same(device: Device, request: Attach) -> None:
    """Refuse a second use of a source that differs from the first, unless the first is about to end."""
    if device.state == State.QUARANTINED:
        raise AlreadyExistsError(
            f"{request.spec.source} is held by device {device.device_id}, which is quarantined",
            hint="the guest has not let it go; the end of the sandbox frees it",
        )
    if device.state == State.UNKNOWN:
        raise AlreadyExistsError(
            f"{request.spec.source} is held by device {device.device_id}, and by whom is not known any more",
            hint="who has it detaches it, or the end of the sandbox frees it",
        )
    if device.state not in LEAVING and device.spec and device.spec.mode != request.spec.mode:
        raise AlreadyExistsError(
            f"{request.spec.source} is attached {device.spec.mode} and cannot also be attached {request.spec.mode}",
            hint="detach it first, or ask for it as it is",
        )


def _names(device: Device) -> Iterable[str]:
    return [holder.name for holder in device.holders]


def _confirmed(holder: Holder) -> Holder:
    return msgspec.structs.replace(holder, is_confirmed=True)
