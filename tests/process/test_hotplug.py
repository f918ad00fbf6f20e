"""Hotplug from the caller to the hypervisor's monitor, with hypervisors that behave as bad as hypervisors do."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from common import paths
from common.errors import AlreadyExistsError, ExhaustedError, HypervisorError, NotFoundError
from common.linux import cgroup, identity
from common.processes import ProcessIdentity
from common.services import device
from common.testing.demands import How
from common.testing.fake_vmms import FAKES
from common.testing.hotplug_stand import ALL, HotplugStand, plugging, plugging_into
from common.testing.isolation import in_event_loop
from procs.vmm_manager import record as records

if TYPE_CHECKING:
    from common.testing.vmms import Vmm

NOTHING: tuple[set[str], set[str]] = (set(), set())
ADDS = [(hypervisor, command) for hypervisor, fake in FAKES.items() for command in fake.adds]

on_all = pytest.mark.parametrize("kind", ALL.values(), ids=ALL)
on_fakes = pytest.mark.parametrize("hypervisor", FAKES)
WAITING = {name: kind for name, kind in ALL.items() if kind.waits_for_guest}
on_all_that_wait = pytest.mark.parametrize("kind", WAITING.values(), ids=WAITING)
GUEST_FIRST = {name: kind for name, kind in ALL.items() if not kind.waits_for_guest}
on_all_where_the_guest_goes_first = pytest.mark.parametrize("kind", GUEST_FIRST.values(), ids=GUEST_FIRST)
on_fakes_that_wait = pytest.mark.parametrize("hypervisor", [name for name in FAKES if name in WAITING])


async def attached(stand: HotplugStand[Any], name: str) -> device.Device:
    plugged = await stand.devices.attach(spec=stand.disk(name))
    return await stand.devices.confirm(plugged)


async def agree(stand: HotplugStand[Any], *devices: device.Device) -> None:
    """Assert that the hypervisor's devices, its open files and our books are the same."""
    ids = {item.hypervisor_id for item in devices}
    files = {item.spec.source.rsplit("/", 1)[1] for item in devices if item.spec}
    assert await stand.vmm.has() == (ids, files)
    assert set(await stand.devices.devices()) == ids


@on_all
@in_event_loop
async def test_the_same_disk_comes_and_goes_at_once_and_nothing_is_left(kind: type[Vmm]) -> None:
    async with plugging_into(kind) as stand:
        for _ in range(kind.rounds):
            await stand.devices.detach(await attached(stand, "a"))
        assert await stand.vmm.has() == NOTHING
        assert await stand.devices.list() == ()


@on_all_where_the_guest_goes_first
@in_event_loop
async def test_a_disk_that_is_given_up_stays_until_the_guest_has_let_go(kind: type[Vmm]) -> None:
    async with plugging_into(kind) as stand:
        first = await stand.devices.attach(spec=stand.disk("a"))
        await stand.devices.abort(first, is_let_go=False)
        assert await stand.devices.devices() == {first.hypervisor_id: "quarantined"}
        assert await stand.vmm.has() == ({first.hypervisor_id}, {"a"})
        with pytest.raises(AlreadyExistsError, match="quarantined"):
            await stand.devices.attach(spec=stand.disk("a"))
        await stand.devices.abort(first, is_let_go=True)
        assert await stand.vmm.has() == NOTHING
        await agree(stand, await attached(stand, "a"))


@on_all_that_wait
@in_event_loop
async def test_a_guest_that_does_not_let_go_keeps_place_and_file_until_it_does(kind: type[Vmm]) -> None:
    async with plugging_into(kind) as stand:
        first = await attached(stand, "a")
        await stand.vmm.guest_lets_go(does=False)
        with pytest.raises(HypervisorError, match=f"quarantined and keeps slot 0 of {stand.vmm.bus}"):
            await stand.devices.detach(first)
        with pytest.raises(AlreadyExistsError, match="which is quarantined"):
            await stand.devices.attach(spec=stand.disk("a"))
        second = await attached(stand, "b")
        assert (second.bus, second.slot) == (stand.vmm.bus, 1)
        await agree(stand, first, second)
        await stand.vmm.let_go(first.hypervisor_id)
        await stand.devices.wait_devices({second.hypervisor_id: "attached"})
        await agree(stand, second)
        assert (await stand.devices.attach(spec=stand.disk("a"))).slot == 2, "not the place that was just freed"


@on_all
@in_event_loop
async def test_a_full_bus_is_said_and_every_slot_of_it_works(kind: type[Vmm]) -> None:
    async with plugging_into(kind) as stand:
        slots = stand.vm.hotplug_buses[0].slots
        devices = [await attached(stand, f"d{number}") for number in range(slots)]
        await agree(stand, *devices)
        with pytest.raises(
            ExhaustedError, match=f"no free [a-z]+ slot: of {slots}, {slots} are held, 0 pending removal, 0 quarantined"
        ):
            await stand.devices.attach(spec=stand.disk("one-more"))
        await asyncio.gather(*(stand.devices.detach(device) for device in devices))
        await agree(stand)


@on_all_that_wait
@in_event_loop
async def test_killed_while_a_guest_is_asked_the_manager_finds_what_went(kind: type[Vmm]) -> None:
    async with plugging_into(kind) as stand:
        first, second = [await attached(stand, name) for name in ("a", "b")]
        await stand.vmm.guest_lets_go(does=False)
        removal = asyncio.gather(stand.devices.detach(first), return_exceptions=True)
        await stand.devices.wait_devices({first.hypervisor_id: "detaching", second.hypervisor_id: "attached"})
        stand.manager.kill()
        await stand.vmm.guest_lets_go(does=True)
        await stand.manager.start()
        await removal
        await stand.devices.wait_devices({second.hypervisor_id: "attached"})
        await agree(stand, second)


@on_fakes
@in_event_loop
async def test_a_full_bus_is_said_before_the_hypervisor_is_asked(hypervisor: str) -> None:
    async with plugging(hypervisor) as stand:
        for number in range(stand.vm.hotplug_buses[0].slots):
            await stand.devices.attach(spec=stand.disk(f"d{number}"))
        before = len(await stand.vmm.transcript())
        with pytest.raises(ExhaustedError, match=r"no free [a-z]+ slot"):
            await stand.devices.attach(spec=stand.disk("one-more"))
        assert len(await stand.vmm.transcript()) == before


@pytest.mark.parametrize(("hypervisor", "command"), ADDS)
@in_event_loop
async def test_an_add_that_acted_and_was_refused_is_undone_whole(hypervisor: str, command: str) -> None:
    async with plugging(hypervisor) as stand:
        await stand.vmm.misbehave(command, How.ACTED_AND_REFUSED)
        with pytest.raises(HypervisorError, match="demanded, after it was done"):
            await stand.devices.attach(spec=stand.disk("a"))
        await stand.devices.wait_devices({})
        assert await stand.vmm.has() == NOTHING
        said = "\n".join(await stand.vmm.transcript())
        assert (await attached(stand, "a")).hypervisor_id not in said, "no id is used twice"


@on_fakes
@in_event_loop
async def test_a_removal_that_acted_and_was_refused_is_a_removal(hypervisor: str) -> None:
    async with plugging(hypervisor) as stand:
        first = await attached(stand, "a")
        await stand.vmm.misbehave(stand.vmm.removes, How.ACTED_AND_REFUSED)
        await stand.devices.detach(first)
        assert await stand.vmm.has() == NOTHING


@on_fakes_that_wait
@in_event_loop
async def test_a_removal_that_is_confirmed_twice_frees_once(hypervisor: str) -> None:
    async with plugging(hypervisor) as stand:
        first = await attached(stand, "a")
        await stand.vmm.misbehave(stand.vmm.tells, How.TWICE)
        await stand.devices.detach(first)
        await agree(stand, await attached(stand, "a"))


@on_fakes
@in_event_loop
async def test_an_add_that_is_never_answered_is_settled_by_the_hypervisors_list(hypervisor: str) -> None:
    async with plugging(hypervisor) as stand:
        await stand.vmm.misbehave(stand.vmm.adds[-1], How.NEVER)
        await agree(stand, await attached(stand, "a"))


@on_fakes_that_wait
@in_event_loop
async def test_a_device_that_vanishes_is_lost_and_its_file_closed(hypervisor: str) -> None:
    async with plugging(hypervisor) as stand, stand.devices.listening():
        first = await attached(stand, "a")
        await stand.vmm.let_go(first.hypervisor_id)
        assert (await stand.devices.heard(device.DEVICE_LOST)).device_id == first.device_id
        assert await stand.vmm.has() == NOTHING


@on_fakes
@in_event_loop
async def test_killed_while_the_hypervisor_thinks_both_managers_come_back_and_converge(hypervisor: str) -> None:
    async with plugging(hypervisor) as stand:
        add = stand.vmm.adds[-1]
        await stand.vmm.misbehave(add, How.LATE)
        call = asyncio.gather(stand.devices.attach(spec=stand.disk("a")), return_exceptions=True)
        while not any(line.startswith(f"-> {add}") for line in await stand.vmm.transcript()):  # noqa: ASYNC110 - its own pace
            await asyncio.sleep(0.02)
        stand.manager.kill()
        stand.devices.kill()
        await call
        await stand.manager.start()
        await stand.devices.start()
        again = await attached(stand, "a")
        assert again.state == "attached"
        await agree(stand, again)


@on_fakes
@in_event_loop
async def test_a_vm_that_is_dead_gets_no_device_and_its_devices_are_gone(hypervisor: str) -> None:
    async with plugging(hypervisor) as stand:
        plugged = await stand.devices.attach(spec=stand.disk("a"))
        identity.kill(stand.vm.process.pid, stand.vm.process.start_time)
        await stand.devices.wait_devices({})
        with pytest.raises(NotFoundError, match="has no running VM") as refused:
            await stand.devices.attach(spec=stand.disk("a"))
        with pytest.raises(NotFoundError, match="no device") as unknown:
            await stand.devices.confirm(plugged)
        assert refused.value.hint
        assert unknown.value.hint
        assert await stand.devices.list() == ()


@on_fakes
@in_event_loop
async def test_what_an_earlier_boot_left_is_cleared_and_its_pids_mean_nobody(hypervisor: str) -> None:
    """The run directory is on a disk, and the host was switched off under a VM with a disk."""
    async with plugging(hypervisor) as stand:
        await attached(stand, "a")
        stand.manager.kill()
        await asyncio.to_thread(cgroup.kill, stand.sandbox_id)
        with subprocess.Popen(["/bin/sleep", "1000"]) as bystander:  # noqa: ASYNC220 - returns at once
            (record,) = records.load_all()
            assert record.vm is not None
            now = ProcessIdentity.of(bystander.pid)
            record.vm = msgspec.structs.replace(record.vm, process=msgspec.structs.replace(now, boot_id="another"))
            record.save()
            await stand.manager.start()
            assert await stand.manager.vms() == ()
            assert not Path(paths.vm_dir(stand.sandbox_id)).exists()
            await stand.devices.wait_devices({})
            assert bystander.poll() is None
            bystander.kill()
