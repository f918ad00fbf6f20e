"""Hotplug from the caller to QEMU's monitor, with a QEMU that behaves as bad as hypervisors do."""

from __future__ import annotations

import asyncio

import pytest

from common.errors import AlreadyExistsError, ExhaustedError, HypervisorError
from common.services import device
from common.testing.fake_qemu.monitor import How
from common.testing.hotplug_stand import HotplugStand, plugging
from common.testing.isolation import in_event_loop

NOTHING: tuple[set[str], set[str]] = (set(), set())


async def attached(stand: HotplugStand, name: str) -> device.Device:
    plugged = await stand.devices.attach(spec=stand.disk(name))
    return await stand.devices.confirm(plugged)


async def agree(stand: HotplugStand, *names: str) -> None:
    """Assert that QEMU's devices, QEMU's open files and our books are the same."""
    assert await stand.qemu.has() == (set(names), set(names))
    assert set(await stand.devices.devices()) == set(names)


@in_event_loop
async def test_the_same_disk_comes_and_goes_at_once_and_nothing_is_left() -> None:
    async with plugging() as stand:
        for _ in range(20):
            await stand.devices.detach(await attached(stand, "a"))
        assert await stand.qemu.has() == NOTHING
        assert await stand.devices.list() == ()


@in_event_loop
async def test_a_guest_that_does_not_let_go_keeps_place_and_file_until_it_does() -> None:
    async with plugging() as stand:
        first = await attached(stand, "a")
        await stand.qemu.guest_lets_go(does=False)
        with pytest.raises(HypervisorError, match="quarantined and keeps slot 0 of bridge0"):
            await stand.devices.detach(first)
        with pytest.raises(AlreadyExistsError, match="which is quarantined"):
            await stand.devices.attach(spec=stand.disk("a"))
        second = await attached(stand, "b")
        assert (second.bus, second.slot) == ("bridge0", 1)
        await agree(stand, "disk-1", "disk-2")
        await stand.qemu.let_go("disk-1")
        await stand.devices.wait_devices({"disk-2": "attached"})
        await agree(stand, "disk-2")
        assert (await stand.devices.attach(spec=stand.disk("a"))).slot == 2, "not the place that was just freed"


@in_event_loop
async def test_a_full_bus_is_said_before_qemu_is_asked() -> None:
    async with plugging() as stand:
        for number in range(30):
            await stand.devices.attach(spec=stand.disk(f"d{number}"))
        before = len(await stand.qemu.transcript())
        with pytest.raises(
            ExhaustedError, match="no free pci slot: of 30, 30 are held, 0 pending removal, 0 quarantined"
        ):
            await stand.devices.attach(spec=stand.disk("one-more"))
        assert len(await stand.qemu.transcript()) == before


@pytest.mark.parametrize("command", ["blockdev-add", "device_add"])
@in_event_loop
async def test_an_add_that_acted_and_was_refused_is_undone_whole(command: str) -> None:
    async with plugging() as stand:
        await stand.qemu.misbehave(command, How.ACTED_AND_REFUSED)
        with pytest.raises(HypervisorError, match="demanded, after it was done"):
            await stand.devices.attach(spec=stand.disk("a"))
        await stand.devices.wait_devices({})
        assert await stand.qemu.has() == NOTHING
        assert (await attached(stand, "a")).hypervisor_id == "disk-2", "no id is used twice"


@in_event_loop
async def test_a_removal_that_acted_and_was_refused_is_a_removal() -> None:
    async with plugging() as stand:
        first = await attached(stand, "a")
        await stand.qemu.misbehave("device_del", How.ACTED_AND_REFUSED)
        await stand.devices.detach(first)
        assert await stand.qemu.has() == NOTHING


@in_event_loop
async def test_a_removal_that_is_confirmed_twice_frees_once() -> None:
    async with plugging() as stand:
        first = await attached(stand, "a")
        await stand.qemu.misbehave("DEVICE_DELETED", How.TWICE)
        await stand.devices.detach(first)
        again = await attached(stand, "a")
        await agree(stand, again.hypervisor_id)


@in_event_loop
async def test_an_add_that_is_never_answered_is_settled_by_qemus_list() -> None:
    async with plugging() as stand:
        await stand.qemu.misbehave("device_add", How.NEVER)
        assert (await attached(stand, "a")).hypervisor_id == "disk-1"
        await agree(stand, "disk-1")


@in_event_loop
async def test_a_device_that_vanishes_is_lost_and_its_file_closed() -> None:
    async with plugging() as stand, stand.devices.listening():
        first = await attached(stand, "a")
        await stand.qemu.let_go("disk-1")
        assert (await stand.devices.heard(device.DEVICE_LOST)).device_id == first.device_id
        assert await stand.qemu.has() == NOTHING


@in_event_loop
async def test_killed_while_qemu_thinks_both_managers_come_back_and_converge() -> None:
    async with plugging() as stand:
        await stand.qemu.misbehave("device_add", How.LATE)
        call = asyncio.gather(stand.devices.attach(spec=stand.disk("a")), return_exceptions=True)
        while "-> device_add disk-1 bridge0 0x1" not in await stand.qemu.transcript():  # noqa: ASYNC110 - its own pace
            await asyncio.sleep(0.02)
        stand.manager.kill()
        stand.devices.kill()
        await call
        await stand.manager.start()
        await stand.devices.start()
        again = await attached(stand, "a")
        assert again.state == "attached"
        await agree(stand, again.hypervisor_id)
