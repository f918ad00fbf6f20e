"""One VM under Firecracker: its process, its API, its disks.

Only the process is watched, by pidfd: its end is the VM's end, and a guest that panics or resets ends it. The API has
no events, and what it does is done when it answers.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from common import log
from common.errors import KataError
from common.services.vmm import BlockSpec, NetworkSpec
from procs.vmm_manager.drivers.firecracker import boot, places, snapshots
from procs.vmm_manager.drivers.firecracker.api import Api
from procs.vmm_manager.drivers.firecracker.devices import Devices
from procs.vmm_manager.drivers.firecracker.kinds import NOT_STARTED, Disks, Nics
from procs.vmm_manager.drivers.firecracker.metrics import counters
from procs.vmm_manager.drivers.lines import Lines, Relay
from procs.vmm_manager.drivers.output import Output

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.config import FirecrackerConfig
    from common.services.vmm import Vm
    from procs.vmm_manager.drivers.console import Console
    from procs.vmm_manager.drivers.firecracker.jail import Jail
    from procs.vmm_manager.drivers.firecracker.kinds import Kind
    from procs.vmm_manager.drivers.firecracker.metrics import Counters
    from procs.vmm_manager.drivers.spawn import Process
    from procs.vmm_manager.record import VmRecord

LOG, METRICS = "log", "metrics"
"""The FIFOs of Firecracker's log and of its counters, in the jail; the guest's serial port is its standard output."""


class FirecrackerMachine:
    """A running Firecracker; see :class:`procs.vmm_manager.drivers.Machine`."""

    def __init__(
        self,
        record: VmRecord,
        vm: Vm,
        config: FirecrackerConfig,
        process: Process,
        console: Console,
        jail: Jail,
        on_removed: Callable[[str], None],
    ) -> None:
        self.vm = vm
        self.config = config
        self._jail = jail
        self._process = process
        self._console = console
        self._api = Api(str(jail.root))
        self.counters: Counters = {}
        self._log, self._metrics = Output(jail.root / LOG), Output(jail.root / METRICS)
        relay = Relay(vm.sandbox_id, "Firecracker", asyncio.get_running_loop().time)
        self._log.follow(Lines(relay.take).feed)
        self._metrics.follow(Lines(self._count).feed)
        where = places.of(config)
        kinds: dict[type, Kind] = {
            BlockSpec: Disks(self._api, jail, where),
            NetworkSpec: Nics(self._api, jail, vm.process.pid, is_on_pci=boot.is_on_pci(config)),
        }
        self.devices = Devices(record, where, kinds, self._api, on_removed)

    @property
    def is_running(self) -> bool:
        """Whether Firecracker lives."""
        return self._process.is_running

    async def take_over(self) -> None:
        """Ask what became of the devices of a VM that an earlier manager started; if that cannot be, it runs on."""
        try:
            await self.devices.present()
        except (KataError, OSError) as err:
            log.get().error("Firecracker does not tell its devices", sandbox=self.vm.sandbox_id, error=str(err))

    async def wait_end(self) -> None:
        """Wait until Firecracker is gone."""
        await self._process.wait()
        self._console.close()
        for output in (self._log, self._metrics):
            if output.fd >= 0:  # the first of those who wait
                output.close()

    async def runstate(self) -> str:
        """Return Firecracker's state: ``running``, ``paused`` or ``not started``."""
        return str((await self._api.get("/"))["state"]).lower()

    async def pause(self) -> None:
        """Stop the guest's processors (``PATCH /vm``; ``VmState`` of src/firecracker/swagger/firecracker.yaml)."""
        await self._api.patch("/vm", {"state": "Paused"})

    async def resume(self) -> None:
        """Let them go on, or begin."""
        if await self.runstate() == NOT_STARTED:
            await boot.start(self._api)
            await asyncio.to_thread(self._jail.forget_boot)
            return
        await self._api.patch("/vm", {"state": "Resumed"})

    async def snapshot(self, directory: str) -> None:
        """Write the VM into a directory."""
        await snapshots.write(self._api, self._jail, self.vm.process.pid, directory)

    async def console_tail(self) -> str:
        """Return the last of what the guest printed."""
        return self._console.tail()

    def log_tail(self) -> str:
        """Return the last of what Firecracker printed of its own, and logged."""
        return self._process.output.tail() + self._log.tail()

    def _count(self, line: bytes) -> None:
        """Take what Firecracker counts; a line that is cut is followed by another in a minute."""
        self.counters = counters(line) or self.counters
