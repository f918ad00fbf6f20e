"""What hypervisors differ in, as data: when a quarantined device's removal may be asked for again.

Asking twice is not harmless everywhere. Cloud Hypervisor 49 to 52 panics at the second removal of a network device, and
a second request may be carried out late, on whatever is in the slot by then. So there is no second request unless a
rule here knows that hypervisor, version and kind of device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from common.services.device import Device


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """When to ask again.

    Attributes:
        hypervisor: which; the rule says nothing about others.
        kinds: of device.
        since: the first version that it holds for.
        before: the first version that it no longer holds for; None if there is none yet.
        again_after_s: seconds from one request to the next; after the last one no more follow.
    """

    hypervisor: str
    kinds: frozenset[str]
    since: tuple[int, ...] = ()
    before: tuple[int, ...] | None = None
    again_after_s: tuple[float, ...]

    def covers(self, device: Device) -> bool:
        """Return whether the rule knows about a device."""
        version = tuple(int(part) for part in device.version.split(".") if part.isdigit())
        is_in_range = self.since <= version and (self.before is None or version < self.before)
        return device.hypervisor == self.hypervisor and device.kind in self.kinds and bool(version) and is_in_range


RULES = (
    # QEMU answers a repeated device_del with "already in the process of unplug" for as long as the first is pending,
    # and passes it on to the guest when that has expired (hw/acpi/pcihp.c, hw/pci/pcie.c). Places are not filled again
    # at once (``topology``), so that a late request finds an empty slot.
    Rule(
        hypervisor="qemu",
        kinds=frozenset({"share", "block", "vhost-user-blk", "vfio", "vsock", "network", "cpu", "memory"}),
        again_after_s=(30.0, 120.0, 600.0),
    ),
    # Since version 54 a repeated vm.remove-device is meant to be: the interrupt that tells the guest may get lost.
    # Version 53 does not know a device any more whose removal is pending; older ones may eject what comes next in the
    # slot.
    Rule(
        hypervisor="clh",
        kinds=frozenset({"share", "block", "pmem", "vhost-user-blk", "vfio", "network"}),
        since=(54,),
        again_after_s=(30.0, 120.0, 600.0),
    ),
)


def again_after_s(device: Device, rules: Iterable[Rule]) -> float | None:
    """Return after how many seconds a device's removal may be asked for again, or None: never."""
    for rule in rules:
        if rule.covers(device) and 0 < device.removals <= len(rule.again_after_s):
            return rule.again_after_s[device.removals - 1]
    return None
