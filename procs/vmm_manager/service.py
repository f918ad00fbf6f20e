"""The VM manager's verbs (``common.services.vmm``), each a line to the registry or a machine.

The service is on the bus before it knows its VMs, since taking them over may take a while: a call that comes earlier
waits for that. What it would be told before could be wrong, for example that a VM does not exist.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import msgspec

from common.bus.wire import Empty
from common.services import vmm

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable

    from common.bus.server import BusServer
    from common.bus.wire import Verb
    from procs.vmm_manager.registry import Registry

Q = TypeVar("Q", bound=msgspec.Struct)
R = TypeVar("R", bound=msgspec.Struct)


class VmmService:
    """Answers for one registry, once it is recovered."""

    def __init__(self, registry: Registry, is_recovered: asyncio.Event) -> None:
        self._registry = registry
        self._is_recovered = is_recovered

    def register(self, server: BusServer) -> None:
        """Register every verb."""
        self._register(server, vmm.CREATE_VM, self._registry.create)
        self._register(server, vmm.DESCRIBE_VM, self._describe)
        self._register(server, vmm.DESTROY_VM, self._destroy)
        self._register(server, vmm.PAUSE_VM, self._pause)
        self._register(server, vmm.RESUME_VM, self._resume)
        self._register(server, vmm.SNAPSHOT_VM, self._snapshot)
        self._register(server, vmm.RESTORE_VM, self._registry.restore)
        self._register(server, vmm.LIST_VMS, self._list)
        self._register(server, vmm.ADD_DEVICE, self._registry.add_device)
        self._register(server, vmm.REMOVE_DEVICE, self._remove_device)
        self._register(server, vmm.LIST_PRESENT_DEVICES, self._list_present_devices)

    def _register(self, server: BusServer, verb: Verb[Q, R], handle: Callable[[Q], Awaitable[R]]) -> None:
        async def handle_when_recovered(request: Q) -> R:
            await self._is_recovered.wait()
            return await handle(request)

        server.register(verb, handle_when_recovered)

    async def _describe(self, request: vmm.SandboxRef) -> vmm.VmStatus:
        return await self._registry.describe(request.sandbox_id)

    async def _destroy(self, request: vmm.SandboxRef) -> Empty:
        await self._registry.destroy(request.sandbox_id)
        return Empty()

    async def _pause(self, request: vmm.SandboxRef) -> Empty:
        await self._registry.pause(request.sandbox_id)
        return Empty()

    async def _resume(self, request: vmm.SandboxRef) -> Empty:
        await self._registry.resume(request.sandbox_id)
        return Empty()

    async def _snapshot(self, request: vmm.SnapshotVm) -> Empty:
        await self._registry.snapshot(request)
        return Empty()

    async def _list(self, _: Empty) -> vmm.VmList:
        return vmm.VmList(vms=self._registry.vms())

    async def _remove_device(self, request: vmm.RemoveDevice) -> Empty:
        await self._registry.machine(request.sandbox_id).devices.remove(request.hypervisor_id)
        return Empty()

    async def _list_present_devices(self, request: vmm.SandboxRef) -> vmm.PresentDevices:
        present = await self._registry.machine(request.sandbox_id).devices.present()
        return vmm.PresentDevices(devices=tuple(present))
