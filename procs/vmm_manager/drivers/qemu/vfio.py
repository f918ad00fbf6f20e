"""PCI devices of the host that a VM has whole. QEMU opens them by itself, so there is nothing else to be made.

Source: docs/system/device-emulation and hw/vfio/pci.c of QEMU 7.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.services.vmm import VfioSpec
from procs.vmm_manager.drivers.qemu.backends import Backend

if TYPE_CHECKING:
    from procs.vmm_manager.record import DeviceRecord


class VfioDevices(Backend):
    """Devices of the host."""

    prefix = "vfio-"

    async def make(self, _device_id: str, device: DeviceRecord) -> dict[str, object]:
        """Say which device it is."""
        assert isinstance(device.spec, VfioSpec)
        return {"driver": "vfio-pci", "host": device.spec.source}

    async def unmake(self, _device_id: str) -> None:
        """Nothing: it stands on nothing."""

    async def made(self) -> set[str]:
        """Return nothing."""
        return set()
