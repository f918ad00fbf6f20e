"""One VM under Cloud Hypervisor: its process, its events, its devices.

Two things are watched. The process, by pidfd: its end is the VM's end. And its events: a device that is gone; a guest
that ends. A guest that is reset, which is what a kernel that panicked does, would be booted again by Cloud Hypervisor,
without its devices and its containers: so the VM is ended then.
"""

from __future__ import annotations

import asyncio
from types import MappingProxyType
from typing import TYPE_CHECKING

from common import log, paths
from common.errors import KataError
from common.services.vmm import BlockSpec, NetworkSpec, PmemSpec, ShareSpec, VfioSpec, VhostUserDiskSpec
from procs.vmm_manager.drivers.cloud_hypervisor import snapshots
from procs.vmm_manager.drivers.cloud_hypervisor.confinement import Confinement
from procs.vmm_manager.drivers.cloud_hypervisor.devices import Devices
from procs.vmm_manager.drivers.cloud_hypervisor.events import LOST, Event
from procs.vmm_manager.drivers.cloud_hypervisor.inventory import Inventory
from procs.vmm_manager.drivers.cloud_hypervisor.kinds import Disk, Kind, Nic, Pmem, Share, Vfio, VhostUserDisk
from procs.vmm_manager.drivers.cloud_hypervisor.parts import Cpus, Memory, Parts
from procs.vmm_manager.drivers.cloud_hypervisor.versions import features_of
from procs.vmm_manager.drivers.daemons import Daemons

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from common.config import ClhConfig
    from common.services.vmm import Vm
    from common.workers import Workers
    from procs.vmm_manager.drivers.cloud_hypervisor.api import Api
    from procs.vmm_manager.drivers.cloud_hypervisor.events import EventStream
    from procs.vmm_manager.drivers.console import Console
    from procs.vmm_manager.drivers.spawn import Process
    from procs.vmm_manager.record import VmRecord

_ENDS = frozenset({"rebooting", "shutdown", "panic"})
"""Events after which a guest is not the one that was started."""


class ClhMachine:
    """A running Cloud Hypervisor; see :class:`procs.vmm_manager.drivers.Machine`."""

    counters: Mapping[str, Mapping[str, int]] = MappingProxyType({})

    def __init__(
        self,
        record: VmRecord,
        vm: Vm,
        config: ClhConfig,
        process: Process,
        api: Api,
        events: EventStream,
        console: Console,
        workers: Workers,
        on_removed: Callable[[str], None],
    ) -> None:
        self.vm = vm
        self.config = config
        self._process = process
        self._api = api
        self._events = events
        self._console = console
        self._workers = workers
        confinement = Confinement(config, paths.vm_dir(vm.sandbox_id))
        self._confinement = confinement
        kinds: dict[type, Kind] = {
            ShareSpec: Share(config, api, Daemons(record, config, process, workers)),
            BlockSpec: Disk(config, api, confinement),
            VhostUserDiskSpec: VhostUserDisk(config, api),
            PmemSpec: Pmem(config, api, confinement),
            VfioSpec: Vfio(config, api),
            NetworkSpec: Nic(config, api),
        }
        totals = (Cpus(config, api), Memory(config, api))
        self.devices = Inventory(
            Devices(record, vm.hotplug_buses, kinds, features_of(vm.version), api, process, on_removed),
            Parts(record, vm.hotplug_buses, totals, api, process, workers, on_removed),
        )

    @property
    def is_running(self) -> bool:
        """Whether Cloud Hypervisor lives."""
        return self._process.is_running

    def watch(self) -> None:
        """Begin to hear Cloud Hypervisor's events, and to read its log, of which it writes much."""
        self._process.output.follow()
        follower = self._workers.spawn(self._events.follow(self._handle))
        self._workers.spawn(self._close_at_end(follower))

    async def take_over(self) -> None:
        """Begin to watch a VM that an earlier manager started, and ask what happened meanwhile.

        If it cannot be asked it runs on; only its devices are fixed.
        """
        self.devices.adopt()
        self.watch()
        await self._handle(LOST)

    async def wait_end(self) -> None:
        """Wait until Cloud Hypervisor is gone."""
        await self._process.wait()

    async def runstate(self) -> str:
        """Return Cloud Hypervisor's word for the VM's state, in small letters."""
        return str((await self._api.get("vm.info"))["state"]).lower()

    async def pause(self) -> None:
        """Stop the guest's processors."""
        await self._api.put("vm.pause")

    async def resume(self) -> None:
        """Let them go on."""
        await self._api.put("vm.resume")

    async def snapshot(self, directory: str) -> None:
        """Write the VM into a directory."""
        await snapshots.write(self._api, self._confinement, directory)

    async def console_tail(self) -> str:
        """Return the last of what the guest printed."""
        return self._console.tail()

    def log_tail(self) -> str:
        """Return the last of what Cloud Hypervisor printed."""
        return self._process.output.tail()

    async def _handle(self, event: Event) -> None:
        try:
            if event == LOST:
                await self.devices.reconcile()
            elif (event.source, event.name) == ("vm", "device-removed"):
                await self.devices.forget(event.device_id)
            elif event.name in _ENDS:
                log.get().warning("guest ended", sandbox=self.vm.sandbox_id, event_name=event.name)
                self._process.kill()
        except KataError as err:
            log.get().error(
                "an event of Cloud Hypervisor came to nothing",
                sandbox=self.vm.sandbox_id,
                name=event.name,
                error=str(err),
            )

    async def _close_at_end(self, follower: asyncio.Task[None]) -> None:
        await self._process.wait()
        follower.cancel()
        await asyncio.wait([follower])
        self._events.close()
        self._console.close()
