"""What the VM managers publish, and what is done when some of it may have been missed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common import log
from common.bus.events import Received, Resync, Subscriber
from common.bus.wire import Empty
from common.errors import KataError, WireError
from common.services import vmm
from common.trace import reach
from procs.device_manager.commands import CALL_TIMEOUT_S, Command
from procs.device_manager.states import Action, Event

if TYPE_CHECKING:
    from collections.abc import Iterable

    from common.bus.client import BusClient
    from common.workers import Workers
    from procs.device_manager.lives import Lives


class News:
    """Hears what becomes of VMs and devices, and compares when it may not have heard all.

    Args:
        service: the shard's bus name, which the VMs of its sandboxes bear.
        lives: what is told the news.
        bus: leads to the VM managers.
        workers: who compares.
    """

    def __init__(self, service: str, lives: Lives, bus: BusClient, workers: Workers) -> None:
        self._service = service
        self._lives = lives
        self._bus = bus
        self._workers = workers

    async def follow(self, hypervisors: Iterable[str]) -> None:
        """Hear what the VM managers publish of this shard's sandboxes, for ever."""
        services = {vmm.service_name(hypervisor): hypervisor for hypervisor in hypervisors}
        async with Subscriber(dict.fromkeys(services, self._service)) as news:
            async for item in news:
                if isinstance(item, Resync) or not self._hear(item):
                    self._workers.spawn(self._reconcile(item.service, services[item.service]))

    def _hear(self, item: Received) -> bool:
        """Take up an event; return whether it could be read."""
        try:
            exited = item.body_of(vmm.VM_EXITED)
            removed = item.body_of(vmm.DEVICE_REMOVED)
        except WireError as err:
            log.get().warning("an event is not readable", service=item.service, error=str(err))
            return False
        if exited is not None:
            self._lives.end(self._lives.table.of(exited.sandbox_id))
            self._lives.table.forget(exited.sandbox_id)
        if removed is not None:
            self._note_removed(removed)
        return True

    def _note_removed(self, removed: vmm.DeviceRemoved) -> None:
        """Note the end of a device. If its add has not been answered, its name says nothing yet: it is asked later."""
        reach("removed:heard")
        devices = self._lives.table.of(removed.sandbox_id)
        for device in devices:
            if device.hypervisor_id == removed.hypervisor_id:
                self._lives.happen(device.device_id, Event.REMOVED)
        self._lives.suspect(device for device in devices if not device.hypervisor_id)

    async def _reconcile(self, service: str, hypervisor: str) -> None:
        """Have everything of this shard that a VM manager has made sure, each sandbox by itself."""
        table = self._lives.table
        held = [device for device in table if device.hypervisor == hypervisor]
        claimants = table.claimants(hypervisor)
        try:
            vms = await self._bus.call(service, vmm.LIST_VMS, Empty(), timeout_s=CALL_TIMEOUT_S)
        except KataError as err:
            log.get().warning("devices not compared", service=service, error=str(err))
            return
        running = {vm.sandbox_id for vm in vms.vms if vm.device_manager == self._service}
        self._lives.end(device for device in held if device.sandbox_id not in running)
        for sandbox_id in claimants - running:
            table.forget(sandbox_id)
        self._lives.doubt(device for device in held if device.sandbox_id in running)
        for sandbox_id in running:
            self._lives.commands.put(Command(Action.ASK, sandbox_id, hypervisor))
