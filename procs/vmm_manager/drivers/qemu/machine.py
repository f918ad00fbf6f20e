"""One VM under QEMU: its process, its monitor, its devices.

Three things are watched. The process, by pidfd: its end is the VM's end. The monitor's events. And the monitor itself:
if the connection is lost while QEMU lives, it is made again, and what happened meanwhile is asked.

A guest that has ended, by panic, reset or power-off, leaves QEMU paused (``cmdline``), so that its console can be read;
then QEMU is killed.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from common import log
from common.errors import KataError
from procs.vmm_manager.drivers.qemu.console import Console
from procs.vmm_manager.drivers.qemu.devices import Devices
from procs.vmm_manager.drivers.qemu.kinds import Context, backends
from procs.vmm_manager.drivers.qemu.qmp import COMMAND_TIMEOUT_S
from procs.vmm_manager.drivers.qemu.topology import Topology

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from common.config import QemuConfig
    from common.services.vmm import Vm
    from common.workers import Workers
    from procs.vmm_manager.drivers.qemu.qmp import Qmp
    from procs.vmm_manager.drivers.spawn import Process
    from procs.vmm_manager.record import VmRecord

_DEAD = frozenset({"guest-panicked", "internal-error", "shutdown"})
"""Run states from which a guest does not come back (``RunState`` in QEMU's qapi/run-state.json)."""

_LAST_WORDS_S = 1.0
"""How long a process may outlive its closed monitor before that counts as a fault of the monitor."""


class QemuMachine:
    """A running QEMU; see :class:`procs.vmm_manager.drivers.Machine`."""

    counters: Mapping[str, Mapping[str, int]] = MappingProxyType({})

    def __init__(
        self,
        record: VmRecord,
        vm: Vm,
        config: QemuConfig,
        process: Process,
        qmp: Qmp,
        workers: Workers,
        on_removed: Callable[[str], None],
    ) -> None:
        self.vm = vm
        self._process = process
        self._qmp = qmp
        self._workers = workers
        self._console = Console(Path(vm.console_log), qmp)
        context = Context(
            record=record,
            config=config,
            accelerator=vm.accelerator,
            qmp=qmp,
            process=process,
            workers=workers,
        )
        self.devices = Devices(record, Topology(config), backends(context), qmp, process, on_removed)

    @property
    def is_running(self) -> bool:
        """Whether QEMU lives."""
        return self._process.is_running

    def watch(self) -> None:
        """Begin to hear QEMU's events and to care for its monitor."""
        self._workers.spawn(self._qmp.follow(self._handle))
        self._workers.spawn(self._keep_monitor())

    async def take_over(self) -> None:
        """Begin to watch a VM that an earlier manager started, and ask what happened meanwhile."""
        self.devices.adopt()
        await self._reconnect()
        self.watch()

    async def wait_end(self) -> None:
        """Wait until QEMU is gone."""
        await self._process.wait()

    async def runstate(self) -> str:
        """Return QEMU's run state."""
        return str((await self._qmp.execute("query-status"))["status"])

    async def pause(self) -> None:
        """Stop the guest's processors."""
        await self._qmp.execute("stop")

    async def resume(self) -> None:
        """Let them go on."""
        await self._qmp.execute("cont")

    async def console_tail(self) -> str:
        """Return the last of what the guest printed."""
        return await self._console.tail()

    def log_tail(self) -> str:
        """Return the last of what QEMU printed."""
        return self._process.output.tail()

    async def _handle(self, event: str, data: dict[str, Any]) -> None:
        try:
            if event == "DEVICE_DELETED":
                await self.devices.note_deleted(str(data.get("device", "")), str(data.get("path", "")))
            elif event == "DEVICE_UNPLUG_GUEST_ERROR":
                log.get().warning("the guest refused to let a device go", sandbox=self.vm.sandbox_id, **data)
            elif event == "STOP":
                await self._end_if_dead()
        except KataError as err:
            log.get().error("an event of QEMU came to nothing", sandbox=self.vm.sandbox_id, name=event, error=str(err))

    async def _end_if_dead(self) -> None:
        state = await self.runstate()
        if state in _DEAD:
            log.get().warning("guest ended", sandbox=self.vm.sandbox_id, runstate=state)
            await self._console.tail()
            self._process.kill()

    async def _keep_monitor(self) -> None:
        while True:
            await self._qmp.wait_lost()
            with suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORDS_S):
                    await self._process.wait()
            if self._process.is_ending:
                return
            log.get().error("QEMU's monitor was lost, connecting again", sandbox=self.vm.sandbox_id)
            if not await self._reconnect():
                return

    async def _reconnect(self) -> bool:
        """Connect to the monitor and ask what was missed. Without one the VM runs on; only its devices are fixed."""
        try:
            await self._qmp.connect(timeout_s=COMMAND_TIMEOUT_S)
            await self.devices.reconcile()
            await self._end_if_dead()
        except KataError as err:
            log.get().error("QEMU's monitor cannot be used", sandbox=self.vm.sandbox_id, error=str(err))
            return False
        return True
