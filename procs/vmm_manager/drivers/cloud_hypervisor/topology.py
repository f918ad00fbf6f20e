"""The slots of a Cloud Hypervisor VM. Pure: what is on the bus after boot in, a hotplug bus out.

A PCI segment has 32 slots. The first is the host bridge's, the next ones are taken at boot by what the VM is made with
(virtio-rng, vsock), from the lowest up; the rest is for hotplug. There are no bridges: a device's path in the guest is
its slot. A further segment would be a root bus of its own, ``pci0001:00``, where agents do not look for a device by its
path; so there is one.

Source: ``pci/src/bus.rs`` and ``vmm/src/pci_segment.rs`` of v53.0.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from common.errors import HypervisorError, UsageError
from common.services.vmm import BusKind, HotplugBus

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from common.config import ClhConfig

SEGMENT = "segment0"
_SLOTS = 32
_ACPI_MODULES = 8
"""``HOTPLUG_COUNT`` in vmm/src/memory_manager.rs"""
_BDF = re.compile(r"0000:00:([0-9a-f]{2})\.0")
"""Segment, bus, device, function: of the first segment's only bus."""


def bus_after_boot(device_tree: Mapping[str, Any]) -> HotplugBus:
    """Return what is left for hotplug, in a tree as ``vm.info`` has it."""
    taken = [slot_of(node["pci_bdf"]) for node in device_tree.values() if node.get("pci_bdf")]
    return HotplugBus(name=SEGMENT, kind=BusKind.PCI, slots=_SLOTS - 1 - max(taken, default=0))


def part_buses(config: ClhConfig) -> Iterator[HotplugBus]:
    """Yield the buses, which are none, of processors and memory beyond what the VM boots with."""
    if config.max_vcpus > config.default_vcpus:
        yield HotplugBus(name="cpus", kind=BusKind.CPU, slots=config.max_vcpus - config.default_vcpus)
    if config.may_grow:
        slots = config.memory_slots if config.enable_virtio_mem else min(config.memory_slots, _ACPI_MODULES)
        yield HotplugBus(name="memory", kind=BusKind.MEMORY, slots=slots)


def pci_slot(bus: HotplugBus, name: str, slot: int) -> int:
    """Return where a slot of the hotplug bus is on the PCI bus.

    Raises:
        UsageError: there is no such bus or slot.
    """
    if name != bus.name or not 0 <= slot < bus.slots:
        raise UsageError(
            f"Cloud Hypervisor has no slot {slot} on a hotplug bus {name!r}", hint=f"{bus.name} has {bus.slots}"
        )
    return _SLOTS - bus.slots + slot


def slot_of(bdf: str) -> int:
    """Return the slot in an address, for example 5 in ``0000:00:05.0``.

    Raises:
        HypervisorError: it is not on the one bus that there is.
    """
    found = _BDF.fullmatch(bdf)
    if found is None:
        raise HypervisorError(f"Cloud Hypervisor has a device at PCI address {bdf!r}, which is on no bus of ours")
    return int(found[1], 16)


def pci_path(bdf: str) -> str:
    """Return where the guest finds the device at an address; the errors are those of :func:`slot_of`."""
    return f"{slot_of(bdf):02x}"
