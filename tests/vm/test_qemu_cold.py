"""A real QEMU that waits with the boot: what is plugged until then its guest boots with.

QEMU has no device of a host with an IOMMU here. A disk and a device with large registers stand for one: where a device
is found, and whether there is room for it, is the same for all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from common.errors import UnsupportedError
from common.services.vmm import BlockSpec
from common.testing.guest_sandbox import make_busybox_image
from common.testing.isolation import in_event_loop
from common.testing.managed_guest import cold_plugging, hotplugging
from common.testing.vmm_stand import Monitor, managing

if TYPE_CHECKING:
    from common.services.device import Device
    from common.services.vmm import Vm
    from common.testing.device_stand import DeviceManager
    from common.testing.managed_guest import HotplugStand

LARGE_MIB = 256
LARGE_REGION = """
for device in /sys/bus/pci/devices/*; do
    if [ "$(cat $device/vendor $device/device)" = "0x1af4
0x1110" ]; then sed -n 3p $device/resource; fi
done
"""
"""Prints beginning, end and flags of the large device's third region (Documentation/ABI/testing/sysfs-bus-pci)."""


async def room_for_large(stand: HotplugStand, disk: Device) -> int:
    """Return how many bytes of address space the guest has given to the large device."""
    task = await stand.run(disk, LARGE_REGION)
    begin, end, _ = (int(number, 16) for number in (await stand.output(task)).split())
    await stand.give_back(task, disk)
    return end - begin + 1 if begin else 0


@in_event_loop
async def test_a_guest_boots_with_what_was_plugged_before_and_firmware_makes_room(sandbox: str) -> None:
    disk = BlockSpec(source=str(make_busybox_image(sandbox)))
    plugged = []

    async def plug(devices: DeviceManager, vm: Vm) -> None:
        plugged.append(await devices.attach(spec=disk))
        async with Monitor(vm) as monitor:
            await monitor.plug_large(LARGE_MIB, "port0")

    async with cold_plugging(sandbox, plug, pcie_root_port=1) as stand:
        assert (await stand.manager.describe(sandbox)).runstate == "running"
        again = await stand.devices.attach(spec=disk)
        assert again.device_id == plugged[0].device_id, "who asks again after the boot gets what is there"
        assert await room_for_large(stand, again) == LARGE_MIB << 20
        async with Monitor(stand.vm) as monitor:
            await monitor.unplug("large")
            assert await monitor.plugged() == set(), "both can go as if they had come later"


@in_event_loop
async def test_there_is_no_such_room_for_what_comes_later(sandbox: str) -> None:
    async with hotplugging(sandbox, pcie_root_port=1) as stand:
        async with Monitor(stand.vm) as monitor:
            await monitor.plug_large(LARGE_MIB, "port0")
        disk = await stand.devices.attach(spec=BlockSpec(source=str(make_busybox_image(sandbox))))
        assert await room_for_large(stand, disk) == 0


@in_event_loop
async def test_until_it_is_told_to_go_on_it_waits(sandbox: str) -> None:
    async with managing() as manager:
        await manager.hold(sandbox)
        assert (await manager.describe(sandbox)).runstate == "prelaunch"
        for _ in range(2):
            await manager.resume(sandbox)
        assert (await manager.describe(sandbox)).runstate == "running"
        await manager.destroy(sandbox)


@in_event_loop
async def test_a_hypervisor_that_cannot_wait_says_so(sandbox: str) -> None:
    async with managing("clh") as manager:
        with pytest.raises(UnsupportedError, match="clh cannot plug devices before a guest boots"):
            await manager.hold(sandbox)
