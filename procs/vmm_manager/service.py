"""The VM manager's verbs (``common.services.vmm``), each a line to the registry or a machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.bus.wire import Empty
from common.services import vmm

if TYPE_CHECKING:
    from common.bus.server import BusServer
    from procs.vmm_manager.registry import Registry


class VmmService:
    """Answers for one registry."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def register(self, server: BusServer) -> None:
        """Register every verb."""
        server.register(vmm.CREATE_VM, self._registry.create)
        server.register(vmm.DESCRIBE_VM, self._describe)
        server.register(vmm.DESTROY_VM, self._destroy)
        server.register(vmm.LIST_VMS, self._list)
        server.register(vmm.ADD_DEVICE, self._registry.add_device)
        server.register(vmm.REMOVE_DEVICE, self._remove_device)
        server.register(vmm.LIST_PRESENT_DEVICES, self._list_present_devices)

    async def _describe(self, request: vmm.SandboxRef) -> vmm.VmStatus:
        return await self._registry.describe(request.sandbox_id)

    async def _destroy(self, request: vmm.SandboxRef) -> Empty:
        await self._registry.destroy(request.sandbox_id)
        return Empty()

    async def _list(self, _: Empty) -> vmm.VmList:
        return vmm.VmList(vms=self._registry.vms())

    async def _remove_device(self, request: vmm.RemoveDevice) -> Empty:
        await self._registry.machine(request.sandbox_id).remove_device(request.hypervisor_id)
        return Empty()

    async def _list_present_devices(self, request: vmm.SandboxRef) -> vmm.PresentDevices:
        present = await self._registry.machine(request.sandbox_id).present_devices()
        return vmm.PresentDevices(devices=tuple(present))
