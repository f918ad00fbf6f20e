"""The old way and ours, on the same QEMU, as a demonstration: ``python -m common.testing.hotplug_demo``.

The old way is that of Kata's first hotplug for Cloud Hypervisor (its issue 4176), said in QMP: a removal is over when
it was accepted. Each attempt gives one thing more a new name, and each fails at the next. The guest does nothing wrong:
it is not done yet. What was done about it since, leaving the names to Cloud Hypervisor, is shown on that one.
docs/hotplug.md has what this prints.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from qemu.qmp import ExecuteError

from common import paths
from common.testing.clh_api import ClhApi
from common.testing.fake_vmms import Qemu, UnconfinedCloudHypervisor
from common.testing.hotplug_stand import FakeStand, HotplugStand, plugging, plugging_into

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.services.vmm import BlockSpec

ATTEMPTS = {
    "the same id again": {"name": "drive-0", "addr": "0x1f", "file": "a"},
    "a new id, the same slot": {"name": "drive-1", "addr": "0x1f", "file": "b"},
    "a new id, a new slot, the same disk": {"name": "drive-2", "addr": "0x1e", "file": "a"},
}


class OldWay:
    """Plugs and unplugs without waiting."""

    def __init__(self, qemu: Qemu) -> None:
        self._qemu = qemu

    async def add(self, name: str, addr: str, disk: BlockSpec) -> str:
        """Plug a disk; return in which words it was refused, or nothing."""
        node = {"driver": "raw", "node-name": name, "file": {"driver": "file", "filename": disk.source}}
        device = {"driver": "virtio-blk-pci", "id": name, "bus": "bridge0", "addr": addr, "drive": name}
        for command, arguments in (("blockdev-add", node), ("device_add", device)):
            try:
                await self._qemu.ask(command, **arguments)
            except ExecuteError as err:
                return str(err)
        return ""

    async def remove(self, name: str) -> None:
        """Unplug a disk and take that for done."""
        await self._qemu.ask("device_del", id=name)
        with suppress(ExecuteError):
            await self._qemu.ask("blockdev-del", **{"node-name": name})


async def old_way(stand: FakeStand) -> dict[str, tuple[str, list[str]]]:
    """Make every attempt; return in which words each was refused, and what was said on the monitor, but questions."""
    assert isinstance(stand.vmm, Qemu)
    way, outcomes = OldWay(stand.vmm), {}
    for title, attempt in ATTEMPTS.items():
        await stand.vmm.guest_lets_go(does=True)
        before = len(await stand.vmm.transcript())
        await way.add("drive-0", "0x1f", stand.disk("a"))
        await stand.vmm.guest_lets_go(does=False)  # before the next step: it needs time, and we do not wait
        await way.remove("drive-0")
        refusal = await way.add(attempt["name"], attempt["addr"], stand.disk(attempt["file"]))
        outcomes[title] = (refusal, _without_questions((await stand.vmm.transcript())[before:]))
        await _clean(stand.vmm)
    return outcomes


async def our_way(stand: FakeStand) -> list[str]:
    """Have a disk removed and wanted again at once; return what was said on the monitor, but questions."""
    await stand.vmm.guest_lets_go(does=True)
    disk = stand.disk("a")
    before = len(await stand.vmm.transcript())
    first = await stand.devices.confirm(await stand.devices.attach(spec=disk))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(stand.devices.detach(first))
        again = tasks.create_task(stand.devices.attach(spec=disk))
    await stand.devices.detach(again.result())
    return _without_questions((await stand.vmm.transcript())[before:])


def _without_questions(said: list[str]) -> list[str]:
    """Return what was said, but for mere questions and their answers: the managers look at a VM when they want to."""
    questions = {number for number, line in enumerate(said) if line.startswith(("-> query-", "-> qom-", "-> human-"))}
    return [line for number, line in enumerate(said) if not {number, number - 1} & questions]


async def left_to_clh(stand: HotplugStand[UnconfinedCloudHypervisor]) -> list[str]:
    """Add and remove without waiting and without ids, with a guest that is not done yet; return what was said."""
    directory = paths.vm_dir(stand.sandbox_id)
    slots = stand.vm.hotplug_buses[0].slots

    def run() -> None:
        api = ClhApi(directory)

        def add(name: str) -> None:
            api.put("vm.add-disk", path=stand.disk(name).source, image_type="Raw")

        for number in range(slots):
            add(f"d{number}")
            (entry,) = api.get("vm.info")["config"]["disks"]
            api.put("vm.remove-device", id=entry["id"])
            if number == 0:
                add("d0")
        add("one-more")
        add("one-more")

    await stand.vmm.guest_lets_go(does=False)
    await asyncio.to_thread(run)
    said = await stand.vmm.transcript()
    await stand.vmm.guest_lets_go(does=True)
    return said[said.index("-> vm.add-disk d0") :]


async def _clean(qemu: Qemu) -> None:
    """Have everything go, so that each attempt begins with nothing."""
    await qemu.guest_lets_go(does=True)
    for node in await qemu.ask("query-named-block-nodes"):
        await qemu.ask("blockdev-del", **{"node-name": node["node-name"]})


def shortened(said: list[str]) -> list[str]:
    """Return the beginning and the end of what was said: what is between is the same again and again."""
    return [*said[:10], "…", *said[-8:]]


def _told(outcomes: dict[str, tuple[str, list[str]]], left: list[str], ours: list[str]) -> Iterator[str]:
    for title, (_, transcript) in outcomes.items():
        yield f"the old way: {title}\n"
        yield from (f"  {line}" for line in transcript)
        yield ""
    yield "the old way: ids are Cloud Hypervisor's, nobody waits\n"
    yield from (f"  {line}" for line in shortened(left))
    yield ""
    yield "our way: the same disk again, at once\n"
    yield from (f"  {line}" for line in ours)


async def main() -> None:
    """Show both."""
    async with plugging_into(UnconfinedCloudHypervisor) as stand:
        left = await left_to_clh(stand)
    async with plugging() as stand:
        print("\n".join(_told(await old_way(stand), left, await our_way(stand))))  # noqa: T201 - a program


if __name__ == "__main__":
    asyncio.run(main())
