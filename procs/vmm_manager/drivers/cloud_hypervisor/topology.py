"""The slots of a Cloud Hypervisor VM. Pure: what is on its buses after boot in, hotplug buses out.

A VM has PCI segments, ``default_bridges`` of them, each with one bus of 32 slots, the first of which is the host
bridge's. In the first segment the next ones are taken at boot by what the VM is made with (virtio-rng, vsock,
virtio-mem), from the lowest up; all the rest is for hotplug. There are no bridges: a device's path in the guest is its
slot, and in another segment than the first that segment before it, ``0001:05`` for what Linux has below
``/sys/devices/pci0001:00``. Only our agent looks there.

Source: ``pci/src/bus.rs`` and ``vmm/src/pci_segment.rs`` of v53.0.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from common.errors import HypervisorError, UsageError
from common.services.vmm import BusKind, HotplugBus

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from common.config import ClhConfig

_SLOTS = 32
_ACPI_MODULES = 8
"""``HOTPLUG_COUNT`` in vmm/src/memory_manager.rs"""
_SEGMENT = "segment"
_BDF = re.compile(r"([0-9a-f]{4}):00:([0-9a-f]{2})\.0")
"""Segment, bus, device, function: of a segment's only bus."""


class Address(NamedTuple):
    """Where a device is."""

    segment: int
    slot: int


def pci_buses(device_tree: Mapping[str, Any], segments: int) -> Iterator[HotplugBus]:
    """Yield what is left for hotplug after the boot.

    Args:
        device_tree: as ``vm.info`` has it.
        segments: how many there are.
    """
    taken = [address_of(node["pci_bdf"]) for node in device_tree.values() if node.get("pci_bdf")]
    for segment in range(segments):
        last = max((address.slot for address in taken if address.segment == segment), default=0)
        yield HotplugBus(name=f"{_SEGMENT}{segment}", kind=BusKind.PCI, slots=_SLOTS - 1 - last)


def part_buses(config: ClhConfig) -> Iterator[HotplugBus]:
    """Yield the buses, which are none, of processors and memory beyond what the VM boots with."""
    if config.max_vcpus > config.default_vcpus:
        yield HotplugBus(name="cpus", kind=BusKind.CPU, slots=config.max_vcpus - config.default_vcpus)
    if config.may_grow:
        slots = config.memory_slots if config.enable_virtio_mem else min(config.memory_slots, _ACPI_MODULES)
        yield HotplugBus(name="memory", kind=BusKind.MEMORY, slots=slots)


def address(buses: Iterable[HotplugBus], name: str, slot: int) -> Address:
    """Return where a slot of a hotplug bus is on the PCI bus of its segment.

    Raises:
        UsageError: there is no such bus or slot.
    """
    slots = {bus.name: bus.slots for bus in buses if bus.kind is BusKind.PCI}
    if not 0 <= slot < slots.get(name, 0):
        hint = ", ".join(f"{bus} has {count}" for bus, count in slots.items())
        raise UsageError(f"Cloud Hypervisor has no slot {slot} on a hotplug bus {name!r}", hint=hint)
    return Address(int(name.removeprefix(_SEGMENT)), _SLOTS - slots[name] + slot)


def address_of(bdf: str) -> Address:
    """Return the address in, for example, ``0000:00:05.0``.

    Raises:
        HypervisorError: it is not on the one bus that a segment has.
    """
    found = _BDF.fullmatch(bdf)
    if found is None:
        raise HypervisorError(f"Cloud Hypervisor has a device at PCI address {bdf!r}, which is on no bus of ours")
    return Address(int(found[1], 16), int(found[2], 16))


def pci_path(bdf: str) -> str:
    """Return where the guest finds the device at an address; the errors are those of :func:`address_of`."""
    segment, slot = address_of(bdf)
    return f"{segment:04x}:{slot:02x}" if segment else f"{slot:02x}"
