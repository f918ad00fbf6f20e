"""Which place of a VM a device gets. Pure.

A VM's buses are data (:class:`common.services.vmm.HotplugBus`): a QEMU root port has one slot, a SCSI controller many.
A slot is taken as long as any row names it, whatever the row's state: a device that is detaching or quarantined is
still in the hypervisor's hands, and QEMU does not notice when an occupied slot is filled a second time.

Of the free slots the one is taken that was free for the longest time. A removal that was asked for twice may reach the
guest late and then hits whatever is in the slot by then, so a slot that has just been freed is the worst choice.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from common.errors import ExhaustedError, UnsupportedError
from common.services.vmm import bus_kinds
from procs.device_manager.states import LEAVING, State

if TYPE_CHECKING:
    from collections.abc import Iterable

    from common.services.device import Attach, Device

Place = tuple[str, int]
"""Bus and slot."""


def free_place(request: Attach, devices: Iterable[Device], freed: dict[Place, float]) -> Place:
    """Return where a device goes.

    Args:
        request: what is wanted.
        devices: every device of the sandbox, in whatever state.
        freed: when places became free; those that never held a device are not in it.

    Raises:
        UnsupportedError: the VM has no bus of that kind.
        ExhaustedError: every slot is taken; the message says by what.
    """
    kind, kinds = request.spec.bus_kind, bus_kinds(request.spec)
    places = [(bus.name, slot) for bus in request.buses if bus.kind in kinds for slot in range(bus.slots)]
    if not places:
        raise UnsupportedError(f"the VM of sandbox {request.sandbox_id} has no hotplug bus for {kind} devices")
    taken = {(device.bus, device.slot): device for device in devices}
    free = [place for place in places if place not in taken]
    if not free:
        raise _exhausted(request.sandbox_id, kind, [taken[place] for place in places])
    return min(free, key=lambda place: freed.get(place, 0.0))


def _exhausted(sandbox_id: str, kind: str, devices: list[Device]) -> ExhaustedError:
    counted = Counter(device.state for device in devices)
    pending, quarantined = sum(counted[state] for state in LEAVING), counted[State.QUARANTINED]
    held = len(devices) - pending - quarantined
    return ExhaustedError(
        f"sandbox {sandbox_id} has no free {kind} slot: of {len(devices)}, {held} are held, {pending} pending removal, "
        f"{quarantined} quarantined",
        hint="a slot is free when the guest has let its device go; `kata-runtime devices` shows who holds them",
        held=str(held),
        pending=str(pending),
        quarantined=str(quarantined),
    )
