"""Socket devices that end in the host's kernel. QEMU opens that by itself, so there is nothing else to be made.

The kernel refuses an address that any guest of the host has (``vhost_vsock_set_cid``, drivers/vhost/vsock.c), so those
too that the device manager does not know: of VMs whose agent is reached so.

Source: hw/virtio/vhost-vsock.c of QEMU 7.2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.services.vmm import VsockSpec
from procs.vmm_manager.drivers.qemu.backends import Backend

if TYPE_CHECKING:
    from procs.vmm_manager.record import DeviceRecord


class Vsocks(Backend):
    """Devices on the host's kernel."""

    prefix = "vsock-"

    async def make(self, _device_id: str, device: DeviceRecord) -> dict[str, object]:
        """Say which address it has."""
        assert isinstance(device.spec, VsockSpec)
        return {"driver": "vhost-vsock-pci", "disable-legacy": "on", "guest-cid": device.spec.cid}

    async def unmake(self, _device_id: str) -> None:
        """Nothing: it stands on nothing."""

    async def made(self) -> set[str]:
        """Return nothing."""
        return set()
