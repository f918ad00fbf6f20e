"""Several device managers on one host: each has its sandboxes, and none gets in another's way."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import uuid
from typing import TYPE_CHECKING

import pytest

from common import shards
from common.errors import AlreadyExistsError, InterruptedCallError, KataError
from common.testing.fake_vmms import FAKES
from common.testing.hotplug_stand import a_vm, disk
from common.testing.isolation import in_event_loop
from common.testing.shard_stand import sharding
from common.testing.vmm_stand import managing

if TYPE_CHECKING:
    from common.testing.device_stand import DeviceManager


async def cycle(devices: DeviceManager, name: str) -> None:
    """Attach, confirm, detach."""
    await devices.detach(await devices.confirm(await devices.attach(spec=disk(name))))


async def has_nothing(devices: DeviceManager) -> bool:
    return await devices.list() == ()


@in_event_loop
async def test_a_shard_that_is_stopped_stops_nobody_else() -> None:
    async with sharding(2) as stand:
        mine, other = await stand.sandbox(shard=0), await stand.sandbox(shard=1)
        await cycle(other, "b")
        os.kill(stand.shards[1].process.pid, signal.SIGSTOP)
        for _ in range(10):
            await cycle(mine, "a")
        hanging = asyncio.gather(other.attach(spec=disk("b")))
        await cycle(mine, "a")
        assert not hanging.done()
        os.kill(stand.shards[1].process.pid, signal.SIGCONT)
        ((attached),) = await hanging
        assert attached.state == "plugged"
        assert await has_nothing(mine), "each knows its own"


@in_event_loop
async def test_a_hypervisor_that_hangs_stops_no_other_sandbox_of_its_shard() -> None:
    async with sharding(1) as stand:
        waiting = await stand.sandbox(shard=0)
        (vm,) = await stand.manager.vms()
        other = await stand.sandbox(shard=0)
        os.kill(vm.process.pid, signal.SIGSTOP)
        hanging = asyncio.gather(waiting.attach(spec=disk("b")))
        for _ in range(5):
            await cycle(other, "a")
        assert not hanging.done()
        os.kill(vm.process.pid, signal.SIGCONT)
        ((attached),) = await hanging
        assert attached.state == "plugged"


@in_event_loop
async def test_a_disk_is_written_by_one_sandbox_of_the_host_whichever_shards_they_have() -> None:
    async with sharding(2) as stand:
        mine, other = await stand.sandbox(shard=0), await stand.sandbox(shard=1)
        held = await mine.attach(spec=disk("a"))
        with pytest.raises(AlreadyExistsError, match=f"/a is held by device {held.device_id} of sandbox"):
            await other.attach(spec=disk("a"))
        assert await has_nothing(other)
        stand.shards[0].kill()
        with pytest.raises(AlreadyExistsError):  # whoever is away keeps what it has
            await other.attach(spec=disk("a"))
        await stand.shards[0].start()
        await mine.detach(held)
        assert (await other.attach(spec=disk("a"))).state == "plugged"


@pytest.mark.parametrize("point", ["claim:taken", "row:removed"])
@in_event_loop
async def test_a_claim_that_a_dead_shard_leaves_is_dropped_by_its_successor(point: str) -> None:
    async with sharding(2) as stand:
        mine, other = await stand.sandbox(shard=0), await stand.sandbox(shard=1)
        stand.shards[0].kill()
        await stand.shards[0].start(fatal=f"{point}:kill")
        with pytest.raises(InterruptedCallError):
            await cycle(mine, "a")
        with pytest.raises(AlreadyExistsError):
            await other.attach(spec=disk("a"))
        await asyncio.to_thread(stand.shards[0].process.wait)
        await stand.shards[0].start()
        while True:  # until it has heard from the VM manager
            try:
                attached = await other.attach(spec=disk("a"))
            except AlreadyExistsError:
                continue
            break
        assert attached.state == "plugged"


@in_event_loop
async def test_another_number_of_shards_strands_nobody() -> None:
    async with sharding(2) as stand:
        old = [await stand.sandbox(shard=number) for number in range(2)]
        held = [await devices.attach(spec=disk(name)) for devices, name in zip(old, "ab", strict=True)]
        for count in (1, 3):
            stand.kill()
            await stand.start(count)
            new = await stand.sandbox(shard=count - 1)
            await cycle(new, "c")
            for devices, device in zip(old, held, strict=True):
                assert [found.device_id for found in await devices.list()] == [device.device_id]
                await cycle(devices, "d")
            with pytest.raises(AlreadyExistsError):
                await new.attach(spec=disk("b"))
        for devices, device in zip(old, held, strict=True):
            await devices.detach(device)
            assert await has_nothing(devices)


@in_event_loop
async def test_a_shard_of_more_that_somebody_still_serves_is_left_to_them() -> None:
    async with sharding(2) as stand:
        mine, other = await stand.sandbox(shard=0), await stand.sandbox(shard=1)
        await cycle(other, "b")
        stand.shards[0].kill()
        (alone,) = stand.shards[:1]
        alone._shard = "0/1"
        await alone.start()
        await cycle(mine, "a")
        await cycle(other, "b")


def test_what_is_no_shard_is_said() -> None:
    for value in ("1/1", "2", "0/0", "0/65", "-1/2", "a/b"):
        command = [sys.executable, "-m", "procs.device_manager", f"--shard={value}"]
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert f"'{value}' is no K/N with 0 <= K < N <= 64" in refused.stderr


@in_event_loop
async def test_a_wrong_number_of_shards_makes_no_vm(monkeypatch: pytest.MonkeyPatch) -> None:
    async with sharding(1) as stand:
        monkeypatch.setenv("KATA_DEVICE_MANAGER_SHARDS", "many")
        stand.manager.kill()
        await stand.manager.start()
        monkeypatch.setenv("KATA_DEVICE_MANAGER_SHARDS", "1")
        with pytest.raises(KataError, match="KATA_DEVICE_MANAGER_SHARDS is 'many'"):
            await stand.sandbox(shard=0)


@pytest.mark.parametrize("hypervisor", FAKES)
@pytest.mark.usefixtures("run_dir")
@in_event_loop
async def test_a_vm_bears_its_shard_whatever_its_hypervisor(hypervisor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(shards.VARIABLE, "2")
    ids = (f"h{uuid.uuid4().hex[:8]}" for _ in range(1000))
    sandbox_id = next(name for name in ids if shards.of(name) == shards.service_name(1))
    kind = FAKES[hypervisor]
    async with managing(kind.hypervisor) as manager, a_vm(manager, sandbox_id, kind) as (vm, _):
        assert vm.device_manager == shards.service_name(1)
