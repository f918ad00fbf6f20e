"""What devices share and what they may not: sources, holders, places; and what is said of bad requests."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from common import paths
from common.errors import (
    AlreadyExistsError,
    HypervisorError,
    KataError,
    NotFoundError,
    UsageError,
)
from common.services import device
from common.services.vmm import BlockSpec, ShareSpec
from common.testing.device_stand import Stand, share, standing
from common.testing.isolation import in_event_loop


def disk(name: str, *, is_read_only: bool = False) -> BlockSpec:
    source = Path(paths.run_dir()) / name
    source.write_bytes(bytes(512))
    return BlockSpec(source=str(source), is_read_only=is_read_only)


@in_event_loop
async def test_two_containers_hold_one_device_and_the_last_one_takes_it_along() -> None:
    async with standing() as stand:
        first = await stand.attach(spec=disk("d"), holder="c1")
        second = await stand.attach(spec=disk("d"), holder="c2")
        assert (second.device_id, [holder.name for holder in second.holders]) == (first.device_id, ["c1", "c2"])
        assert await stand.attach(spec=disk("d"), holder="c2") == second, "asked again, nothing changes"
        await stand.confirm(first, "c1")
        await stand.detach(first, "c1")
        await stand.detach(first, "c1")
        assert await stand.devices() == {"share-1": "attached"}
        await stand.detach(first, "c2")
        assert (await stand.devices(), stand.vms.present, stand.vms.removals) == ({}, {}, ["share-1"])


@in_event_loop
async def test_containers_that_want_one_device_at_once_get_one() -> None:
    async with standing() as stand:
        wishes = (stand.attach(spec=disk("d"), holder=f"c{number}") for number in range(5))
        devices = await asyncio.gather(*wishes)
        assert len({found.device_id for found in devices}) == 1
        assert len(stand.vms.present) == 1


@in_event_loop
async def test_a_source_that_is_on_its_way_out_is_plugged_anew_when_it_is_out() -> None:
    async with standing() as stand:
        stand.vms.lets_go = False
        first = await stand.attach(spec=disk("d"))
        async with asyncio.TaskGroup() as tasks:
            detaching = tasks.create_task(stand.detach(first))
            await stand.wait_devices({"share-1": "detaching"})
            again = tasks.create_task(stand.attach(spec=disk("d")))
            await stand.devices()  # which is answered after the attach has been taken up
            assert not again.done()
            await stand.vms.confirm_removal("share-1")
            await detaching
        assert again.result().hypervisor_id == "share-2"


async def refused(stand: Stand, spec: BlockSpec | ShareSpec, kind: type[KataError], text: str) -> None:
    before = (await stand.list(), dict(stand.vms.present))
    with pytest.raises(kind, match=text) as error:
        await stand.attach(spec=spec)
    assert error.value.hint
    assert (await stand.list(), stand.vms.present) == before, "nothing changed"


@in_event_loop
async def test_a_bad_request_is_refused_with_a_reason_and_a_remedy() -> None:
    async with standing() as stand:
        held = disk("held")
        await stand.attach(spec=held)
        directory = Path(held.source).parent
        (directory / "empty").touch()
        await refused(
            stand, BlockSpec(source=str(directory / "none")), NotFoundError, "none cannot be used: No such file"
        )
        await refused(stand, BlockSpec(source=str(directory)), UsageError, "is a directory; a block device needs")
        await refused(stand, BlockSpec(source=str(directory / "empty")), UsageError, "has a size of zero")
        await refused(
            stand, disk("held", is_read_only=True), AlreadyExistsError, "read-write by virtio-blk and cannot also be"
        )


@in_event_loop
async def test_a_vm_that_is_not_there_is_said() -> None:
    async with standing() as stand:
        stand.vms.is_running = False
        with pytest.raises(NotFoundError, match="sandbox s1 has no running VM"):
            await stand.attach()
        assert await stand.list() == ()
        with pytest.raises(NotFoundError, match="no device 'd1'") as unknown:
            await stand.confirm_id("d1")
        assert "its VM or its lease has ended" in (unknown.value.hint or "")


@in_event_loop
async def test_a_device_that_vanishes_is_published_as_lost_and_its_story_stays() -> None:
    async with standing() as stand, stand.listening():
        attached = await stand.attach()
        await stand.confirm(attached)
        await stand.vms.confirm_removal("share-1")
        assert (await stand.heard(device.DEVICE_LOST)).device_id == attached.device_id
        await stand.wait_devices({})
        assert await stand.story(attached.device_id) == [
            "wanted",
            "added by the hypervisor",
            "confirmed by the guest",
            "removed by the hypervisor",
        ]
        with pytest.raises(NotFoundError, match="nothing is known of a device 'd9'"):
            await stand.story("d9")


@in_event_loop
async def test_a_quarantined_device_is_published() -> None:
    async with standing() as stand, stand.listening():
        stand.vms.lets_go = False
        attached = await stand.attach()
        call = asyncio.gather(stand.detach(attached), return_exceptions=True)
        assert (await stand.heard(device.DEVICE_QUARANTINED)).device_id == attached.device_id
        (error,) = await call
        assert isinstance(error, HypervisorError)


@in_event_loop
async def test_a_journal_that_is_lost_is_rebuilt_from_the_hypervisors_list() -> None:
    async with standing() as stand:
        await stand.confirm(await stand.attach("a"))
        stand.kill()
        for name in ("journal.db", "journal.db-wal"):
            (Path(paths.run_dir()) / "device-manager" / name).write_bytes(b"no database " * 1000)
        await stand.start()
        await stand.wait_devices({"share-1": "unknown"})
        assert (await stand.attach("b")).bus == "port1", "the place of the unknown device is not given away"
        (found, _) = await stand.list()
        assert (found.spec, found.guest_path) == (share("a"), "04/00")
        with pytest.raises(AlreadyExistsError, match="by whom is not known any more"):
            await stand.attach("a")
        await stand.detach(found)
        assert await stand.devices() == {"share-2": "plugged"}


@in_event_loop
async def test_a_call_that_was_answered_gets_the_same_answer_from_a_successor() -> None:
    async with standing() as stand:
        attached = await stand.attach(call_id="attach")
        await stand.detach(attached, call_id="detach")
        stand.kill()
        await stand.start()
        assert await stand.attach(call_id="attach") == attached, "what it was told, and nothing is plugged again"
        await stand.detach(attached, call_id="detach")
        assert (await stand.list(), stand.vms.present) == ((), {})
