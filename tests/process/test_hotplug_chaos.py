"""Devices come and go while a manager is killed at random moments. Of a real QEMU: tests/vm/test_hotplug.py."""

from __future__ import annotations

import asyncio

import pytest

from common.testing.chaos import survive
from common.testing.fake_vmms import FAKES
from common.testing.hotplug_stand import plugging
from common.testing.isolation import in_event_loop


async def run(hypervisor: str, victim: str, *, kills: int, cycles: int) -> None:
    async with plugging(hypervisor) as stand:
        disks = [stand.disk(name) for name in ("a", "b")]
        await survive(stand.devices, getattr(stand, victim), disks, kills=kills, cycles=cycles)
        assert await stand.vmm.has() == (set(), set())
        assert await stand.manager.present(stand.sandbox_id) == []


@pytest.mark.parametrize("hypervisor", FAKES)
@pytest.mark.parametrize("victim", ["devices", "manager"])
@in_event_loop
async def test_a_manager_may_die_at_any_moment(victim: str, hypervisor: str) -> None:
    await run(hypervisor, victim, kills=8, cycles=20)


@pytest.mark.soak
@pytest.mark.parametrize("hypervisor", FAKES)
@pytest.mark.parametrize("victim", ["devices", "manager"])
def test_a_manager_may_die_a_hundred_times(victim: str, hypervisor: str) -> None:
    asyncio.run(run(hypervisor, victim, kills=100, cycles=300))
