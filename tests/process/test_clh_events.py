"""What only Cloud Hypervisor does: news that may be lost, files that close after their device is told gone."""

from __future__ import annotations

import asyncio

import pytest

from common.errors import UnsupportedError
from common.testing.demands import How
from common.testing.fake_vmms import CloudHypervisor, UnconfinedCloudHypervisor
from common.testing.hotplug_stand import FakeStand, plugging, plugging_into
from common.testing.isolation import in_event_loop

NOTHING: tuple[set[str], set[str]] = (set(), set())


def fake(stand: FakeStand) -> CloudHypervisor:
    assert isinstance(stand.vmm, CloudHypervisor)
    return stand.vmm


@in_event_loop
async def test_a_removal_that_is_never_told_is_found_in_the_device_tree() -> None:
    async with plugging("clh") as stand:
        await stand.vmm.misbehave("device-removed", How.NEVER)
        await stand.devices.detach(await stand.devices.confirm(await stand.devices.attach(spec=stand.disk("a"))))
        assert await stand.vmm.has() == NOTHING


@in_event_loop
async def test_a_removal_that_is_told_in_a_garbled_stream_is_found_at_once() -> None:
    async with plugging("clh") as stand:
        first = await stand.devices.confirm(await stand.devices.attach(spec=stand.disk("a")))
        await fake(stand).garble()
        await stand.devices.detach(first)
        await stand.vmm.misbehave("device-removed", How.NEVER)
        second = await stand.devices.confirm(await stand.devices.attach(spec=stand.disk("a")))
        async with asyncio.TaskGroup() as tasks:
            removal = tasks.create_task(stand.devices.detach(second))
            while await stand.vmm.has() != NOTHING:  # noqa: ASYNC110 - another process's state
                await asyncio.sleep(0.02)
            await fake(stand).garble()  # whatever comes next shows that something was lost
            await stand.devices.attach(spec=stand.disk("b"))
        assert removal.done()


@in_event_loop
async def test_a_disk_is_told_gone_when_its_file_is_closed_and_not_before() -> None:
    async with plugging("clh", "--closing-takes", "0.5") as stand:
        first = await stand.devices.confirm(await stand.devices.attach(spec=stand.disk("a")))
        await stand.devices.detach(first)
        assert await stand.vmm.has() == NOTHING, "who deletes the file now, or gives it to another VM, may"


@in_event_loop
async def test_no_id_is_ever_sent() -> None:
    async with plugging_into(UnconfinedCloudHypervisor) as stand:
        await stand.devices.attach(spec=stand.disk("a"))
        added = [line for line in await stand.vmm.transcript() if line.startswith("-> vm.add")]
        assert added == ["-> vm.add-disk a"]


@in_event_loop
async def test_a_slot_of_ours_is_a_slot_of_the_guest() -> None:
    async with plugging("clh") as stand:
        last = stand.vm.hotplug_buses[0].slots - 1
        paths = [
            (await stand.manager.plug(stand.sandbox_id, stand.disk(name), slot)).guest_path
            for name, slot in (("a", 0), ("z", last))
        ]
        assert paths == ["03", "1f"], "from behind the host bridge, virtio-rng and vsock to the end"


@in_event_loop
async def test_a_version_that_is_too_old_is_refused_and_nothing_is_left() -> None:
    with pytest.raises(UnsupportedError, match=r"Cloud Hypervisor 50\.0\.0 is too old"):
        async with plugging("clh", "--as", "50.0.0"):
            raise AssertionError


@in_event_loop
async def test_a_version_without_slots_of_our_choice_gets_none() -> None:
    async with plugging("clh", "--as", "51.1.0") as stand:
        added = await stand.manager.plug(stand.sandbox_id, stand.disk("a"), 5)
        assert added.guest_path == "03", "the lowest that is free"
        listed = await stand.manager.list(stand.sandbox_id)
        assert [(device.slot, device.hypervisor_id) for device in listed] == [(5, added.hypervisor_id)]
