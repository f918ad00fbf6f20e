"""A Cloud Hypervisor VM that may have more of everything: processors, memory, PCI segments; fake and real."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, ClassVar

import pytest

from common import shards
from common.bus.events import Subscriber
from common.services.vmm import CpuSpec, MemorySpec
from common.testing.fake_vmms import CloudHypervisor
from common.testing.hotplug_stand import plugging_into
from common.testing.isolation import in_event_loop
from common.testing.real_vmms import REAL, RealCloudHypervisor
from common.testing.vmm_stand import MEMORY_MIB, removed

if TYPE_CHECKING:
    from common.testing.hotplug_stand import HotplugStand

MORE: dict[str, object] = {
    "default_maxvcpus": 2,
    "default_maxmemory": MEMORY_MIB + 256,
    "enable_virtio_mem": True,
    "default_bridges": 2,
}


class Growing(CloudHypervisor):
    """A fake one."""

    config: ClassVar[dict[str, object]] = {**CloudHypervisor.config, **MORE}


class RealGrowing(RealCloudHypervisor):
    """A real one."""

    config: ClassVar[dict[str, object]] = MORE


KINDS: dict[str, type[Growing | RealGrowing]] = {
    "clh": Growing,
    **({"clh-real": RealGrowing} if "clh-real" in REAL else {}),
}
with_processors = pytest.mark.skipif(os.cpu_count() == 1, reason="a VM has no more processors than its host")
on_both = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


async def totals_are(stand: HotplugStand[Growing | RealGrowing], wanted: tuple[int, int]) -> None:
    while await stand.vmm.totals() != wanted:  # noqa: ASYNC110 - the guest's own pace
        await asyncio.sleep(0.05)


@with_processors
@on_both
@in_event_loop
async def test_a_processor_comes_and_goes_twice(kind: type[Growing | RealGrowing]) -> None:
    async with plugging_into(kind) as stand:
        for _ in range(2):
            cpu = await stand.devices.confirm(await stand.devices.attach(spec=CpuSpec(number=1)))
            assert await stand.vmm.totals() == (2, MEMORY_MIB)
            await stand.devices.detach(cpu)
            assert await stand.vmm.totals() == (1, MEMORY_MIB)


@with_processors
@on_both
@in_event_loop
async def test_a_guest_that_is_paused_gives_a_processor_back_when_it_goes_on(kind: type[Growing | RealGrowing]) -> None:
    async with plugging_into(kind) as stand, Subscriber({stand.manager.service: shards.FIRST}) as news:
        cpu = await stand.manager.plug(stand.sandbox_id, CpuSpec(number=1))
        await stand.manager.pause(stand.sandbox_id)
        await stand.manager.remove(stand.sandbox_id, cpu.hypervisor_id)
        assert await stand.manager.present(stand.sandbox_id) == [cpu.hypervisor_id]
        await stand.manager.resume(stand.sandbox_id)
        assert await removed(news) == cpu.hypervisor_id
        assert await stand.vmm.totals() == (1, MEMORY_MIB)


@on_both
@in_event_loop
async def test_memory_comes_and_goes(kind: type[Growing | RealGrowing]) -> None:
    async with plugging_into(kind) as stand:
        one, two = [
            await stand.devices.confirm(await stand.devices.attach(spec=MemorySpec(number=number, size_mib=128)))
            for number in (1, 2)
        ]
        await totals_are(stand, (1, MEMORY_MIB + 256))
        for left, module in ((128, one), (0, two)):
            await stand.devices.detach(module)
            assert await stand.vmm.totals() == (1, MEMORY_MIB + left)


@on_both
@in_event_loop
async def test_a_disk_of_the_second_segment_comes_and_goes(kind: type[Growing | RealGrowing]) -> None:
    async with plugging_into(kind) as stand, Subscriber({stand.manager.service: shards.FIRST}) as news:
        for slot in (0, 30):
            disk = await stand.manager.plug(stand.sandbox_id, stand.disk("a"), slot, bus="segment1")
            assert disk.guest_path == f"0001:{slot + 1:02x}"
            await stand.manager.remove(stand.sandbox_id, disk.hypervisor_id)
            assert await removed(news) == disk.hypervisor_id
            assert await stand.vmm.has() == (set(), set())
