"""Disks that programs of the host serve: each a chardev that leads to a program, and a vhost-user-blk device on it.

The program has the guest's memory, which is shared for virtiofsd as well, and serves one VM as long as QEMU is
connected. It is not ours: whether it lives is seen by whoever started it, and a disk whose program has ended does not
answer its guest any more.

Source: docs/interop/vhost-user.rst and hw/block/vhost-user-blk.c of QEMU 7.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.services.vmm import VhostUserDiskSpec
from procs.vmm_manager.drivers.qemu import chardevs
from procs.vmm_manager.drivers.qemu.backends import Backend

if TYPE_CHECKING:
    from procs.vmm_manager.drivers.qemu.qmp import Qmp
    from procs.vmm_manager.record import DeviceRecord


class VhostUserDisks(Backend):
    """Disks behind sockets."""

    prefix = "vhost-user-disk-"

    def __init__(self, qmp: Qmp) -> None:
        self._qmp = qmp

    async def make(self, device_id: str, device: DeviceRecord) -> dict[str, object]:
        """Have QEMU connect to the program. One queue is what every program has.

        Raises:
            HypervisorError: nobody listens there.
        """
        assert isinstance(device.spec, VhostUserDiskSpec)
        await chardevs.connect(self._qmp, device_id, device.spec.source)
        return {"driver": "vhost-user-blk-pci", "disable-legacy": "on", "chardev": device_id, "num-queues": 1}

    async def unmake(self, device_id: str) -> None:
        """Have QEMU close the connection."""
        if device_id in await self.made():
            await chardevs.close(self._qmp, device_id)

    async def made(self) -> set[str]:
        """Return the connections that QEMU has."""
        return await chardevs.listed(self._qmp, self.prefix)
