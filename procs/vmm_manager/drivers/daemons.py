"""The virtiofsd processes of one VM, one for each directory that it shares, whatever the hypervisor.

A daemon ends when the VMM closes its connection. If it ends before, its device never answers again, and who asks it in
the guest waits for ever and cannot be killed. So that is told, and the VM is ended: whoever waits for a container
learns of it as of any other death of the VM.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from common import log, paths
from common.linux import cgroup
from common.services.vmm import ShareSpec
from procs.vmm_manager.drivers import virtiofsd
from procs.vmm_manager.drivers.spawn import Process

if TYPE_CHECKING:
    from common.config import VirtioFsSection
    from common.workers import Workers
    from procs.vmm_manager.record import VmRecord

_COMMON_END_S = 1.0


class Daemons:
    """Starts and watches; a daemon is named as its device is in the record, and so is its socket in the VM's directory.

    Args:
        record: of the VM.
        config: which daemon, and how it serves.
        vmm: the VM's process, which ends with any of its daemons.
        workers: who runs what waits for their ends.
    """

    def __init__(self, record: VmRecord, config: VirtioFsSection, vmm: Process, workers: Workers) -> None:
        self._record = record
        self._config = config
        self._vmm = vmm
        self._workers = workers
        self._directory = paths.vm_dir(record.sandbox_id)
        self._daemons: dict[str, Process] = {}

    def start(self, name: str) -> None:
        """Serve the directory of a device that is in the record."""
        device = self._record.devices[name]
        assert isinstance(device.spec, ShareSpec)
        daemon = virtiofsd.start(
            self._config,
            source=device.spec.source,
            name=name,
            directory=self._directory,
            cgroup=cgroup.path(self._record.sandbox_id),
            log=_log_name(name),
        )
        device.daemon = daemon.identity
        self._record.save()
        self._watch(name, daemon)

    async def end(self, name: str, *, ends_by_itself: bool) -> None:
        """Be done with a daemon.

        Args:
            name: which; one that is not there is fine.
            ends_by_itself: the VMM is about to close the connection, or has: there is no need to wait.
        """
        daemon = self._daemons.pop(name, None)
        if daemon is not None and not ends_by_itself:
            await daemon.end()

    def clear(self, name: str) -> None:
        """Remove what a daemon had in the VM's directory."""
        for file in (name, _log_name(name)):
            (Path(self._directory) / file).unlink(missing_ok=True)

    def said(self, name: str) -> str:
        """Return what the daemon printed, as an addition to a message."""
        daemon = self._daemons.get(name)
        said = daemon.output.tail().strip() if daemon else ""
        return f"; virtiofsd said: {said or 'nothing'}"

    def adopt(self, name: str) -> None:
        """Watch a daemon that an earlier manager started."""
        identity = self._record.devices[name].daemon
        if identity is None:
            return
        daemon = Process.find(identity, directory=self._directory, log=_log_name(name))
        if daemon is not None:
            self._watch(name, daemon)
        elif not self._vmm.is_ending:
            self._end_vm(name, "nothing that is still known")

    def _watch(self, name: str, daemon: Process) -> None:
        self._daemons[name] = daemon
        self._workers.spawn(self._wait(name, daemon))

    async def _wait(self, name: str, daemon: Process) -> None:
        """Wait for the end of a virtiofsd, and end the VM if its device is still in use."""
        is_missed = await ends_before(daemon, self._vmm)
        if self._daemons.pop(name, None) is not None and is_missed:
            self._end_vm(name, daemon.output.tail())

    def _end_vm(self, name: str, said: str) -> None:
        log.get().error("virtiofsd died, ending its VM", sandbox=self._record.sandbox_id, device=name, said=said)
        self._vmm.kill()


async def ends_before(daemon: Process, vmm: Process) -> bool:
    """Wait for the end of a daemon; return whether its VM was to live on.

    A sandbox's processes are killed together, though one after the other, and a VMM closes its connections before it
    has ended, perhaps long before. So it is given time to be killed, and none to end.
    """
    await daemon.wait()
    with suppress(TimeoutError):
        async with asyncio.timeout(_COMMON_END_S):
            await vmm.wait()
    return not vmm.is_ending


def _log_name(name: str) -> str:
    return f"{name}.log"
