"""The devices in memory and in the journal, which agree at every moment. No bus, no waiting.

A slot is free when no row names it; so a slot is freed by :meth:`Table.apply` alone, when the life of its device ends.
"""

from __future__ import annotations

import secrets
import time
from collections import Counter
from typing import TYPE_CHECKING

import msgspec

from common import log
from common.errors import ExhaustedError, NotFoundError
from common.services.device import Device
from procs.device_manager.states import Event, State, after

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from common.services.device import Attach
    from procs.device_manager.journal import Journal

_SERIAL_BYTES = 10
"""Ten bytes are the twenty hexadecimal characters that a virtio disk's serial may have."""


class Table:
    """Every device, by id, oldest first.

    Args:
        journal: where rows are kept; what is in it is taken over.
        on_gone: is told the id of each device whose row has gone.
    """

    def __init__(self, journal: Journal, on_gone: Callable[[str], None]) -> None:
        self._journal = journal
        self._on_gone = on_gone
        self._devices = {device.device_id: device for device in journal.load()}

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
            raise NotFoundError(f"no device {device_id}", hint="its lease ran out or its VM ended")
        return device

    def of(self, sandbox_id: str) -> list[Device]:
        """Return the devices of a sandbox."""
        return [device for device in self if device.sandbox_id == sandbox_id]

    def counts(self) -> dict[State, int]:
        """Return how many devices are in each state."""
        counted = Counter(device.state for device in self)
        return {state: counted[state] for state in State if state is not State.GONE}

    def usable_like(self, request: Attach) -> Device | None:
        """Return the device that answers a request already, whose first answer was lost."""
        usable = {State.PLUGGED, State.ATTACHED}
        return next((d for d in self.of(request.sandbox_id) if d.spec == request.spec and d.state in usable), None)

    def begin(self, request: Attach) -> Device:
        """Enter a device that is to be plugged; from here on its slot is taken.

        Raises:
            ExhaustedError: every slot that it fits is taken; the message says by how many devices in which state.
        """
        bus, slot = self._free_slot(request)
        device = Device(
            device_id=f"{time.time_ns():020d}-{secrets.token_hex(4)}",
            sandbox_id=request.sandbox_id,
            hypervisor=request.hypervisor,
            hypervisor_id="",
            bus=bus,
            slot=slot,
            serial=secrets.token_hex(_SERIAL_BYTES),
            pci_path="",
            state=State.ATTACHING,
            spec=request.spec,
        )
        self._store(device)
        return device

    def apply(self, device_id: str, event: Event, *, hypervisor_id: str = "", pci_path: str = "") -> Device:
        """Take one step of a device's life, on disk first, and return the device after it.

        Args:
            device_id: the device; it must exist.
            event: what happened to it.
            hypervisor_id: what the hypervisor calls it, if that is learned now.
            pci_path: where the guest finds it, if that is learned now.

        Raises:
            StateError: this may not happen to a device in its state.
            NotFoundError: there is no such device.
        """
        before = self.known(device_id)
        device = msgspec.structs.replace(
            before,
            state=after(State(before.state), event, device_id),
            hypervisor_id=hypervisor_id or before.hypervisor_id,
            pci_path=pci_path or before.pci_path,
        )
        log.get().info("device", **names(device), state=device.state, was=before.state, cause=event.value)
        if device.state == State.GONE:
            self._journal.remove(device_id)
            del self._devices[device_id]
            self._on_gone(device_id)
        else:
            self._store(device)
        return device

    def end(self, device_id: str, event: Event) -> None:
        """Take the last step of a device's life, unless its VM has ended it."""
        if device_id in self._devices:
            self.apply(device_id, event)

    def _free_slot(self, request: Attach) -> tuple[str, int]:
        kind = request.spec.bus_kind
        slots = [(bus.name, slot) for bus in request.buses if bus.kind == kind for slot in range(bus.slots)]
        held = {(device.bus, device.slot): device.state for device in self.of(request.sandbox_id)}
        for place in slots:
            if place not in held:
                return place
        counts = ", ".join(f"{n} {state}" for state, n in sorted(Counter(held[place] for place in slots).items()))
        raise ExhaustedError(
            f"sandbox {request.sandbox_id} has no free {kind} hotplug slot: {len(slots)} in all ({counts or 'none'})",
            hint="a device that is detaching frees its slot when the guest has let go",
        )

    def _store(self, device: Device) -> None:
        self._journal.save(device)
        self._devices[device.device_id] = device


def names(device: Device) -> dict[str, str]:
    """Return what a log record says to name a device."""
    return {
        "device": device.device_id,
        "sandbox": device.sandbox_id,
        "hypervisor_id": device.hypervisor_id,
        "bus": device.bus,
        "slot": str(device.slot),
    }
