"""Starting QEMU, and taking over a QEMU that another manager started."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from common import log, paths
from common.channel import STREAM_PORTS
from common.errors import HypervisorError
from common.linux import cgroup
from common.processes import ProcessIdentity, wait_exit
from common.services.vmm import Vm
from procs.vmm_manager.drivers import Capabilities
from procs.vmm_manager.drivers.qemu.cmdline import AGENT_SOCKET, HOTPLUG_BUSES, QMP_SOCKET, QemuCommand, stream_socket
from procs.vmm_manager.drivers.qemu.console import read_tail
from procs.vmm_manager.drivers.qemu.machine import QemuMachine
from procs.vmm_manager.drivers.qemu.probe import Probe
from procs.vmm_manager.drivers.qemu.qmp import Qmp
from procs.vmm_manager.drivers.qemu.spawn import connect, listening, spawn

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from common.config import QemuConfig
    from common.workers import Workers
    from procs.vmm_manager.record import VmRecord

START_TIMEOUT_S = 10.0
"""How long QEMU may take until its monitor answers; that is before the guest runs."""
_LAST_WORDS_S = 1.0


class QemuDriver:
    """Makes :class:`QemuMachine`; see :class:`procs.vmm_manager.drivers.Driver`."""

    name = "qemu"
    capabilities = Capabilities(has_file_sharing=True, hotplug_buses=len(HOTPLUG_BUSES))

    def __init__(self) -> None:
        self._probe = Probe()

    async def start(
        self, record: VmRecord, config: QemuConfig, workers: Workers, on_removed: Callable[[str], None]
    ) -> QemuMachine:
        """Start QEMU and return when its monitor answers; the guest boots meanwhile.

        Raises:
            HypervisorError: QEMU does not run with this configuration; its own words are in the message.
        """
        accelerator = await self._probe.accelerator(config)
        directory = paths.vm_dir(record.sandbox_id)
        async with AsyncExitStack() as undo:
            child = _spawn_qemu(record.sandbox_id, config, accelerator, directory)
            undo.callback(child.wait)
            undo.callback(child.kill)
            qmp = Qmp(record.sandbox_id)
            version = await _connect(qmp, directory, child)
            vm = Vm(
                sandbox_id=record.sandbox_id,
                hypervisor=self.name,
                version=version,
                accelerator=accelerator,
                process=ProcessIdentity.of(child.pid),
                agent_socket=f"{directory}/{AGENT_SOCKET}",
                stream_sockets=tuple(f"{directory}/{stream_socket(port)}" for port in range(STREAM_PORTS)),
                console_log=f"{directory}/console.log",
                hotplug_buses=HOTPLUG_BUSES,
            )
            record.vm = vm
            record.config = config
            record.save()
            machine = QemuMachine(
                record, vm, config, qmp, workers, os.pidfd_open(child.pid), child=child, on_removed=on_removed
            )
            undo.pop_all()
        machine.follow()
        return machine

    async def adopt(self, record: VmRecord, workers: Workers, on_removed: Callable[[str], None]) -> QemuMachine | None:
        """Take over a running QEMU; None if it is gone or was never finished."""
        if record.vm is None or record.config is None:
            return None
        pidfd = record.vm.process.open_pidfd()
        if pidfd is None:
            return None
        qmp = Qmp(record.sandbox_id)
        try:
            await qmp.connect(connect(paths.vm_dir(record.sandbox_id), QMP_SOCKET))
        except (OSError, HypervisorError) as err:
            log.get().error("a running VM cannot be taken over", sandbox=record.sandbox_id, error=str(err))
            os.close(pidfd)
            return None
        machine = QemuMachine(record, record.vm, record.config, qmp, workers, pidfd, child=None, on_removed=on_removed)
        machine.follow()
        await machine.reconcile()
        return machine


def _spawn_qemu(sandbox_id: str, config: QemuConfig, accelerator: str, directory: str) -> subprocess.Popen[bytes]:
    with listening(directory, QMP_SOCKET) as listener:
        command = QemuCommand(sandbox_id=sandbox_id, config=config, accelerator=accelerator, qmp_fd=listener.fileno())
        argv = command.argv()
        log.get().info("starting QEMU", argv=" ".join(argv))
        return spawn(argv, cgroup=cgroup.path(sandbox_id), directory=directory, log="qemu.log", fds=[listener.fileno()])


async def _connect(qmp: Qmp, directory: str, child: subprocess.Popen[bytes]) -> str:
    """Wait for QEMU's greeting or its end, whichever comes first; return its version."""
    end = asyncio.ensure_future(wait_exit(os.pidfd_open(child.pid)))  # noqa: TID251 - both are awaited here
    greeting = asyncio.ensure_future(qmp.connect(connect(directory, QMP_SOCKET)))  # noqa: TID251
    try:
        await asyncio.wait({end, greeting}, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
        if greeting.done() and greeting.exception() is None:
            return greeting.result()
        await asyncio.wait({end}, timeout=_LAST_WORDS_S)  # the monitor closes before the process ends
        what = "ended before it ran" if end.done() else f"did not come up in {START_TIMEOUT_S:g} s"
        said = read_tail(Path(directory) / "qemu.log").strip()
        raise HypervisorError(
            f"QEMU {what}: {said}",
            hint="check [hypervisor.qemu] in the configuration",
        )
    finally:
        end.cancel()
        greeting.cancel()
        await asyncio.gather(end, greeting, return_exceptions=True)
