"""Where devices can be plugged into a QEMU VM. Pure: a configuration in; buses, arguments and addresses out.

::

    pcie.0 ── 02       scsi0     virtio-scsi controller, only if disks are to be driven by it: 256 units of target 0
              03       serial    the channel (``cmdline``)
              04…08    bridge0…  PCI bridges, ``default_bridges`` (1 to 5) of them: 30 slots each
              09…18    port0…    PCIe root ports, ``pcie_root_port`` of them: one slot each, for devices of the host
    ACPI               cpus      processors beyond those of the boot
                       memory    slots for memory modules

pcie.0 itself takes no hotplug. Why bridges and not root ports only: docs/adr/0015-bridges-for-hotplug.md. A bridge
without firmware that expects hotplug gets no address space, and devices behind it do not work; so it asks for windows
that hold thirty virtio devices (each 4 KiB, and 16 KiB prefetchable). Its hotplug is ACPI's, not SHPC's, whose driver
Debian's cloud kernel does not have. Slot 0 is left out, as upstream does.

Sources: docs/pcie.txt and docs/pci_expander_bridge.txt of QEMU, hw/pci-bridge/pci_bridge_dev.c; upstream's numbers of
bridges and ports (Kata Containers 4.1.0, virtcontainers/hypervisor.go); tests on 7.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.errors import UsageError
from common.services.vmm import BlockDriver, BusKind, HotplugBus

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from common.config import QemuConfig

BRIDGE_SLOTS = 30
SCSI_UNITS = 256
_SCSI_TARGET = 0
_SCSI_SLOT = 2
_FIRST_BRIDGE_SLOT = 4
_FIRST_PORT_SLOT = 9
_MAX_BRIDGES = 5
_WINDOWS = "io-reserve=4k,mem-reserve=1m,pref64-reserve=1m"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One slot of one bus.

    Attributes:
        arguments: what ``device_add`` is told of it.
        guest_path: see :class:`common.services.vmm.AddedDevice`.
    """

    arguments: Mapping[str, object]
    guest_path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bus:
    """A hotplug bus: what callers are told, how QEMU is told to make it, and its slot on pcie.0."""

    bus: HotplugBus
    device: str = ""
    root_slot: int = 0
    first_slot: int = 0

    def place(self, slot: int) -> Place:
        if self.bus.kind is BusKind.CPU:
            return Place(arguments={}, guest_path="")  # which one it is, is its backend's to know
        if self.bus.kind is BusKind.MEMORY:
            return Place(arguments={"slot": slot}, guest_path="")
        if self.bus.kind is BusKind.SCSI:
            return Place(
                arguments={"bus": self.bus.name, "channel": 0, "scsi-id": _SCSI_TARGET, "lun": slot},
                guest_path=f"{_SCSI_TARGET}:{slot}",
            )
        number = self.first_slot + slot
        return Place(
            arguments={"bus": self.bus.name, "addr": f"{number:#x}"}, guest_path=f"{self.root_slot:02x}/{number:02x}"
        )


class Topology:
    """The hotplug buses of one VM."""

    def __init__(self, config: QemuConfig) -> None:
        self._buses = {item.bus.name: item for item in _buses(config)}

    @property
    def buses(self) -> tuple[HotplugBus, ...]:
        """What callers are told, in the order in which they are to be filled."""
        return tuple(item.bus for item in self._buses.values())

    def arguments(self) -> Iterator[str]:
        """Yield QEMU's arguments that make the buses."""
        for item in filter(lambda item: item.device, self._buses.values()):
            yield from ("-device", f"{item.device},bus=pcie.0,addr={item.root_slot:#x}")

    def place(self, bus: str, slot: int) -> Place:
        """Return what is to be known of a slot.

        Raises:
            UsageError: there is no such bus or slot.
        """
        found = self._buses.get(bus)
        if found is None or not 0 <= slot < found.bus.slots:
            has = ", ".join(f"{item.name} with {item.slots}" for item in self.buses)
            raise UsageError(f"QEMU has no slot {slot} on a hotplug bus {bus!r}", hint=f"it has {has}")
        return found.place(slot)


def _buses(config: QemuConfig) -> Iterator[_Bus]:
    for number in range(min(max(config.default_bridges, 1), _MAX_BRIDGES)):
        yield _Bus(
            bus=HotplugBus(name=f"bridge{number}", kind=BusKind.PCI, slots=BRIDGE_SLOTS),
            device=f"pci-bridge,id=bridge{number},chassis_nr={number + 1},shpc=off,{_WINDOWS}",
            root_slot=_FIRST_BRIDGE_SLOT + number,
            first_slot=1,
        )
    for number in range(config.pcie_root_port):
        yield _Bus(
            bus=HotplugBus(name=f"port{number}", kind=BusKind.PCIE, slots=1),
            device=f"pcie-root-port,id=port{number},chassis={number + 1},slot={number}",
            root_slot=_FIRST_PORT_SLOT + number,
        )
    if config.block_device_driver is BlockDriver.VIRTIO_SCSI:
        yield _Bus(
            bus=HotplugBus(name="scsi0.0", kind=BusKind.SCSI, slots=SCSI_UNITS),
            device="virtio-scsi-pci,id=scsi0",
            root_slot=_SCSI_SLOT,
        )
    if config.max_vcpus > config.default_vcpus:
        yield _Bus(bus=HotplugBus(name="cpus", kind=BusKind.CPU, slots=config.max_vcpus - config.default_vcpus))
    if config.may_grow:
        yield _Bus(bus=HotplugBus(name="memory", kind=BusKind.MEMORY, slots=config.memory_slots))
