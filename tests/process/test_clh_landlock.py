"""A Cloud Hypervisor that may open nothing of the host but what its VM needs; the fake keeps the same rules."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from common import paths
from common.errors import AlreadyExistsError
from common.linux import landlock, mounts
from common.services.vmm import PmemSpec
from common.testing.clh_api import ClhApi
from common.testing.demands import How
from common.testing.fake_vmms import UnconfinedCloudHypervisor
from common.testing.hotplug_stand import ALL, plugging, plugging_into
from common.testing.isolation import in_event_loop

if TYPE_CHECKING:
    from common.testing.hotplug_stand import HotplugStand
    from common.testing.vmms import Vmm

pytestmark = pytest.mark.skipif(landlock.abi() < 3, reason="this kernel has no Landlock of Linux 6.2")


CLOUD_HYPERVISORS = {name: kind for name, kind in ALL.items() if kind.hypervisor == "clh"}
on_all = pytest.mark.parametrize("kind", CLOUD_HYPERVISORS.values(), ids=CLOUD_HYPERVISORS)


def left(stand: HotplugStand[Any]) -> list[str]:
    """Return what of files that were shown is still in the VM's directory."""
    directory = Path(paths.vm_dir(stand.sandbox_id))
    names = [file.name for file in directory.iterdir() if file.name.startswith(("disk-", "pmem-"))]
    return [*mounts.mounted_below(str(directory)), *names]


@on_all
@in_event_loop
async def test_what_comes_later_is_shown_to_it_and_nothing_else(tmp_path: Path, kind: type[Vmm]) -> None:
    async with plugging_into(kind) as stand:
        api = ClhApi(paths.vm_dir(stand.sandbox_id))
        outside = stand.disk("a").source
        assert await asyncio.to_thread(api.put, "vm.add-disk", path=outside) == "Permission denied (os error 13)"
        disk = await stand.devices.attach(spec=stand.disk("a"))
        memory = tmp_path / "memory"
        memory.write_bytes(bytes(2 << 20))
        pmem = await stand.devices.attach(spec=PmemSpec(source=str(memory)))
        assert await stand.vmm.has() == ({disk.hypervisor_id, pmem.hypervisor_id}, {"a"})
        assert left(stand) == []


@in_event_loop
async def test_a_refusal_names_the_file_that_the_caller_knows() -> None:
    async with plugging("clh") as stand:
        disk = stand.disk("a")
        await stand.manager.plug(stand.sandbox_id, disk, 0)
        with pytest.raises(AlreadyExistsError, match=rf"The file is already locked \(disk-2 is {disk.source}\)"):
            await stand.manager.plug(stand.sandbox_id, disk, 1)
        assert left(stand) == []


@in_event_loop
async def test_what_a_manager_showed_when_it_died_is_taken_back_with_the_device() -> None:
    async with plugging("clh") as stand:
        await stand.vmm.misbehave("vm.add-disk", How.LATE)
        call = asyncio.gather(stand.devices.attach(spec=stand.disk("a")), return_exceptions=True)
        while not any(line.startswith("-> vm.add-disk") for line in await stand.vmm.transcript()):  # noqa: ASYNC110 - its own pace
            await asyncio.sleep(0.02)
        stand.manager.kill()
        await call
        assert len(left(stand)) == 2
        await stand.manager.start()
        disk = await stand.devices.confirm(await stand.devices.attach(spec=stand.disk("a")))
        await stand.devices.detach(disk)
        assert await stand.vmm.has() == (set(), set())
        assert left(stand) == []


@in_event_loop
async def test_without_it_files_are_opened_where_they_are() -> None:
    async with plugging_into(UnconfinedCloudHypervisor) as stand:
        disk = stand.disk("a")
        await stand.devices.attach(spec=disk)
        info = await asyncio.to_thread(ClhApi(paths.vm_dir(stand.sandbox_id)).get, "vm.info")
        assert [entry["path"] for entry in info["config"]["disks"]] == [disk.source]
