"""Where a disk can be plugged into a running VM. Two ways, one interface.

*PCI* (Firecracker 1.16 and later, ``virtio-blk``). A drive is added and removed. Firecracker puts a device into the
lowest free slot and does not say which; all devices are ours, so we know. The guest is told nothing, neither of a
device that comes nor of one that goes: it must look for the one, and must have let go of the other *before* it is
removed. Else it keeps a dead device in that slot and does not see the next one there (docs/hypervisors/firecracker.md).

*Placeholders* (every version, ``virtio-mmio``). The VM is started with drives that hold one sector. A disk is put in
place of that sector, and the guest is told the new size. Whether a drive can be written is fixed at its start.

Network devices are on PCI like disks. Without PCI a VM has those that it got before its boot, and keeps them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from common.config.checks import MAX_PLACEHOLDERS
from common.errors import UsageError
from common.services.vmm import BlockSpec, BusKind, HotplugBus
from procs.vmm_manager.drivers.firecracker import boot

if TYPE_CHECKING:
    from collections.abc import Collection

    from common.config import FirecrackerConfig
    from procs.vmm_manager.drivers.firecracker.api import Api
    from procs.vmm_manager.drivers.firecracker.jail import Lent
    from procs.vmm_manager.record import DeviceRecord

PCI_BUS = "pci"
WRITABLE_BUS = "placeholders"
READ_ONLY_BUS = "read-only-placeholders"
NETWORK_BUS = "interfaces"

_SLOTS = 32
_FIRST_FREE_SLOT = 3
"""Behind the host bridge, vsock and entropy (``boot``)."""


class Places(Protocol):
    """One way."""

    @property
    def buses(self) -> tuple[HotplugBus, ...]:
        """What callers are told."""

    def place(self, device: DeviceRecord, taken: Collection[str]) -> str:
        """Return where the guest will find a device (:attr:`common.services.vmm.AddedDevice.guest_path`).

        Args:
            device: which; its bus and slot are one of ours.
            taken: where others are.
        """

    def options(self, lent: Lent) -> str:
        """Return what the agent is told to find a disk."""

    async def put_in(self, api: Api, device_id: str, device: DeviceRecord) -> None:
        """Have Firecracker open the file of this name in the jail and show it to the guest as a disk."""

    async def take_out(self, api: Api, drive_id: str) -> None:
        """Have Firecracker close what is in a drive."""


class PciPlaces:
    """See the module."""

    buses = (HotplugBus(name=PCI_BUS, kind=BusKind.PCI, slots=_SLOTS - _FIRST_FREE_SLOT),)

    def place(self, device: DeviceRecord, taken: Collection[str]) -> str:
        """Return the lowest free slot (``next_device_id`` in src/vmm/src/pci/bus.rs)."""
        slots = (f"{slot:02x}" for slot in range(_FIRST_FREE_SLOT, _SLOTS))
        return next(slot for slot in slots if slot not in taken)

    def options(self, lent: Lent) -> str:
        """Return the serial, and that nobody tells the guest."""
        return f"serial={lent.serial},untold"

    async def put_in(self, api: Api, device_id: str, device: DeviceRecord) -> None:
        """Add a drive."""
        is_read_only = device.spec.is_read_only if isinstance(device.spec, BlockSpec) else True
        await api.put(f"/drives/{device_id}", boot.drive_body(device_id, device_id, is_read_only=is_read_only))

    async def take_out(self, api: Api, drive_id: str) -> None:
        """Remove the drive."""
        await api.delete(f"/drives/{drive_id}")


class Placeholders:
    """See the module.

    Args:
        config: how many there are.
    """

    def __init__(self, config: FirecrackerConfig) -> None:
        writable, read_only = config.placeholder_drives, config.read_only_placeholder_drives
        self._first = {WRITABLE_BUS: 0, READ_ONLY_BUS: writable}
        self.buses = (
            HotplugBus(name=WRITABLE_BUS, kind=BusKind.MMIO, slots=writable),
            HotplugBus(name=READ_ONLY_BUS, kind=BusKind.MMIO_READ_ONLY, slots=read_only),
            HotplugBus(name=NETWORK_BUS, kind=BusKind.MMIO_NETWORK, slots=MAX_PLACEHOLDERS - writable - read_only),
        )

    def place(self, device: DeviceRecord, taken: Collection[str]) -> str:
        """Return the node of the drive's disk in a guest that has no others: the kernel counts them from ``vda``.

        Of a network device nothing is known but its address.
        """
        if device.bus == NETWORK_BUS:
            return ""
        return f"/dev/vd{chr(ord('a') + self._number(device))}"

    def options(self, lent: Lent) -> str:
        """Return the serial, and the size that the guest must have heard of before it may use the disk."""
        return f"serial={lent.serial},sectors={lent.sectors}"

    async def put_in(self, api: Api, device_id: str, device: DeviceRecord) -> None:
        """Put a disk in place of the sector."""
        await self._set(api, boot.drive(self._number(device)), device_id)

    async def take_out(self, api: Api, drive_id: str) -> None:
        """Put the sector back."""
        await self._set(api, drive_id, boot.PLACEHOLDER)

    async def _set(self, api: Api, drive_id: str, path: str) -> None:
        await api.patch(f"/drives/{drive_id}", {"drive_id": drive_id, "path_on_host": path})

    def _number(self, device: DeviceRecord) -> int:
        return self._first[device.bus] + device.slot


def of(config: FirecrackerConfig) -> Places:
    """Return the places of a VM with this configuration."""
    return PciPlaces() if boot.is_on_pci(config) else Placeholders(config)


def require(places: Places, bus: str, slot: int) -> None:
    """Refuse a bus or slot that a VM does not have.

    Raises:
        UsageError: it has not.
    """
    if not any(own.name == bus and 0 <= slot < own.slots for own in places.buses):
        has = ", ".join(f"{own.name} with {own.slots}" for own in places.buses)
        raise UsageError(f"this VM has no slot {slot} on a hotplug bus {bus!r}", hint=f"it has {has}")
