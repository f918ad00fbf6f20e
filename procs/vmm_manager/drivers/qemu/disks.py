"""Disks of a VM: each a block node that QEMU has open, and a virtio-blk or SCSI device on it.

The host's file is raw: its bytes are the disk's. QEMU opens it with the block node and closes it with the node; while
it is open, QEMU holds a lock on it that keeps a second writer out, in this VM or another (``file.locking``).

virtio-blk is removed when the guest lets go. A SCSI device is removed as soon as that is asked for, whatever the guest
does (``virtio_scsi_hotunplug`` in hw/scsi/virtio-scsi.c): its guest must have let go before.

Source: qapi/block-core.json of QEMU 7.2.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from common.services.vmm import BlockDriver, BlockSpec
from procs.vmm_manager.drivers.qemu.backends import Backend
from procs.vmm_manager.drivers.sources import is_block_device

if TYPE_CHECKING:
    from common.config import QemuConfig
    from procs.vmm_manager.drivers.qemu.qmp import Qmp
    from procs.vmm_manager.record import DeviceRecord

_DEVICES: dict[BlockDriver, dict[str, object]] = {
    # Without the legacy interface it needs no port numbers, of which a bridge has few.
    BlockDriver.VIRTIO_BLK: {"driver": "virtio-blk-pci", "disable-legacy": "on"},
    BlockDriver.VIRTIO_SCSI: {"driver": "scsi-hd"},
}


class Disks(Backend):
    """The id of a device is also its node's name."""

    prefix = "disk-"

    def __init__(self, config: QemuConfig, qmp: Qmp) -> None:
        self._config = config
        self._qmp = qmp

    async def make(self, device_id: str, device: DeviceRecord) -> dict[str, object]:
        """Have QEMU open the file.

        Raises:
            NotFoundError: there is no such file.
            UsageError: it is no disk.
            HypervisorError: QEMU cannot open it, perhaps because another has it open.
        """
        spec = device.spec
        assert isinstance(spec, BlockSpec)
        is_device = await asyncio.to_thread(is_block_device, spec.source)
        protocol = "host_device" if is_device else "file"
        await self._qmp.execute("blockdev-add", **node(device_id, spec, protocol, self._config))
        return {**_DEVICES[spec.driver], "drive": device_id, "serial": device.serial}

    async def unmake(self, device_id: str) -> None:
        """Have QEMU close the file."""
        if device_id in await self.made():
            await self._qmp.execute("blockdev-del", **{"node-name": device_id})

    async def made(self) -> set[str]:
        """Return the nodes that QEMU has."""
        nodes = await self._qmp.execute("query-named-block-nodes", flat=True)
        return {name for name in (str(item["node-name"]) for item in nodes) if name.startswith(self.prefix)}


def node(name: str, spec: BlockSpec, protocol: str, config: QemuConfig) -> dict[str, object]:
    """Return the arguments of ``blockdev-add``; pure."""
    cache = {"direct": config.block_device_cache_direct, "no-flush": config.block_device_cache_noflush}
    return {
        "driver": "raw",
        "node-name": name,
        "read-only": spec.is_read_only,
        "discard": "unmap",
        **({"cache": cache} if config.block_device_cache_set else {}),
        "file": {"driver": protocol, "filename": spec.source, "aio": config.block_device_aio.value},
    }
