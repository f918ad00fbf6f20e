"""The device manager as a process: what it promises, and that it keeps it when others do not keep theirs."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from common.errors import ExhaustedError, HypervisorError, KataError, NotFoundError, StateError, UnavailableError
from common.testing.device_stand import Stand, standing
from common.testing.isolation import in_event_loop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from common.services.device import Device

    Outcome = asyncio.Future[tuple[Device | BaseException]]


@asynccontextmanager
async def attaching() -> AsyncIterator[tuple[Stand, Outcome]]:
    """Provide a stand whose VM manager has been asked to plug a device and does not answer before :func:`release`."""
    async with standing() as stand:
        stand.vms.holds_add = asyncio.Event()
        call: Outcome = asyncio.gather(stand.attach(), return_exceptions=True)
        await stand.wait_devices({"": "attaching"})
        yield stand, call


def release(stand: Stand) -> None:
    """Let the VM manager plug what it was asked to plug."""
    assert stand.vms.holds_add is not None
    stand.vms.holds_add.set()


@in_event_loop
async def test_attach_confirm_detach() -> None:
    async with standing() as stand:
        plugged = await stand.attach()
        assert (plugged.state, plugged.hypervisor_id, plugged.bus, plugged.guest_path) == (
            "plugged",
            "share-1",
            "port0",
            "04/00",
        )
        assert (await stand.confirm(plugged)).state == "attached"
        await stand.detach(plugged)
        await stand.detach(plugged)
        assert await stand.devices() == {}
        assert stand.vms.present == {}
        with pytest.raises(NotFoundError):
            await stand.confirm(plugged)


@in_event_loop
async def test_accepted_is_not_removed() -> None:
    async with standing() as stand:
        stand.vms.lets_go = False
        first = await stand.attach("a")
        async with asyncio.TaskGroup() as tasks:
            detaching = tasks.create_task(stand.detach(first))
            await stand.wait_devices({"share-1": "detaching"})
            assert (await stand.attach("b")).bus == "port1", "the bus is taken until the removal is confirmed"
            with pytest.raises(ExhaustedError, match="of 2, 1 are held, 1 pending removal, 0 quarantined"):
                await stand.attach("c")
            with pytest.raises(StateError, match="detaching and cannot be confirmed"):
                await stand.confirm(first)
            await stand.vms.confirm_removal("share-1")
            await detaching
        assert (await stand.attach("c")).bus == "port0"


@in_event_loop
async def test_a_refused_add_leaves_nothing() -> None:
    async with standing() as stand:
        stand.vms.add_error = HypervisorError("QEMU refused", hint="look")
        with pytest.raises(HypervisorError, match="QEMU refused"):
            await stand.attach()
        assert await stand.devices() == {}
        assert (await stand.attach()).bus == "port1", "the place that was free longest"


@in_event_loop
async def test_an_answer_that_was_lost_is_the_same_answer() -> None:
    async with standing() as stand:
        first = await stand.attach(call_id="same")
        assert await stand.attach(call_id="same") == first
        stand.kill()
        await stand.start()
        assert await stand.attach(call_id="same") == first, "also by a successor that remembers no calls"
        assert stand.vms.holders == {"share-1": "port0"}


@in_event_loop
async def test_killed_in_the_middle_of_a_removal_its_successor_finishes() -> None:
    async with standing() as stand:
        stand.vms.lets_go = False
        attached = await stand.attach()
        call = asyncio.gather(stand.detach(attached), return_exceptions=True)
        await stand.wait_devices({"share-1": "detaching"})
        stand.kill()
        await call
        await stand.start()
        await stand.vms.confirm_removal("share-1")
        await stand.wait_devices({})


@in_event_loop
async def test_an_add_that_acted_and_then_failed_is_undone() -> None:
    async with standing() as stand:
        stand.vms.add_error, stand.vms.acts_first = HypervisorError("late trouble"), True
        with pytest.raises(HypervisorError, match="late trouble"):
            await stand.attach()
        await stand.wait_devices({})
        assert stand.vms.present == {}
        assert stand.vms.removals == ["share-1"]
        assert (await stand.attach()).bus == "port1"


@in_event_loop
async def test_an_add_whose_service_dies_is_settled_when_it_is_back() -> None:
    async with standing() as stand:
        stand.vms.holds_add = asyncio.Event()
        call = asyncio.gather(stand.attach(), return_exceptions=True)
        await stand.wait_devices({"": "attaching"})
        (lost,) = await stand.list()
        await stand.vms.stop()
        (error,) = await call
        assert isinstance(error, KataError)
        stand.vms.holds_add = None
        stand.vms.take("share-1", bus=lost.bus, slot=lost.slot, serial=lost.serial)  # it had acted, and nobody heard
        await stand.vms.start()
        await stand.wait_devices({})
        assert stand.vms.present == {}


@in_event_loop
async def test_killed_while_attaching_its_successor_joins_the_add_that_still_runs() -> None:
    async with attaching() as (stand, call):
        stand.kill()
        await call
        await stand.start()
        async with asyncio.TaskGroup() as tasks:
            again = tasks.create_task(stand.attach())
            await stand.devices()  # which is answered after the attach has been taken up
            release(stand)
        assert (again.result().state, again.result().bus) == ("plugged", "port0")
        assert stand.vms.holders == {"share-1": "port0"}
        assert await stand.devices() == {"share-1": "plugged"}


@in_event_loop
async def test_a_vm_that_ends_while_its_device_is_plugged_leaves_no_device() -> None:
    async with attaching() as (stand, call):
        await stand.vms.end_vm()
        await stand.wait_devices({})
        release(stand)
        (error,) = await call
        assert isinstance(error, NotFoundError)
        assert await stand.devices() == {}


@in_event_loop
async def test_a_device_that_is_being_plugged_can_be_detached() -> None:
    async with attaching() as (stand, call):
        (listed,) = await stand.list()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(stand.detach(listed))
            await stand.devices()  # which is answered after the detach has been taken up
            release(stand)
        await call
        assert (await stand.devices(), stand.vms.present) == ({}, {})


@in_event_loop
async def test_a_new_vm_of_the_same_name_gets_a_device_of_its_own() -> None:
    async with standing() as stand:
        await stand.confirm(await stand.attach())
        stand.kill()
        stand.vms.present.clear()  # the VM ended and another began, unheard
        await stand.start()
        assert (await stand.attach()).hypervisor_id == "share-2"
        assert stand.vms.holders == {"share-2": "port1"}


@in_event_loop
async def test_an_event_that_is_not_readable_is_a_reason_to_compare() -> None:
    async with standing() as stand:
        await stand.vms.is_compared.wait()
        stand.vms.is_compared.clear()
        await stand.vms.publish_nonsense()
        await stand.vms.is_compared.wait()
        assert (await stand.attach()).state == "plugged"


@in_event_loop
async def test_a_removal_that_happened_unheard_is_noticed() -> None:
    async with standing() as stand:
        await stand.confirm(await stand.attach())
        stand.kill()
        await stand.vms.confirm_removal("share-1", is_told=False)
        await stand.start()
        await stand.wait_devices({})


@in_event_loop
async def test_a_vm_managers_restart_is_a_reason_to_compare() -> None:
    async with standing() as stand:
        await stand.confirm(await stand.attach())
        await stand.vms.stop()
        stand.vms.present.clear()
        stand.vms.is_running = False
        await stand.vms.start()
        await stand.wait_devices({})


@in_event_loop
async def test_the_end_of_the_vm_frees_everything() -> None:
    async with standing() as stand:
        stand.vms.lets_go = False
        await stand.confirm(await stand.attach("a"))
        await stand.attach("b")
        await stand.vms.end_vm()
        await stand.wait_devices({})


@in_event_loop
async def test_a_device_that_vanishes_is_forgotten() -> None:
    async with standing() as stand:
        await stand.confirm(await stand.attach())
        await stand.vms.confirm_removal("share-1")
        await stand.wait_devices({})


@in_event_loop
async def test_a_guest_that_never_lets_go_is_quarantined_until_it_does() -> None:
    async with standing() as stand:
        stand.vms.lets_go = False
        attached = await stand.attach()
        for error in await asyncio.gather(stand.detach(attached), stand.detach(attached), return_exceptions=True):
            assert isinstance(error, HypervisorError)
            assert "quarantined and keeps slot 0 of port0" in error.message
        assert stand.vms.removals == ["share-1"], "whoever wants it gone joins the one removal"
        assert await stand.devices() == {"share-1": "quarantined"}
        assert (await stand.attach("b")).bus == "port1"
        await stand.vms.confirm_removal("share-1")
        await stand.wait_devices({"share-2": "plugged"})


@in_event_loop
async def test_a_vm_manager_that_is_down_is_said() -> None:
    async with standing() as stand:
        await stand.vms.stop()
        with pytest.raises(UnavailableError, match=r"vmm\.qemu is down"):
            await stand.attach()
        await stand.vms.start()
        assert (await stand.attach()).state == "plugged"
