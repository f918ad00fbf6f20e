"""What a second device manager costs and gives, as ratios of one run; ``python -m bench.shards`` alone.

The real managers, with fake QEMUs whose guests take 20 ms to let a device go, so that what is measured is ours.

- CPU time of all device managers for one cycle of a disk (attach, confirm, detach), with two shards and with one; four
  sandboxes have cycles side by side. One shard and two take turns, and the least of each counts: whatever else runs on
  the machine only adds to it.
- The worst percent of the cycles of one shard's sandboxes while the other shard is idle, and while it is stopped and
  its callers wait. The two take turns. So rare a thing needs many cycles: of 480 five decide, and they were seen to be
  whatever else the machine did.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import sys
import time
from typing import TYPE_CHECKING

import psutil

from common.testing.hotplug_stand import disk
from common.testing.shard_stand import sharding

if TYPE_CHECKING:
    from collections.abc import Iterable

    from common.testing.device_stand import DeviceManager

_CPU_TURNS = 10
_LATENCY_TURNS = 40
_CYCLES = 40
_SANDBOXES = 4


async def cpu_per_cycle(shards: int) -> float:
    """Return the seconds of CPU time that all device managers together take for a cycle."""
    async with sharding(shards) as stand:
        sandboxes = [await stand.sandbox(shard=number % shards) for number in range(_SANDBOXES)]
        await cycles(sandboxes, 3)
        processes = [psutil.Process(shard.process.pid) for shard in stand.shards]
        before = _cpu(processes)
        await cycles(sandboxes, _CYCLES)
        return (_cpu(processes) - before) / (_CYCLES * _SANDBOXES)


async def latencies(turns: int) -> tuple[list[float], list[float]]:
    """Return the seconds of one shard's cycles while the other is idle, and while it is stopped; in turns."""
    idle: list[float] = []
    stopped: list[float] = []
    async with sharding(2) as stand:
        mine = [await stand.sandbox(shard=0) for _ in range(2)]
        others = [await stand.sandbox(shard=1) for _ in range(2)]
        await cycles([*mine, *others], 3)
        for _ in range(turns):
            idle += await cycles(mine, _CYCLES)
            os.kill(stand.shards[1].process.pid, signal.SIGSTOP)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(cycles(others, 1))
                stopped += await cycles(mine, _CYCLES)
                os.kill(stand.shards[1].process.pid, signal.SIGCONT)
    return idle, stopped


async def cycles(sandboxes: Iterable[DeviceManager], count: int) -> list[float]:
    """Have so many cycles in each sandbox, those of different sandboxes side by side; return their seconds."""

    async def run(number: int, devices: DeviceManager) -> list[float]:
        spec, took = disk(f"{devices.service}-{number}"), []
        for _ in range(count):
            began = time.monotonic()
            await devices.detach(await devices.confirm(await devices.attach(spec=spec)))
            took.append(time.monotonic() - began)
        return took

    taken = await asyncio.gather(*(run(number, devices) for number, devices in enumerate(sandboxes)))
    return [seconds for each in taken for seconds in each]


def main() -> int:
    """Measure and print."""
    print("bench: one device manager and two", flush=True)
    one: list[float] = []
    two: list[float] = []
    for _ in range(_CPU_TURNS):
        one.append(asyncio.run(cpu_per_cycle(1)))
        two.append(asyncio.run(cpu_per_cycle(2)))
    alone, beside = min(one) * 1000, min(two) * 1000
    print(f"\ndevice managers' CPU for a cycle: two / one = {beside:.2f} ms / {alone:.2f} ms = {beside / alone:.2f}")
    idle, stopped = asyncio.run(latencies(_LATENCY_TURNS))
    before, after = (statistics.quantiles(values, n=100)[-1] * 1000 for values in (idle, stopped))
    what = f"p99 of {len(idle)} cycles each: other shard stopped / idle"
    print(f"{what} = {after:.1f} ms / {before:.1f} ms = {after / before:.2f}")
    return 0


def _cpu(processes: Iterable[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(taken.user + taken.system for taken in times)


if __name__ == "__main__":
    sys.exit(main())
