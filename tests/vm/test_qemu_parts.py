"""Processors and memory of a real QEMU that come after the boot, and go."""

from __future__ import annotations

import pytest

from common import shards
from common.bus.events import Subscriber
from common.errors import ExhaustedError, HypervisorError, UnsupportedError, UsageError
from common.services.vmm import CpuSpec, MemorySpec
from common.testing.isolation import in_event_loop
from common.testing.managed_guest import hotplugging
from common.testing.vmm_stand import MEMORY_MIB, SERVICE, Monitor, booted, managing, removed

TWO_CPUS = {"default_maxvcpus": 2}
MORE_MEMORY = {"default_maxmemory": MEMORY_MIB + 256, "memory_slots": 2}


@in_event_loop
async def test_a_processor_comes_and_goes(sandbox: str) -> None:
    async with managing() as manager, Subscriber({SERVICE: shards.FIRST}) as news:
        vm = await manager.create(sandbox, **TWO_CPUS)
        await booted(vm)
        async with Monitor(vm) as monitor:
            cpu = await manager.plug(sandbox, CpuSpec(number=1))
            assert (cpu.hypervisor_id, await monitor.cpus()) == ("cpu-1", 2)
            assert await manager.present(sandbox) == [cpu.hypervisor_id]
            await monitor.taken(cpu.hypervisor_id)
            if vm.accelerator == "tcg":  # QEMU might end
                with pytest.raises(UnsupportedError, match="cpu-1 cannot be removed: under emulation"):
                    await manager.remove(sandbox, cpu.hypervisor_id)
                assert (await manager.present(sandbox), await monitor.cpus()) == ([cpu.hypervisor_id], 2)
            else:
                await manager.remove(sandbox, cpu.hypervisor_id)
                assert (await removed(news), await monitor.cpus()) == (cpu.hypervisor_id, 1)
                assert await manager.present(sandbox) == []
        with pytest.raises(UsageError, match="no slot 1 on a hotplug bus 'cpus'"):
            await manager.plug(sandbox, CpuSpec(number=2), 1)
        await manager.destroy(sandbox)


@in_event_loop
async def test_memory_comes_and_goes(sandbox: str) -> None:
    async with managing() as manager, Subscriber({SERVICE: shards.FIRST}) as news:
        vm = await manager.create(sandbox, **MORE_MEMORY)
        await booted(vm)
        async with Monitor(vm) as monitor:
            one = await manager.plug(sandbox, MemorySpec(number=1, size_mib=128), 0)
            two = await manager.plug(sandbox, MemorySpec(number=2, size_mib=128), 1)
            assert await monitor.memory_mib() == (MEMORY_MIB, 256)
            assert await monitor.memory_backends() == {one.hypervisor_id, two.hypervisor_id}
            for module in (one, two):
                await monitor.taken(module.hypervisor_id)
            for module in (one, two):
                await manager.remove(sandbox, module.hypervisor_id)
                assert await removed(news) == module.hypervisor_id
            assert await monitor.memory_mib() == (MEMORY_MIB, 0)
            assert await monitor.memory_backends() == set()
        await manager.destroy(sandbox)


@in_event_loop
async def test_memory_that_is_refused_is_given_back(sandbox: str) -> None:
    async with managing() as manager:
        vm = await manager.create(sandbox, **MORE_MEMORY)
        with pytest.raises(HypervisorError, match="QEMU refused device_add: not enough space"):
            await manager.plug(sandbox, MemorySpec(number=1, size_mib=512), 0)
        async with Monitor(vm) as monitor:
            assert await monitor.memory_backends() == set()
        assert await manager.present(sandbox) == []
        await manager.destroy(sandbox)


@in_event_loop
async def test_the_device_manager_counts_them_and_asks_for_each_once(sandbox: str) -> None:
    async with hotplugging(sandbox, **TWO_CPUS, **MORE_MEMORY) as stand, Monitor(stand.vm) as monitor:
        cpu = await stand.devices.attach(spec=CpuSpec(number=1))
        assert (await stand.devices.attach(spec=CpuSpec(number=1))).device_id == cpu.device_id
        with pytest.raises(ExhaustedError, match="no free cpu slot: of 1, 1 are held"):
            await stand.devices.attach(spec=CpuSpec(number=2))
        memory = await stand.devices.attach(spec=MemorySpec(number=1, size_mib=128))
        with pytest.raises(UsageError, match="memory 2 has 100 MiB"):
            await stand.devices.attach(spec=MemorySpec(number=2, size_mib=100))
        assert (await monitor.cpus(), (await monitor.memory_mib())[1]) == (2, 128)
        await monitor.taken(cpu.hypervisor_id)
        await monitor.taken(memory.hypervisor_id)
        for part in (cpu, memory):
            await stand.devices.confirm(part)
        await stand.devices.detach(memory)
        assert (await monitor.cpus(), (await monitor.memory_mib())[1]) == (2, 0)
        assert [device.device_id for device in await stand.devices.list()] == [cpu.device_id]
