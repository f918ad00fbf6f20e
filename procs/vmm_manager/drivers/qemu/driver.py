"""Starting QEMU, and taking over a QEMU that another manager started."""

from __future__ import annotations

import asyncio
import os
import shlex
from contextlib import AsyncExitStack, ExitStack, suppress
from typing import TYPE_CHECKING

from common import log, paths
from common.config import QemuConfig
from common.errors import HypervisorError
from common.linux import cgroup
from common.services.vmm import Vm
from procs.vmm_manager.drivers import Capabilities
from procs.vmm_manager.drivers.probe import Probe
from procs.vmm_manager.drivers.qemu import vsock_daemon
from procs.vmm_manager.drivers.qemu.channel import make_device
from procs.vmm_manager.drivers.qemu.cmdline import QMP_SOCKET, QemuCommand, probe_argv
from procs.vmm_manager.drivers.qemu.kinds import KINDS
from procs.vmm_manager.drivers.qemu.machine import QemuMachine
from procs.vmm_manager.drivers.qemu.qmp import Qmp
from procs.vmm_manager.drivers.qemu.topology import Topology
from procs.vmm_manager.drivers.spawn import Process, listening

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.workers import Workers
    from procs.vmm_manager.drivers import Restoring
    from procs.vmm_manager.drivers.qemu.channel import Device
    from procs.vmm_manager.record import VmRecord

_LOG = "qemu.log"
_START_TIMEOUT_S = 30.0
"""How long QEMU may take until its monitor answers: it loads the kernel first, and the host may be busy."""
_LAST_WORDS_S = 1.0
"""How long QEMU may take to end after it has closed its monitor."""


class QemuDriver:
    """Makes :class:`QemuMachine`; see :class:`procs.vmm_manager.drivers.Driver`."""

    name = "qemu"
    capabilities = Capabilities(devices=tuple(KINDS), can_hold=True)

    def __init__(self) -> None:
        self._probe = Probe(probe_argv)

    async def prepare(self) -> None:
        """Find out whether KVM works."""
        await self._probe.prepare(QemuConfig)

    async def start(
        self,
        record: VmRecord,
        workers: Workers,
        on_removed: Callable[[str], None],
        restoring: Restoring | None = None,
    ) -> QemuMachine:
        """Start QEMU and return when its monitor answers; the guest boots meanwhile.

        Raises:
            HypervisorError: QEMU does not run with this configuration; its own words are in the message.
        """
        config = record.config
        assert isinstance(config, QemuConfig)
        assert restoring is None, "the capabilities say so"
        accelerator = (await self._probe.verdict(config)).accelerator
        directory = paths.vm_dir(record.sandbox_id)
        async with AsyncExitStack() as undo:
            device = await make_device(config, directory=directory, cgroup=cgroup.path(record.sandbox_id))
            if device.daemon is not None:
                undo.push_async_callback(device.daemon.end)
                record.vsock_daemon = device.daemon.identity
            process = _spawn(record, config, accelerator, directory, device)
            undo.push_async_callback(process.end)
            qmp = Qmp(record.sandbox_id, directory)
            version = await _greet(qmp, process, config)
            record.vm = Vm(
                sandbox_id=record.sandbox_id,
                hypervisor=self.name,
                version=version,
                accelerator=accelerator,
                process=process.identity,
                channel=device.where(directory),
                console_log=f"{directory}/console.log",
                hotplug_buses=Topology(config).buses,
                device_manager=record.device_manager,
            )
            record.save()
            undo.pop_all()
        machine = QemuMachine(record, record.vm, config, process, qmp, workers, on_removed)
        machine.watch()
        if device.daemon is not None:
            vsock_daemon.watch(device.daemon, process, qmp, record.sandbox_id, workers)
        return machine

    async def adopt(self, record: VmRecord, workers: Workers, on_removed: Callable[[str], None]) -> QemuMachine | None:
        """Take over a running QEMU; None if it is gone or was never finished."""
        if record.vm is None or not isinstance(record.config, QemuConfig):
            return None
        directory = paths.vm_dir(record.sandbox_id)
        process = Process.find(record.vm.process, directory=directory, log=_LOG)
        if process is None:
            return None
        qmp = Qmp(record.sandbox_id, directory)
        machine = QemuMachine(record, record.vm, record.config, process, qmp, workers, on_removed)
        await machine.take_over()
        vsock_daemon.adopt(record, process, qmp, workers)
        return machine


def _spawn(record: VmRecord, config: QemuConfig, accelerator: str, directory: str, device: Device) -> Process:
    """Start QEMU, which inherits what its device has open."""
    sandbox_id = record.sandbox_id
    with ExitStack() as own:
        for fd in device.fds:
            own.callback(os.close, fd)
        listener = own.enter_context(listening(directory, QMP_SOCKET))
        argv = QemuCommand(
            sandbox_id=sandbox_id,
            config=config,
            accelerator=accelerator,
            qmp_fd=listener.fileno(),
            channel=device,
            is_held=record.is_held,
        ).argv()
        log.get().info("starting QEMU", argv=shlex.join(argv))
        fds = [listener.fileno(), *device.fds]
        return Process.start(argv, cgroup=cgroup.path(sandbox_id), directory=directory, log=_LOG, fds=fds)


async def _greet(qmp: Qmp, process: Process, config: QemuConfig) -> str:
    """Wait for QEMU's greeting and return its version. If QEMU ends, so does the connection that waits for it."""
    try:
        return await qmp.connect(timeout_s=_START_TIMEOUT_S)
    except HypervisorError as err:
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await process.wait()
        what = err.message if process.is_running else "QEMU ended before it ran"
        said = process.output.tail().strip() or "it said nothing"
        raise HypervisorError(
            f"{what}: {said}",
            hint=f"check [hypervisor.qemu] in the configuration: path {config.path}, kernel {config.kernel}, "
            f"initrd {config.initrd}",
        ) from err
