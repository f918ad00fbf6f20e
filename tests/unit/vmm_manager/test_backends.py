"""What QEMU is told of kinds of devices that need hardware which a test does not have."""

from __future__ import annotations

import asyncio

from common.services.vmm import VfioSpec, VsockSpec
from procs.vmm_manager.drivers.qemu.vfio import VfioDevices
from procs.vmm_manager.drivers.qemu.vsocks import Vsocks
from procs.vmm_manager.record import DeviceRecord


def test_a_device_of_the_host_is_named_by_its_address() -> None:
    device = DeviceRecord(bus="port0", slot=0, serial="0f", spec=VfioSpec(source="0000:3b:00.0"))
    arguments = asyncio.run(VfioDevices().make("vfio-1", device))
    assert arguments == {"driver": "vfio-pci", "host": "0000:3b:00.0"}


def test_a_socket_device_has_the_address_that_was_claimed() -> None:
    device = DeviceRecord(bus="bridge0", slot=0, serial="0f", spec=VsockSpec(cid=77))
    arguments = asyncio.run(Vsocks().make("vsock-1", device))
    assert arguments == {"driver": "vhost-vsock-pci", "disable-legacy": "on", "guest-cid": 77}
