"""Socket devices on the host's kernel, from the caller to the hypervisor's monitor."""

from __future__ import annotations

import pytest

from common.errors import AlreadyExistsError, HypervisorError, UnsupportedError, UsageError
from common.services.vmm import VsockSpec
from common.testing.hotplug_stand import plugging
from common.testing.isolation import in_event_loop

ADDRESS = VsockSpec(cid=77)


@in_event_loop
async def test_it_comes_and_goes_and_its_address_is_free_when_it_is_gone() -> None:
    async with plugging("qemu") as stand:
        for number in (1, 2):
            plugged = await stand.devices.attach(spec=ADDRESS)
            assert (plugged.hypervisor_id, bool(plugged.guest_path)) == (f"vsock-{number}", True)
            device = await stand.devices.confirm(plugged)
            assert (await stand.vmm.has())[0] == {device.hypervisor_id}
            await stand.devices.detach(device)
            assert await stand.vmm.has() == (set(), set())
            assert await stand.devices.list() == ()


@in_event_loop
async def test_a_guest_that_keeps_it_keeps_its_address() -> None:
    async with plugging("qemu") as stand:
        device = await stand.devices.confirm(await stand.devices.attach(spec=ADDRESS))
        await stand.vmm.guest_lets_go(does=False)
        with pytest.raises(HypervisorError, match="quarantined"):
            await stand.devices.detach(device)
        with pytest.raises(AlreadyExistsError, match=r"vsock address 77 is held by device .*, which is quarantined"):
            await stand.devices.attach(spec=ADDRESS)
        await stand.vmm.let_go(device.hypervisor_id)
        await stand.devices.wait_devices({})
        await stand.devices.attach(spec=ADDRESS)


@in_event_loop
async def test_the_hosts_own_address_is_no_guests() -> None:
    async with plugging("qemu") as stand:
        with pytest.raises(UsageError, match="a guest cannot have the vsock address 2"):
            await stand.devices.attach(spec=VsockSpec(cid=2))
        assert await stand.devices.list() == ()


@pytest.mark.parametrize("hypervisor", ["clh", "firecracker"])
@in_event_loop
async def test_other_hypervisors_have_one_from_the_boot_and_no_other(hypervisor: str) -> None:
    async with plugging(hypervisor) as stand:
        with pytest.raises(UnsupportedError, match=f"{hypervisor} cannot plug a vsock device into a running guest"):
            await stand.devices.attach(spec=ADDRESS)
        assert await stand.devices.list() == ()
