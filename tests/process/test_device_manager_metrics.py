"""What the device manager shows of itself to Prometheus."""

from __future__ import annotations

import asyncio

import pytest

from common.errors import NotFoundError
from common.services.vmm import BlockSpec
from common.testing.device_stand import Stand, standing
from common.testing.isolation import in_event_loop


async def values(stand: Stand, name: str) -> dict[str, float]:
    """Return a metric's values that are not zero, by the values of their labels."""
    samples = [sample for family in (await stand.health()).metrics for sample in family.samples]
    return {
        " ".join(sample.labels.values()): sample.value for sample in samples if sample.name == name and sample.value
    }


@in_event_loop
async def test_operations_are_counted_by_kind_hypervisor_and_outcome() -> None:
    async with standing() as stand:
        await stand.detach(await stand.attach("a"))
        with pytest.raises(NotFoundError):
            await stand.attach(spec=BlockSpec(source="/none"))
        assert await values(stand, "kata_device_operation_seconds_count") == {
            "attach qemu share ok": 1.0,
            "attach qemu block NotFoundError": 1.0,
            "detach qemu share ok": 1.0,
        }
        seconds = await values(stand, "kata_device_operation_seconds_sum")
        assert 0 < seconds["attach qemu share ok"] < 30


@in_event_loop
async def test_what_is_going_on_is_shown_and_what_was_lost_is_counted() -> None:
    async with standing() as stand:
        stand.vms.lets_go = False
        await stand.confirm(await stand.attach("a"))
        await stand.vms.confirm_removal("share-1")
        await stand.wait_devices({})
        assert await values(stand, "kata_device_lost_total") == {"": 1.0}

        leaving = await stand.attach("b")
        call = asyncio.gather(stand.detach(leaving), return_exceptions=True)
        await stand.wait_devices({"share-2": "detaching"})
        assert await values(stand, "kata_device_operations_in_flight") == {"detach": 1.0}
        assert await values(stand, "kata_device_count") == {"detaching": 1.0}
        await call
        assert await values(stand, "kata_device_count") == {"quarantined": 1.0}

        stand.vms.holds_add = asyncio.Event()
        attaching = asyncio.gather(stand.attach("c"), return_exceptions=True)
        await stand.wait_devices({"share-2": "quarantined", "": "attaching"})
        assert await values(stand, "kata_device_queue_length") == {"": 1.0}
        stand.vms.holds_add.set()
        await attaching
        assert await values(stand, "kata_device_queue_length") == {}
