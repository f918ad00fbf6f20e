"""Statistics, limits, and memory that runs out."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from common.errors import KataError, UsageError
from common.protocols import agent, metrics, stats, task
from common.testing.shim_client import KILLED, Shim, started
from common.testing.shim_stand import stand_test

if TYPE_CHECKING:
    from common.testing.fake_guest import FakeGuest
    from common.testing.shim_stand import ShimStand

RESOURCES = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"


async def running(stand: ShimStand) -> tuple[Shim, FakeGuest]:
    """Return a shim whose container runs, and its guest."""
    shim = await started(stand)
    await shim.create("sleep", "1000")
    await shim.start()
    assert stand.vms.guest is not None
    return shim, stand.vms.guest


async def memory(shim: Shim) -> tuple[int, int]:
    """Return how much memory the container uses, and how often the kernel killed for want of it."""
    reply = await shim.stand.call(shim.client, "Stats", task.IdRequest(id=shim.stand.id), task.StatsResponse)
    assert reply.stats is not None
    if reply.stats.type_url == metrics.V2_URL:
        v2 = metrics.MetricsV2.decode(reply.stats.value)
        assert v2.memory is not None
        assert v2.memory_events is not None
        return v2.memory.usage, v2.memory_events.oom_kill
    assert reply.stats.type_url == metrics.V1_URL
    v1 = metrics.MetricsV1.decode(reply.stats.value)
    assert v1.memory is not None
    assert v1.memory.usage is not None
    assert v1.memory_oom_control is not None
    return v1.memory.usage.usage, v1.memory_oom_control.oom_kill


async def update(shim: Shim, resources: object, type_url: str = RESOURCES) -> None:
    """Ask for other limits."""
    request = task.UpdateTaskRequest(
        id=shim.stand.id, resources=task.Any(type_url=type_url, value=json.dumps(resources).encode())
    )
    await shim.stand.call(shim.client, "Update", request, task.Empty)


@stand_test
async def test_statistics_are_the_guests_and_outlive_it(stand: ShimStand) -> None:
    shim, guest = await running(stand)
    used = stats.MemoryStats(usage=stats.MemoryData(usage=4096))
    guest.stats = stats.StatsContainerResponse(cgroup_stats=stats.CgroupStats(memory_stats=used))
    assert await memory(shim) == (4096, 0)
    await stand.vms.end_vm()
    assert await shim.wait() == KILLED
    assert await memory(shim) == (4096, 0)


@stand_test
async def test_memory_that_runs_out_is_told_before_the_end(stand: ShimStand) -> None:
    shim, guest = await running(stand)
    guest.out_of_memory.put_nowait("somebody else")
    guest.out_of_memory.put_nowait(stand.id)
    await stand.containerd.wait_topics(3)
    await shim.kill(9)
    assert await shim.wait() == KILLED
    assert (await stand.containerd.wait_topics(4))[2:] == ["/tasks/oom", "/tasks/exit"]
    assert await memory(shim) == (0, 1)


@stand_test
async def test_a_guest_that_always_runs_out_of_memory_does_not_fill_the_queue(stand: ShimStand) -> None:
    """The exit would be dropped as the oldest event if each of the guest's words were queued."""
    shim, guest = await running(stand)
    async with stand.containerd_away():
        for _ in range(5000):
            guest.out_of_memory.put_nowait(stand.id)
        await shim.kill(9)
        assert await shim.wait() == KILLED
    await stand.containerd.wait_topic("/tasks/exit")
    assert guest.methods().count("GetOOMEvent") < 100


@stand_test
async def test_an_update_reaches_the_guest_as_far_as_it_means_something_there(stand: ShimStand) -> None:
    shim, guest = await running(stand)
    await update(
        shim,
        {
            "memory": {"limit": 1 << 26},
            "cpu": {"quota": 50000, "period": 100000, "cpus": "0-3", "mems": "0"},
            "pids": {"limit": 10},
            "devices": [{"allow": False, "access": "rwm"}],
            "blockIO": {"weight": 10},
        },
    )
    request = guest.calls[-1][1]
    assert isinstance(request, agent.UpdateContainerRequest)
    assert request.resources is not None
    assert request.resources.memory is not None
    assert request.resources.memory.limit == 1 << 26
    assert request.resources.cpu is not None
    assert (request.resources.cpu.quota, request.resources.cpu.cpus) == (50000, "")
    assert request.resources.pids is not None
    assert request.resources.pids.limit == 10


@pytest.mark.parametrize(
    ("resources", "type_url", "said"),
    [
        ({}, "types.containerd.io/opencontainers/runtime-spec/1/WindowsResources", "invalid resources type"),
        ([], RESOURCES, "not valid"),
        ({"memory": {"limit": "1G"}}, RESOURCES, r"\$.memory.limit is '1G'"),
        ({"memory": 7}, RESOURCES, r"\$.memory is 7"),
        ({"cpu": [1]}, RESOURCES, "not valid"),
    ],
)
def test_an_update_that_is_none_is_refused(resources: object, type_url: str, said: str) -> None:
    @stand_test
    async def test(stand: ShimStand) -> None:
        shim, _ = await running(stand)
        with pytest.raises(UsageError, match=said):
            await update(shim, resources, type_url)

    test()


@stand_test
async def test_limits_may_change_before_the_start_and_not_after_the_end(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("sleep", "1000")
    await update(shim, {"pids": {"limit": 10}})
    await shim.start()
    await shim.kill(9)
    await shim.wait()
    with pytest.raises(KataError, match="cannot update a stopped container"):
        await update(shim, {"pids": {"limit": 20}})


@stand_test
async def test_an_update_during_the_start_waits_for_it(stand: ShimStand) -> None:
    shim = await started(stand)
    await shim.create("sleep", "1000")
    await asyncio.gather(shim.start(), update(shim, {"pids": {"limit": 10}}))
    assert stand.vms.guest is not None
    assert stand.vms.guest.methods()[-2:] == ["StartContainer", "UpdateContainer"]
