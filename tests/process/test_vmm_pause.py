"""A guest whose processors are stopped, and go on, by the VM manager's verbs; on every hypervisor."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING, Any

import pytest

from common import shards
from common.bus.events import Resync, Subscriber
from common.errors import HypervisorError, NotFoundError
from common.testing.demands import How
from common.testing.fake_vmms import FAKES
from common.testing.hotplug_stand import ALL, HotplugStand, plugging, plugging_into
from common.testing.isolation import in_event_loop
from common.testing.vmm_stand import heard, removed

if TYPE_CHECKING:
    from common.testing.vmms import Vmm

on_all = pytest.mark.parametrize("kind", ALL.values(), ids=ALL)
on_fakes = pytest.mark.parametrize("hypervisor", FAKES)
WAITING = {name: kind for name, kind in ALL.items() if kind.waits_for_guest}
on_all_that_wait = pytest.mark.parametrize("kind", WAITING.values(), ids=WAITING)
PAUSES = {"qemu": "stop", "clh": "vm.pause", "firecracker": "PATCH /vm", "firecracker-1.12": "PATCH /vm"}


async def runstate(stand: HotplugStand[Any]) -> str:
    return (await stand.manager.describe(stand.sandbox_id)).runstate


@on_all
@in_event_loop
async def test_a_guest_is_paused_and_goes_on_and_each_may_be_asked_for_twice(kind: type[Vmm]) -> None:
    async with plugging_into(kind) as stand:
        for _ in range(2):
            await stand.manager.pause(stand.sandbox_id)
            assert await runstate(stand) == "paused"
        for _ in range(2):
            await stand.manager.resume(stand.sandbox_id)
            assert await runstate(stand) == "running"


@on_all_that_wait
@in_event_loop
async def test_a_guest_lets_nothing_go_while_it_is_paused(kind: type[Vmm]) -> None:
    async with plugging_into(kind) as stand, Subscriber({stand.manager.service: shards.FIRST}) as news:
        added = await stand.manager.plug(stand.sandbox_id, stand.disk("a"))
        await stand.manager.pause(stand.sandbox_id)
        await stand.manager.remove(stand.sandbox_id, added.hypervisor_id)
        assert await stand.manager.present(stand.sandbox_id) == [added.hypervisor_id]
        await stand.manager.resume(stand.sandbox_id)
        assert await removed(news) == added.hypervisor_id
        assert await stand.vmm.has() == (set(), set())


@on_all
@in_event_loop
async def test_a_manager_that_starts_again_knows_what_is_paused(kind: type[Vmm]) -> None:
    async with plugging_into(kind) as stand:
        await stand.manager.pause(stand.sandbox_id)
        stand.manager.kill()
        await stand.manager.start()
        assert await runstate(stand) == "paused"
        await stand.manager.resume(stand.sandbox_id)
        assert await runstate(stand) == "running"


@on_fakes
@in_event_loop
async def test_a_pause_that_is_refused_is_told_and_one_that_acted_is_a_pause(hypervisor: str) -> None:
    async with plugging(hypervisor) as stand:
        await stand.vmm.misbehave(PAUSES[hypervisor], How.REFUSED)
        with pytest.raises(HypervisorError, match="demanded"):
            await stand.manager.pause(stand.sandbox_id)
        assert await runstate(stand) == "running"
        await stand.vmm.misbehave(PAUSES[hypervisor], How.ACTED_AND_REFUSED)
        await stand.manager.pause(stand.sandbox_id)
        assert await runstate(stand) == "paused"


@on_fakes
@in_event_loop
async def test_a_vm_that_has_ended_or_never_was_is_said(hypervisor: str) -> None:
    async with plugging(hypervisor) as stand, Subscriber({stand.manager.service: shards.FIRST}) as news:
        assert isinstance(await anext(news), Resync)
        with pytest.raises(NotFoundError, match="sandbox nobody has no running VM"):
            await stand.manager.pause("nobody")
        os.kill(stand.vm.process.pid, signal.SIGKILL)
        with pytest.raises(NotFoundError, match=stand.sandbox_id):
            await stand.manager.pause(stand.sandbox_id)
        await heard(news, "vm-exited")
        with pytest.raises(NotFoundError, match=f"sandbox {stand.sandbox_id} has no running VM"):
            await stand.manager.resume(stand.sandbox_id)
