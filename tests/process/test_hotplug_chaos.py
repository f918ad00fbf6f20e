"""Devices come and go while a manager is killed again and again, at whatever moment that is."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol, TypeVar

import pytest

from common.errors import DeadlineError, InterruptedCallError, UnavailableError
from common.testing.fake_vmms import FAKES
from common.testing.hotplug_stand import FakeStand, plugging
from common.testing.isolation import in_event_loop

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")

SEED = 20
BUSY_S = 0.3
"""Within which time after its start a manager is killed."""


class Victim(Protocol):
    """A process that can be killed and started."""

    def kill(self) -> None: ...
    async def start(self) -> None: ...


async def insisted(call: Callable[[], Awaitable[T]]) -> T:
    """Make a call until somebody is there to answer it."""
    while True:
        with suppress(UnavailableError, InterruptedCallError, DeadlineError):
            return await call()


async def cycle(stand: FakeStand, name: str) -> None:
    """Attach, confirm, detach."""
    disk = stand.disk(name)
    attached = await insisted(lambda: stand.devices.attach(spec=disk))
    await insisted(lambda: stand.devices.confirm(attached))
    await insisted(lambda: stand.devices.detach(attached))


async def killed(victim: Victim, times: int) -> None:
    """Kill a manager so many times, each time at another moment of its life."""
    chance = random.Random(SEED)  # noqa: S311 - a test's
    for _ in range(times):
        await asyncio.sleep(chance.uniform(0, BUSY_S))
        victim.kill()
        await victim.start()


async def survive(stand: FakeStand, victim: Victim, *, kills: int, cycles: int) -> None:
    """Run cycles of two disks side by side until all kills are done, and at least so many; then all have to agree."""
    done = 0

    async def keep_busy(name: str) -> None:
        nonlocal done
        while not killing.done() or done < cycles:
            await cycle(stand, name)
            done += 1

    async with asyncio.timeout(600), asyncio.TaskGroup() as tasks:
        killing = tasks.create_task(killed(victim, kills))
        for name in ("a", "b"):
            tasks.create_task(keep_busy(name))
    await stand.devices.wait_devices({})
    assert await stand.vmm.has() == (set(), set())
    assert await stand.manager.present(stand.sandbox_id) == []


@pytest.mark.parametrize("hypervisor", FAKES)
@pytest.mark.parametrize("name", ["devices", "manager"])
@in_event_loop
async def test_a_manager_may_die_at_any_moment(name: str, hypervisor: str) -> None:
    async with plugging(hypervisor) as stand:
        await survive(stand, getattr(stand, name), kills=8, cycles=20)


@pytest.mark.soak
@pytest.mark.parametrize("hypervisor", FAKES)
@pytest.mark.parametrize("name", ["devices", "manager"])
def test_a_manager_may_die_a_hundred_times(name: str, hypervisor: str) -> None:
    async def run() -> None:
        async with plugging(hypervisor) as stand:
            await survive(stand, getattr(stand, name), kills=100, cycles=300)

    asyncio.run(run())
