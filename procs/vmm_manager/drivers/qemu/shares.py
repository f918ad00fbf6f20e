"""Directories that a VM shares by virtio-fs: each a virtiofsd, and a chardev of QEMU that leads to it.

virtiofsd ends when QEMU closes its connection. If it ends before, its device never answers again, and who asks it in
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
from procs.vmm_manager.drivers.qemu import virtiofsd
from procs.vmm_manager.drivers.qemu.spawn import Process

if TYPE_CHECKING:
    from common.config import QemuConfig
    from common.workers import Workers
    from procs.vmm_manager.drivers.qemu.qmp import Qmp
    from procs.vmm_manager.record import DeviceRecord, VmRecord

_COMMON_END_S = 1.0


class Shares:
    """See :class:`procs.vmm_manager.drivers.qemu.devices.Backend`; the id of a device is also its chardev's."""

    prefix = "share-"

    def __init__(self, record: VmRecord, config: QemuConfig, qmp: Qmp, qemu: Process, workers: Workers) -> None:
        self._record = record
        self._config = config
        self._qmp = qmp
        self._qemu = qemu
        self._workers = workers
        self._directory = paths.vm_dir(record.sandbox_id)
        self._daemons: dict[str, Process] = {}

    async def make(self, device_id: str, device: DeviceRecord) -> dict[str, object]:
        """Serve the directory and lead QEMU there.

        Raises:
            HypervisorError: QEMU or virtiofsd refused.
        """
        spec = device.spec
        assert isinstance(spec, ShareSpec)
        daemon = virtiofsd.start(
            self._config,
            source=spec.source,
            name=device_id,
            directory=self._directory,
            cgroup=cgroup.path(self._record.sandbox_id),
            log=_log_name(device_id),
        )
        device.daemon = daemon.identity
        self._record.save()
        self._watch(device_id, daemon)
        address = {"type": "unix", "data": {"path": device_id}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        await self._qmp.execute("chardev-add", id=device_id, backend=backend)
        return {"driver": "vhost-user-fs-pci", "chardev": device_id, "tag": spec.tag}

    async def unmake(self, device_id: str) -> None:
        """Close QEMU's connection, which ends the daemon; one that QEMU never met is ended."""
        is_known_to_qemu = device_id in await self.made()
        daemon = self._daemons.pop(device_id, None)
        if is_known_to_qemu:
            await self._qmp.execute("chardev-remove", id=device_id)
        elif daemon is not None:
            await daemon.end()
        for name in (device_id, _log_name(device_id)):
            (Path(self._directory) / name).unlink(missing_ok=True)

    async def made(self) -> set[str]:
        """Return the chardevs that QEMU has."""
        chardevs = await self._qmp.execute("query-chardev")
        return {label for label in (str(item["label"]) for item in chardevs) if label.startswith(self.prefix)}

    def said(self, device_id: str) -> str:
        """Return what the daemon printed."""
        daemon = self._daemons.get(device_id)
        said = daemon.output.tail().strip() if daemon else ""
        return f"; virtiofsd said: {said or 'nothing'}"

    def adopt(self, device_id: str) -> None:
        """Watch a daemon that an earlier manager started."""
        identity = self._record.devices[device_id].daemon
        if identity is None:
            return
        daemon = Process.find(identity, directory=self._directory, log=_log_name(device_id))
        if daemon is None:
            self._end_vm(device_id, "nothing that is still known")
        else:
            self._watch(device_id, daemon)

    def _watch(self, device_id: str, daemon: Process) -> None:
        self._daemons[device_id] = daemon
        self._workers.spawn(self._wait(device_id, daemon))

    async def _wait(self, device_id: str, daemon: Process) -> None:
        """Wait for the end of a virtiofsd, and end the VM if its device is still in use."""
        await daemon.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(_COMMON_END_S):  # a sandbox's processes are killed together
                await self._qemu.wait()
        if self._daemons.pop(device_id, None) is not None and self._qemu.is_running:
            self._end_vm(device_id, daemon.output.tail())

    def _end_vm(self, device_id: str, said: str) -> None:
        log.get().error("virtiofsd died, ending its VM", sandbox=self._record.sandbox_id, device=device_id, said=said)
        self._qemu.kill()


def _log_name(device_id: str) -> str:
    return f"{device_id}.log"
