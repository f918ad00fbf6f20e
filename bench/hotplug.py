"""What hotplug costs over the commands that it is made of, as ratios of one run; ``python -m bench.hotplug`` alone.

- One cycle of a disk, in one VM whose guest does nothing else. *Ours*: attach, confirm, detach, asked over the bus of
  both managers, with journals and records. *Bare*: ``blockdev-add``, ``device_add``, ``device_del``, the guest's
  confirmation (``DEVICE_DELETED``), ``blockdev-del``, over a second monitor of the same QEMU. The two take turns, a
  thousand times; one that fails, or leaves a device behind, ends the measurement.
- Then, without a peer, what of ours is spent where: a bus round trip, a record of the VM manager, a step of the
  journal.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from qemu.qmp import QMPClient

from common import paths
from common.services.device import Chapter
from common.services.vmm import BlockSpec
from common.testing.isolation import run_dir
from common.testing.managed_guest import HotplugStand, hotplugging
from procs.device_manager.journal import Journal
from procs.vmm_manager import record as records

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from common.services.device import Device

_ROUNDS = 1000
_WARM_UP = 5
_REPEATS = 200
_BRIDGE, _FREE_SLOT = "bridge0", "0x1e"
"""The last slot of the first bridge, which the device manager takes after all others."""


class BareDisk:
    """A disk that is plugged and unplugged by QMP alone."""

    def __init__(self, monitor: QMPClient, image: str) -> None:
        self._monitor = monitor
        self._image = image
        self._number = 0

    async def add(self) -> None:
        """Open the file and plug the device."""
        self._number += 1
        name = f"bare-{self._number}"
        file = {"driver": "file", "filename": self._image, "aio": "io_uring"}
        node = {"driver": "raw", "node-name": name, "read-only": False, "discard": "unmap", "file": file}
        await self._monitor.execute("blockdev-add", node)
        device = {"driver": "virtio-blk-pci", "disable-legacy": "on", "id": name, "drive": name, "serial": name}
        await self._monitor.execute("device_add", {**device, "bus": _BRIDGE, "addr": _FREE_SLOT})

    async def remove(self) -> None:
        """Ask the guest to let go, wait until it has, close the file."""
        name = f"bare-{self._number}"
        with self._monitor.listener("DEVICE_DELETED") as events:
            await self._monitor.execute("device_del", {"id": name})
            async for event in events:
                data = event["data"]
                if isinstance(data, dict) and data.get("device") == name:
                    break
        await self._monitor.execute("blockdev-del", {"node-name": name})


class OurDisk:
    """The same by way of the device manager."""

    def __init__(self, stand: HotplugStand, image: str) -> None:
        self._stand = stand
        self._spec = BlockSpec(source=image)

    async def add(self) -> None:
        """Have it plugged, and confirm it."""
        self.device = await self._stand.devices.attach(spec=self._spec)
        await self._stand.devices.confirm(self.device)

    async def remove(self) -> None:
        """Have it removed."""
        await self._stand.devices.detach(self.device)


async def measure() -> dict[str, list[float]]:
    """Return the seconds of everything, round by round."""
    sandbox_id = f"b{uuid.uuid4().hex[:8]}"
    Path(paths.share_dir(sandbox_id)).mkdir(parents=True)
    async with hotplugging(sandbox_id) as stand:
        monitor = QMPClient()
        await monitor.connect(f"{paths.vm_dir(sandbox_id)}/extra-monitor.sock")
        bare, ours = BareDisk(monitor, _image("bare")), OurDisk(stand, _image("ours"))
        samples: dict[str, list[float]] = {}
        for _ in range(_ROUNDS + _WARM_UP):
            for name, disk in (("bare", bare), ("ours", ours)):
                added, removed = await _timed(disk.add), await _timed(disk.remove)
                for what, took in (("add", added), ("remove", removed), ("cycle", added + removed)):
                    samples.setdefault(f"{name}: {what}", []).append(took)
        await monitor.disconnect()
        await stand.assert_agreed([])
        samples = {what: values[_WARM_UP:] for what, values in samples.items()}
        samples["a bus round trip"] = [await _timed(stand.devices.health) for _ in range(_REPEATS)]
        samples["a record of the VM manager"] = _record_writes(sandbox_id)
    samples["a step of the journal"] = _journal_steps(ours.device)
    return samples


def report(samples: dict[str, list[float]]) -> None:
    """Print medians and the ratio."""
    print(f"\n{'hotplug of a disk: milliseconds':<40} {'median':>8} {'p99':>8} {'n':>4}")
    for what, values in samples.items():
        worst = statistics.quantiles(values, n=100)[-1]
        print(f"{what:<40} {statistics.median(values) * 1000:8.2f} {worst * 1000:8.2f} {len(values):4}")
    ours, bare = statistics.median(samples["ours: cycle"]), statistics.median(samples["bare: cycle"])
    print(f"cycle: ours / bare = {ours * 1000:.1f} / {bare * 1000:.1f} = {ours / bare:.2f}")


def main() -> int:
    """Measure and print."""
    print("bench: cycles of a disk", flush=True)
    with run_dir():
        report(asyncio.run(measure()))
    return 0


def _image(name: str) -> str:
    file = Path(paths.run_dir()) / f"image-{name}"
    file.touch()
    os.truncate(file, 16 << 20)
    return str(file)


async def _timed(action: Callable[[], Awaitable[object]]) -> float:
    began = time.monotonic()
    await action()
    return time.monotonic() - began


def _record_writes(sandbox_id: str) -> list[float]:
    (record,) = (found for found in records.load_all() if found.sandbox_id == sandbox_id)
    took = []
    for _ in range(_REPEATS):
        began = time.monotonic()
        record.save()
        took.append(time.monotonic() - began)
    return took


def _journal_steps(device: Device) -> list[float]:
    took = []
    with Journal("device.63") as journal:
        for _ in range(_REPEATS):
            began = time.monotonic()
            journal.save(device, Chapter(at=began, event="measured", state="attached", detail=""))
            took.append(time.monotonic() - began)
    return took


if __name__ == "__main__":
    sys.exit(main())
