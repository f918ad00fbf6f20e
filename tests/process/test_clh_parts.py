"""Processors and memory of a Cloud Hypervisor VM that come after the boot, and go; on the fake."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, ClassVar

import pytest

from common.errors import ExhaustedError, HypervisorError, NotFoundError, UnsupportedError, UsageError
from common.services.vmm import BusKind, CpuSpec, DeviceSpec, HotplugBus, MemorySpec
from common.testing.demands import How
from common.testing.fake_vmms import CloudHypervisor
from common.testing.hotplug_stand import HotplugStand, disk, plugging_into
from common.testing.isolation import in_event_loop
from common.testing.vmm_stand import MEMORY_MIB

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Growing(CloudHypervisor):
    """One whose VM can have a processor and memory more; memory comes by ACPI."""

    config: ClassVar[dict[str, object]] = {
        **CloudHypervisor.config,
        "default_maxvcpus": 2,
        "default_maxmemory": MEMORY_MIB + 256,
    }


class Resizing(CloudHypervisor):
    """The same with virtio-mem."""

    config: ClassVar[dict[str, object]] = {**Growing.config, "enable_virtio_mem": True}


@asynccontextmanager
async def growing(kind: type[CloudHypervisor] = Growing) -> AsyncIterator[HotplugStand[CloudHypervisor]]:
    async with plugging_into(kind) as stand:
        yield stand


async def totals_are(stand: HotplugStand[CloudHypervisor], wanted: tuple[int, int]) -> None:
    """Wait until the guest has followed."""
    while await stand.vmm.totals() != wanted:  # noqa: ASYNC110 - its own pace
        await asyncio.sleep(0.02)


def buses(stand: HotplugStand[CloudHypervisor]) -> dict[BusKind, HotplugBus]:
    return {bus.kind: bus for bus in stand.vm.hotplug_buses}


@in_event_loop
async def test_what_a_vm_can_have_more_is_told_and_without_configuration_that_is_nothing() -> None:
    async with growing() as stand:
        assert (buses(stand)[BusKind.CPU].slots, buses(stand)[BusKind.MEMORY].slots) == (1, 8)
    async with growing(Resizing) as stand:
        assert buses(stand)[BusKind.MEMORY].slots == 10
    async with growing(CloudHypervisor) as stand:
        assert set(buses(stand)) == {BusKind.PCI}
        with pytest.raises(UnsupportedError):
            await stand.devices.attach(spec=CpuSpec(number=1))


@in_event_loop
async def test_a_processor_comes_and_goes_when_the_guest_gives_it_back() -> None:
    async with growing() as stand:
        for _ in range(2):
            cpu = await stand.devices.confirm(await stand.devices.attach(spec=CpuSpec(number=1)))
            assert await stand.vmm.totals() == (2, MEMORY_MIB)
            with pytest.raises(ExhaustedError, match="no free cpu slot: of 1, 1 are held"):
                await stand.devices.attach(spec=CpuSpec(number=2))
            await stand.devices.detach(cpu)
            assert await stand.vmm.totals() == (1, MEMORY_MIB)
            assert await stand.devices.list() == ()


@in_event_loop
async def test_a_guest_that_keeps_a_processor_keeps_its_place_and_disks_go_on() -> None:
    async with growing() as stand:
        cpu = await stand.devices.confirm(await stand.devices.attach(spec=CpuSpec(number=1)))
        await stand.vmm.guest_lets_go(does=False)
        with pytest.raises(HypervisorError, match="quarantined and keeps slot 0 of cpus"):
            await stand.devices.detach(cpu)
        assert await stand.manager.present(stand.sandbox_id) == [cpu.hypervisor_id]
        plugged = await stand.devices.attach(spec=disk("a"))
        assert plugged.state == "plugged"
        await stand.vmm.guest_lets_go(does=True)
        await stand.devices.wait_devices({plugged.hypervisor_id: "plugged"})
        assert await stand.vmm.totals() == (1, MEMORY_MIB)


@in_event_loop
async def test_memory_by_acpi_comes_in_modules_and_stays() -> None:
    async with growing() as stand:
        one = await stand.devices.confirm(await stand.devices.attach(spec=MemorySpec(number=1, size_mib=128)))
        assert (await stand.devices.attach(spec=MemorySpec(number=1, size_mib=128))).device_id == one.device_id
        with pytest.raises(UsageError, match="memory 2 has 100 MiB"):
            await stand.devices.attach(spec=MemorySpec(number=2, size_mib=100))
        with pytest.raises(ExhaustedError, match=f"can have {MEMORY_MIB + 256} MiB of memory and not"):
            await stand.devices.attach(spec=MemorySpec(number=2, size_mib=256))
        assert await stand.vmm.totals() == (1, MEMORY_MIB + 128)
        with pytest.raises(UnsupportedError, match="memory that came by ACPI stays"):
            await stand.manager.remove(stand.sandbox_id, one.hypervisor_id)
        assert await stand.vmm.totals() == (1, MEMORY_MIB + 128)
        with pytest.raises(NotFoundError, match="memory-9"):
            await stand.manager.remove(stand.sandbox_id, "memory-9")


@in_event_loop
async def test_memory_by_virtio_mem_goes_when_the_guest_has_unplugged_it() -> None:
    async with growing(Resizing) as stand:
        one, two = [
            await stand.devices.confirm(await stand.devices.attach(spec=MemorySpec(number=number, size_mib=128)))
            for number in (1, 2)
        ]
        await totals_are(stand, (1, MEMORY_MIB + 256))
        await stand.devices.detach(one)
        assert await stand.vmm.totals() == (1, MEMORY_MIB + 128)
        await stand.vmm.guest_lets_go(does=False)
        with pytest.raises(HypervisorError, match="quarantined and keeps slot 1 of memory"):
            await stand.devices.detach(two)
        assert await stand.vmm.totals() == (1, MEMORY_MIB + 128)
        await stand.vmm.guest_lets_go(does=True)
        await stand.devices.wait_devices({})
        assert await stand.vmm.totals() == (1, MEMORY_MIB)


SPECS: dict[str, DeviceSpec] = {"cpu": CpuSpec(number=1), "memory": MemorySpec(number=1, size_mib=128)}
MORE = {"cpu": (2, MEMORY_MIB), "memory": (1, MEMORY_MIB + 128)}
of_each_kind = pytest.mark.parametrize("kind", SPECS)


@of_each_kind
@in_event_loop
async def test_an_answer_that_is_lost_is_settled_by_the_total(kind: str) -> None:
    async with growing(Resizing) as stand:
        await stand.vmm.misbehave("vm.resize", How.NEVER)
        part = await stand.devices.confirm(await stand.devices.attach(spec=SPECS[kind]))
        await totals_are(stand, MORE[kind])
        await stand.vmm.misbehave("vm.resize", How.ACTED_AND_REFUSED)
        await stand.devices.detach(part)
        assert await stand.vmm.totals() == (1, MEMORY_MIB)


@of_each_kind
@in_event_loop
async def test_an_add_that_is_refused_leaves_nothing_also_if_it_acted(kind: str) -> None:
    async with growing(Resizing) as stand:
        for how in (How.REFUSED, How.ACTED_AND_REFUSED):
            await stand.vmm.misbehave("vm.resize", how)
            with pytest.raises(HypervisorError, match="demanded"):
                await stand.devices.attach(spec=SPECS[kind])
            await stand.devices.wait_devices({})
            await totals_are(stand, (1, MEMORY_MIB))
            assert await stand.manager.present(stand.sandbox_id) == []


@of_each_kind
@in_event_loop
async def test_a_removal_that_is_refused_is_told_and_changes_nothing(kind: str) -> None:
    async with growing(Resizing) as stand:
        part = await stand.manager.plug(stand.sandbox_id, SPECS[kind])
        await totals_are(stand, MORE[kind])
        await stand.vmm.misbehave("vm.resize", How.REFUSED)
        with pytest.raises(HypervisorError, match="demanded"):
            await stand.manager.remove(stand.sandbox_id, part.hypervisor_id)
        assert await stand.manager.present(stand.sandbox_id) == [part.hypervisor_id]
        assert await stand.vmm.totals() == MORE[kind]


@of_each_kind
@in_event_loop
async def test_a_manager_that_starts_again_goes_on_awaiting_what_was_asked_for(kind: str) -> None:
    async with growing(Resizing) as stand:
        part = await stand.devices.confirm(await stand.devices.attach(spec=SPECS[kind]))
        await totals_are(stand, MORE[kind])
        await stand.vmm.guest_lets_go(does=False)
        removal = asyncio.gather(stand.devices.detach(part), return_exceptions=True)
        await stand.devices.wait_devices({part.hypervisor_id: "detaching"})
        stand.manager.kill()
        await stand.manager.start()
        assert await stand.manager.present(stand.sandbox_id) == [part.hypervisor_id]
        await stand.vmm.guest_lets_go(does=True)
        await removal
        await stand.devices.wait_devices({})
        assert await stand.vmm.totals() == (1, MEMORY_MIB)


@of_each_kind
@in_event_loop
async def test_killed_while_an_add_is_not_answered_the_manager_finds_what_came(kind: str) -> None:
    async with growing(Resizing) as stand:
        await stand.vmm.misbehave("vm.resize", How.LATE)
        call = asyncio.gather(stand.devices.attach(spec=SPECS[kind]), return_exceptions=True)
        while not any(line.startswith("-> vm.resize") for line in await stand.vmm.transcript()):  # noqa: ASYNC110 - its own pace
            await asyncio.sleep(0.02)
        stand.manager.kill()
        await call
        await stand.manager.start()
        part = await stand.devices.confirm(await stand.devices.attach(spec=SPECS[kind]))
        assert await stand.manager.present(stand.sandbox_id) == [part.hypervisor_id]
        await totals_are(stand, MORE[kind])
