"""Directories that a VM shares by virtio-fs: each a virtiofsd, and a chardev of QEMU that leads to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.services.vmm import ShareSpec
from procs.vmm_manager.drivers.qemu import chardevs
from procs.vmm_manager.drivers.qemu.backends import Backend

if TYPE_CHECKING:
    from procs.vmm_manager.drivers.daemons import Daemons
    from procs.vmm_manager.drivers.qemu.qmp import Qmp
    from procs.vmm_manager.record import DeviceRecord


class Shares(Backend):
    """The id of a device is also its chardev's."""

    prefix = "share-"

    def __init__(self, daemons: Daemons, qmp: Qmp) -> None:
        self._daemons = daemons
        self._qmp = qmp

    async def make(self, device_id: str, device: DeviceRecord) -> dict[str, object]:
        """Serve the directory and lead QEMU there.

        Raises:
            HypervisorError: QEMU or virtiofsd refused.
        """
        assert isinstance(device.spec, ShareSpec)
        self._daemons.start(device_id)
        await chardevs.connect(self._qmp, device_id, device_id)
        return {"driver": "vhost-user-fs-pci", "chardev": device_id, "tag": device.spec.tag}

    async def unmake(self, device_id: str) -> None:
        """Close QEMU's connection, which ends the daemon; one that QEMU never met is ended."""
        is_known_to_qemu = device_id in await self.made()
        await self._daemons.end(device_id, ends_by_itself=is_known_to_qemu)
        if is_known_to_qemu:
            await chardevs.close(self._qmp, device_id)
        self._daemons.clear(device_id)

    async def made(self) -> set[str]:
        """Return the chardevs that QEMU has."""
        return await chardevs.listed(self._qmp, self.prefix)

    def said(self, device_id: str) -> str:
        """Return what the daemon printed."""
        return self._daemons.said(device_id)

    def adopt(self, device_id: str) -> None:
        """Watch a daemon that an earlier manager started."""
        self._daemons.adopt(device_id)
