"""All that is plugged into one VM: devices on its PCI bus, and parts of its totals; the record has both."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.services.vmm import AddDevice, AddedDevice, PresentDevice
    from procs.vmm_manager.drivers.cloud_hypervisor.devices import Devices
    from procs.vmm_manager.drivers.cloud_hypervisor.parts import Parts


class Inventory:
    """See :class:`procs.vmm_manager.drivers.Devices`."""

    def __init__(self, devices: Devices, parts: Parts) -> None:
        self._devices = devices
        self._parts = parts

    async def find(self, serial: str) -> AddedDevice | None:
        """Return what an attach brought, if Cloud Hypervisor has it."""
        return await self._devices.find(serial) or await self._parts.find(serial)

    async def add(self, request: AddDevice) -> AddedDevice:
        """Plug."""
        return await (self._devices if self._devices.takes(request.spec) else self._parts).add(request)

    async def remove(self, hypervisor_id: str) -> None:
        """Ask the guest to let go."""
        await (self._parts if self._parts.has(hypervisor_id) else self._devices).remove(hypervisor_id)

    async def present(self) -> list[PresentDevice]:
        """Return what Cloud Hypervisor has."""
        return [*await self._devices.present(), *await self._parts.present()]

    async def reconcile(self) -> None:
        """Finish what was left half-done, and notice what went, while nobody listened."""
        await self._devices.reconcile()
        await self._parts.reconcile()

    def adopt(self) -> None:
        """Go on with what an earlier manager started for its devices."""
        self._devices.adopt()

    async def forget(self, hypervisor_id: str) -> None:
        """Free what a device had that has been ejected, and tell."""
        await self._devices.forget(hypervisor_id)
