"""One VM under Firecracker: its process, its API, its disks.

Only the process is watched, by pidfd: its end is the VM's end, and a guest that panics or resets ends it. The API has
no events, and what it does is done when it answers.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from common import log
from common.errors import KataError
from procs.vmm_manager.drivers.firecracker import places, snapshots
from procs.vmm_manager.drivers.firecracker.api import Api
from procs.vmm_manager.drivers.firecracker.drives import Drives
from procs.vmm_manager.drivers.firecracker.metrics import counters
from procs.vmm_manager.drivers.lines import Lines, Relay
from procs.vmm_manager.drivers.output import Output

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.config import FirecrackerConfig
    from common.services.vmm import Vm
    from procs.vmm_manager.drivers.console import Console
    from procs.vmm_manager.drivers.firecracker.jail import Jail
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
        self.devices = Drives(record, places.of(config), self._api, jail, on_removed)

    @property
    def is_running(self) -> bool:
        """Whether Firecracker lives."""
        return self._process.is_running

    async def take_over(self) -> None:
        """Ask what became of the disks of a VM that an earlier manager started; if that cannot be, it runs on."""
        try:
            await self.devices.present()
        except KataError as err:
            log.get().error("Firecracker does not tell its disks", sandbox=self.vm.sandbox_id, error=str(err))

    async def wait_end(self) -> None:
        """Wait until Firecracker is gone."""
        await self._process.wait()
        self._console.close()
        for output in (self._log, self._metrics):
            if output.fd >= 0:  # the first of those who wait
                output.close()

    async def runstate(self) -> str:
        """Return Firecracker's state: ``running`` or ``paused``."""
        return str((await self._api.get("/"))["state"]).lower()

    async def pause(self) -> None:
        """Stop the guest's processors (``PATCH /vm``; ``VmState`` of src/firecracker/swagger/firecracker.yaml)."""
        await self._api.patch("/vm", {"state": "Paused"})

    async def resume(self) -> None:
        """Let them go on."""
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
