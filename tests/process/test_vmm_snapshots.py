"""A VM that is written into a directory, and goes on from there in another one."""

from __future__ import annotations

import json
import shutil
import uuid
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from common import paths
from common.errors import (
    HypervisorError,
    KataError,
    NotFoundError,
    StateError,
    UnsupportedError,
    UsageError,
)
from common.linux import cgroup, mounts
from common.services.vmm import MemoryMode
from common.testing.demands import How
from common.testing.fake_vmms import CloudHypervisor, Firecracker, OlderFirecracker, UnconfinedCloudHypervisor
from common.testing.hotplug_stand import HotplugStand, plugging, plugging_into
from common.testing.isolation import in_event_loop
from common.testing.real_vmms import REAL, RealCloudHypervisor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from common.services.vmm import Vm
    from common.testing.vmm_stand import Manager

Clh = CloudHypervisor | RealCloudHypervisor
KINDS: dict[str, type[Clh]] = {
    "clh": CloudHypervisor,
    "clh-unconfined": UnconfinedCloudHypervisor,
    **({"clh-real": RealCloudHypervisor} if "clh-real" in REAL else {}),
}
on_each = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


class Tall(CloudHypervisor):
    """One whose VM has more of everything, so that its configuration shows."""

    config: ClassVar[dict[str, object]] = {**CloudHypervisor.config, "default_bridges": 3}


def empty(name: str = "snapshot") -> Path:
    """Make an empty directory."""
    directory = Path(paths.run_dir()) / name
    directory.mkdir(mode=0o700)
    return directory


@asynccontextmanager
async def restored(manager: Manager, directory: Path, memory: MemoryMode = MemoryMode.COPY) -> AsyncIterator[Vm]:
    """A second sandbox, whose VM goes on from a snapshot."""
    sandbox_id = f"r{uuid.uuid4().hex[:8]}"
    Path(paths.sandbox_dir(sandbox_id)).mkdir(parents=True)
    try:
        yield await manager.restore(sandbox_id, directory, memory)
    finally:
        await manager.destroy(sandbox_id)
        cgroup.kill(sandbox_id)
        shutil.rmtree(paths.sandbox_dir(sandbox_id))


async def snapshot_of(stand: HotplugStand[Any]) -> Path:
    directory = empty()
    await stand.manager.pause(stand.sandbox_id)
    await stand.manager.snapshot(stand.sandbox_id, directory)
    return directory


@on_each
@pytest.mark.parametrize("memory", MemoryMode)
@in_event_loop
async def test_two_guests_go_on_from_one(kind: type[Clh], memory: MemoryMode) -> None:
    async with plugging_into(kind) as stand:
        directory = await snapshot_of(stand)
        assert mounts.mounted_below(paths.vm_dir(stand.sandbox_id)) == []
        async with restored(stand.manager, directory, memory) as vm:
            assert (await stand.manager.describe(vm.sandbox_id)).runstate == "running"
            assert vm.hotplug_buses == stand.vm.hotplug_buses
            assert vm.channel != stand.vm.channel
            other = kind()
            await other.connect(vm)
            try:
                added = await stand.manager.plug(vm.sandbox_id, stand.disk("a"))
                assert await other.has() == ({added.hypervisor_id}, {"a"})
            finally:
                await other.close()
        await stand.manager.resume(stand.sandbox_id)
        assert (await stand.manager.describe(stand.sandbox_id)).runstate == "running"


@in_event_loop
async def test_what_it_was_made_with_is_the_snapshots_and_its_memory_comes_as_wanted() -> None:
    async with plugging_into(Tall) as stand:
        directory = await snapshot_of(stand)
        moved = directory.rename(Path(paths.run_dir()) / "elsewhere")
        for memory, mode in ((MemoryMode.COPY, "Copy"), (MemoryMode.ON_DEMAND, "OnDemand")):
            async with restored(stand.manager, moved, memory) as vm:
                assert [bus.name for bus in vm.hotplug_buses] == ["segment0", "segment1", "segment2"]
                other = Tall()
                await other.connect(vm)
                assert await other.memory() == ("what the guest had in its memory", mode)
                await other.close()


@in_event_loop
async def test_a_vm_that_runs_or_has_devices_is_not_written() -> None:
    async with plugging("clh") as stand:
        directory = empty()
        with pytest.raises(StateError, match=r"is not paused \(`pause_vm` comes first\)"):
            await stand.manager.snapshot(stand.sandbox_id, directory)
        disk = await stand.manager.plug(stand.sandbox_id, stand.disk("a"))
        await stand.manager.pause(stand.sandbox_id)
        with pytest.raises(StateError, match=f"has devices: {disk.hypervisor_id}"):
            await stand.manager.snapshot(stand.sandbox_id, directory)
        assert list(directory.iterdir()) == []
        with pytest.raises(NotFoundError, match="sandbox nobody has no running VM"):
            await stand.manager.snapshot("nobody", directory)


@pytest.mark.parametrize("how", [How.REFUSED, How.ACTED_AND_REFUSED])
@in_event_loop
async def test_of_a_snapshot_that_failed_nothing_is_left(how: How) -> None:
    async with plugging("clh") as stand:
        directory = empty()
        await stand.manager.pause(stand.sandbox_id)
        await stand.vmm.misbehave("vm.snapshot", how)
        with pytest.raises(HypervisorError, match="demanded"):
            await stand.manager.snapshot(stand.sandbox_id, directory)
        assert list(directory.iterdir()) == []
        await stand.manager.snapshot(stand.sandbox_id, directory)
        with pytest.raises(UsageError, match="is not empty"):
            await stand.manager.snapshot(stand.sandbox_id, directory)
        (open_to_all := empty("open")).chmod(0o755)
        with pytest.raises(UsageError, match="is open to others than its owner"):
            await stand.manager.snapshot(stand.sandbox_id, open_to_all)
        with pytest.raises(UsageError, match="is not an absolute path"):
            await stand.manager.snapshot(stand.sandbox_id, Path("here"))


@in_event_loop
async def test_what_is_no_snapshot_for_this_version_is_refused_and_nothing_is_left() -> None:
    async with plugging("clh") as stand:
        with pytest.raises(NotFoundError, match="holds no whole snapshot"):
            await refused(stand.manager, empty("none"))
        directory = await snapshot_of(stand)
        (directory / "memory-ranges").rename(directory / "elsewhere")
        assert "No such file" in str(await refusal(stand.manager, directory))
        (directory / "elsewhere").rename(directory / "memory-ranges")
        file = directory / "snapshot.json"
        told = json.loads(file.read_text())
        file.write_text(json.dumps({**told, "version": "52.0.0"}))
        assert "53.0.0 cannot read a snapshot of 52.0.0" in str(await refusal(stand.manager, directory))
        file.write_text("{")
        assert "cannot be read" in str(await refusal(stand.manager, directory))


async def refusal(manager: Manager, directory: Path) -> KataError:
    """Return why a snapshot is not restored."""
    with pytest.raises(KataError) as raised:
        await refused(manager, directory)
    return raised.value


async def refused(manager: Manager, directory: Path) -> None:
    running = await manager.vms()
    try:
        async with restored(manager, directory):
            raise AssertionError("it was restored")
    finally:
        assert await manager.vms() == running


@in_event_loop
async def test_memory_on_demand_is_refused_of_a_version_without() -> None:
    async with plugging("clh", "--as", "51.1.0") as stand:
        directory = empty()
        await stand.manager.pause(stand.sandbox_id)
        await stand.manager.snapshot(stand.sandbox_id, directory)
        with pytest.raises(UnsupportedError, match="cannot give a guest its memory on demand, which 52 and later can"):
            async with restored(stand.manager, directory, MemoryMode.ON_DEMAND):
                pass
        async with restored(stand.manager, directory) as vm:
            assert vm.version == "51.1.0"


FIRECRACKERS: dict[str, type[Firecracker]] = {"1.16": Firecracker, "1.12": OlderFirecracker}


@pytest.mark.parametrize("kind", FIRECRACKERS.values(), ids=FIRECRACKERS)
@in_event_loop
async def test_of_firecracker_memory_is_mapped(kind: type[Firecracker]) -> None:
    async with plugging_into(kind) as stand:
        directory = await snapshot_of(stand)
        root = Path(paths.vm_dir(stand.sandbox_id)) / "jail"
        assert mounts.mounted_below(str(root)) == [str(root)], "nothing of it is left in the jail"
        assert {file.name: file.stat().st_uid for file in directory.iterdir()} == dict.fromkeys(
            ("state", "memory", "snapshot.json"), 0
        )
        with pytest.raises(UnsupportedError, match=r"cannot give a guest its memory copy \(it can be had on-demand\)"):
            async with restored(stand.manager, directory):
                pass
        async with restored(stand.manager, directory, MemoryMode.ON_DEMAND) as vm:
            assert (await stand.manager.describe(vm.sandbox_id)).runstate == "running"
            assert vm.hotplug_buses == stand.vm.hotplug_buses
            other = kind()
            await other.connect(vm)
            assert await other.ask("memory") == "what the guest had in its memory"
            added = await stand.manager.plug(vm.sandbox_id, stand.disk("a"), bus=stand.vmm.bus)
            assert await other.has() == ({added.hypervisor_id}, {"a"})
            await other.close()
        (directory / "state").unlink()
        with pytest.raises(HypervisorError, match="No such file"):
            async with restored(stand.manager, directory, MemoryMode.ON_DEMAND):
                pass


@in_event_loop
async def test_a_hypervisor_without_snapshots_says_so() -> None:
    async with plugging("qemu") as stand:
        with pytest.raises(UnsupportedError, match=r"have no snapshots here .*\[hypervisor.clh\]"):
            await stand.manager.snapshot(stand.sandbox_id, empty())
        with pytest.raises(UnsupportedError, match="have no snapshots here"):
            await stand.manager.restore("another", empty("none"))
