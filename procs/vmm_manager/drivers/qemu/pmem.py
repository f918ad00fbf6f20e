"""Persistent memory of a VM: each a memory backend that maps a file of the host, and a virtio-pmem device on it.

The device takes room of ``default_maxmemory``, as memory modules do, and none of ``memory_slots``. QEMU unplugs no
virtio device that is memory, so one that has come stays as long as the VM.

Sources: qapi/qom.json (``memory-backend-file``) and hw/i386/pc.c (``pc_virtio_md_pci_unplug_request``) of QEMU 7.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.errors import UnsupportedError
from common.services.vmm import PmemSpec
from procs.vmm_manager.drivers.qemu import objects
from procs.vmm_manager.drivers.qemu.backends import Backend
from procs.vmm_manager.drivers.sources import file_size

if TYPE_CHECKING:
    from common.config import QemuConfig
    from procs.vmm_manager.drivers.qemu.qmp import Qmp
    from procs.vmm_manager.record import DeviceRecord


class Pmem(Backend):
    """Files that a guest maps."""

    prefix = "pmem-"
    kept = "QEMU unplugs no virtio device that is memory"

    def __init__(self, config: QemuConfig, qmp: Qmp) -> None:
        self._config = config
        self._qmp = qmp

    async def make(self, device_id: str, device: DeviceRecord) -> dict[str, object]:
        """Have QEMU map the file, as it is: of one that is not there QEMU would make one.

        Raises:
            UnsupportedError: the VM was started without room for it.
            NotFoundError: there is no such file.
            HypervisorError: QEMU refused.
        """
        spec = device.spec
        assert isinstance(spec, PmemSpec)
        if not self._config.may_grow:
            raise UnsupportedError(
                f"the VM has no room for {spec.source} as memory",
                hint="set default_maxmemory of [hypervisor.qemu] to default_memory and what is to come, in MiB",
            )
        size = file_size(spec.source)
        backend = {"mem-path": spec.source, "size": size, "share": True, "readonly": spec.is_read_only}
        await objects.add(self._qmp, "memory-backend-file", device_id, **backend)
        return {"driver": "virtio-pmem-pci", "memdev": device_id}

    async def unmake(self, device_id: str) -> None:
        """Have QEMU unmap the file."""
        if device_id in await self.made():
            await objects.remove(self._qmp, device_id)

    async def made(self) -> set[str]:
        """Return the mappings that QEMU has."""
        return await objects.listed(self._qmp, self.prefix)
