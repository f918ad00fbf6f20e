"""Devices that come and go while a manager is killed again and again, at whatever moment that is."""

from __future__ import annotations

import asyncio
import random
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol, TypeVar

from common.errors import DeadlineError, InterruptedCallError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from common.services.vmm import BlockSpec
    from common.testing.device_stand import DeviceManager

T = TypeVar("T")

_SEED = 20
_BUSY_S = 0.3
"""Within which time after its start a manager is killed."""
_TIMEOUT_S = 600


class Victim(Protocol):
    """A process that can be killed and started."""

    def kill(self) -> None:
        """End it as a crash would."""

    async def start(self) -> None:
        """Start it, and return when it answers."""


async def survive(
    devices: DeviceManager, victim: Victim, disks: Iterable[BlockSpec], *, kills: int, cycles: int
) -> None:
    """Attach, confirm, detach disks side by side until all kills are done, and at least so often; end as it began."""
    before = await devices.devices()
    done = 0

    async def keep_busy(disk: BlockSpec) -> None:
        nonlocal done
        while not killing.done() or done < cycles:
            await _cycle(devices, disk)
            done += 1

    async with asyncio.timeout(_TIMEOUT_S), asyncio.TaskGroup() as tasks:
        killing = tasks.create_task(_kill(victim, kills))
        for disk in disks:
            tasks.create_task(keep_busy(disk))
    await devices.wait_devices(before)


async def _cycle(devices: DeviceManager, disk: BlockSpec) -> None:
    attached = await _insisted(lambda: devices.attach(spec=disk))
    await _insisted(lambda: devices.confirm(attached))
    await _insisted(lambda: devices.detach(attached))


async def _insisted(call: Callable[[], Awaitable[T]]) -> T:
    """Make a call until somebody is there to answer it."""
    while True:
        with suppress(UnavailableError, InterruptedCallError, DeadlineError):
            return await call()


async def _kill(victim: Victim, times: int) -> None:
    """Kill a manager so many times, each time at another moment of its life."""
    chance = random.Random(_SEED)  # noqa: S311 - a test's
    for _ in range(times):
        await asyncio.sleep(chance.uniform(0, _BUSY_S))
        victim.kill()
        await victim.start()
