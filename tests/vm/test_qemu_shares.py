"""Shares of a real QEMU: plugged, unplugged, lost; with a real virtiofsd and, where it matters, a real guest."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import psutil
import pytest

from common import paths, shards
from common.bus.events import Subscriber
from common.errors import AlreadyExistsError, HypervisorError, NotFoundError, UsageError
from common.linux import cgroup, mounts
from common.services import vmm
from common.testing.isolation import in_event_loop
from common.testing.vmm_stand import SERVICE, Monitor, booted, managing, removed, resynced


def daemons(sandbox: str) -> list[psutil.Process]:
    """Return the virtiofsd processes of a sandbox: two each, one of them inside the sandbox that it made."""
    found = [psutil.Process(pid) for pid in cgroup.processes(sandbox)]
    return [process for process in found if process.name() == "virtiofsd"]


async def ended(processes: list[psutil.Process]) -> None:
    _, alive = await asyncio.to_thread(psutil.wait_procs, processes, timeout=60)
    assert alive == []


@in_event_loop
async def test_devices_come_and_go(sandbox: str) -> None:
    async with managing() as manager, Subscriber({SERVICE: shards.FIRST}) as news:
        await booted(await manager.create(sandbox))
        for number, (slot, path) in enumerate([(0, "04/01"), (0, "04/01"), (29, "04/1e")], start=1):
            device = await manager.add(sandbox, slot)
            assert device == vmm.AddedDevice(hypervisor_id=f"share-{number}", guest_path=path), "no id is used twice"
            assert await manager.present(sandbox) == [device.hypervisor_id]
            serving = daemons(sandbox)
            await manager.remove(sandbox, device.hypervisor_id)
            assert await removed(news) == device.hypervisor_id
            assert await manager.present(sandbox) == []
            await ended(serving)
        left = {name for name in os.listdir(paths.vm_dir(sandbox)) if name.startswith("share")}  # noqa: PTH208
        assert left == set()
        await manager.destroy(sandbox)


@in_event_loop
async def test_a_slot_takes_one_device(sandbox: str) -> None:
    async with managing() as manager:
        await manager.create(sandbox)
        both = await asyncio.gather(manager.add(sandbox), manager.add(sandbox), return_exceptions=True)
        refused = [result for result in both if isinstance(result, BaseException)]
        assert [type(error) for error in refused] == [AlreadyExistsError]
        assert "slot 0 of hotplug bus bridge0 holds share-1" in str(refused[0])
        assert await manager.present(sandbox) == ["share-1"]
        with pytest.raises(UsageError, match="no slot 30 on a hotplug bus 'bridge0'"):
            await manager.add(sandbox, 30)
        await manager.destroy(sandbox)


@in_event_loop
async def test_devices_survive_the_manager(sandbox: str) -> None:
    async with managing() as manager, Subscriber({SERVICE: shards.FIRST}) as news:
        await resynced(news)
        await booted(await manager.create(sandbox))
        await manager.add(sandbox, 0)
        await manager.add(sandbox, 1)
        manager.kill()
        await manager.start()
        await resynced(news)
        assert sorted(await manager.present(sandbox)) == ["share-1", "share-2"]
        with pytest.raises(AlreadyExistsError):
            await manager.add(sandbox, 0)
        await manager.remove(sandbox, "share-1")
        await manager.remove(sandbox, "share-1") if "share-1" in await manager.present(sandbox) else None
        assert await removed(news) == "share-1"
        assert (await manager.add(sandbox, 0)).hypervisor_id == "share-3"
        await manager.destroy(sandbox)


@in_event_loop
async def test_a_removal_while_the_manager_is_away_is_told_on_return(sandbox: str) -> None:
    async with managing() as manager:
        vm = await manager.create(sandbox)
        await booted(vm)
        await manager.add(sandbox)
        serving = daemons(sandbox)
        manager.kill()
        async with Monitor(vm) as monitor:
            await monitor.unplug("share-1")
        assert all(process.is_running() for process in serving)
        await manager.start()
        await ended(serving)
        assert (await manager.add(sandbox)).hypervisor_id == "share-2"
        await manager.destroy(sandbox)


@in_event_loop
async def test_an_unknown_device_cannot_be_removed(sandbox: str) -> None:
    async with managing() as manager:
        await manager.create(sandbox)
        with pytest.raises(NotFoundError, match="'share-9' not found"):
            await manager.remove(sandbox, "share-9")
        await manager.destroy(sandbox)


@in_event_loop
async def test_a_failed_plug_is_undone(sandbox: str) -> None:
    async with managing() as manager:
        vm = await manager.create(sandbox)
        with pytest.raises(HypervisorError, match=r"virtiofsd said: .*/no/such/directory"):
            await manager.add(sandbox, source="/no/such/directory")
        await ended(daemons(sandbox))
        assert cgroup.processes(sandbox) == [vm.process.pid]
        assert await manager.present(sandbox) == []
        assert (await manager.add(sandbox)).hypervisor_id == "share-2", "and its id is not used again"
        await manager.destroy(sandbox)


@in_event_loop
async def test_what_is_mounted_later_reaches_the_daemon(sandbox: str) -> None:
    """The source is a shared mount point, as the shim makes it; the path has what option parsers trip over."""
    source = f"{paths.sandbox_dir(sandbox)}/a,b\\c"
    Path(source).mkdir()
    mounts.mount(source, source, flags=mounts.MS_BIND)
    mounts.set_propagation(source, mounts.MS_SHARED)
    async with managing() as manager:
        await manager.create(sandbox)
        await manager.add(sandbox, source=source)
        rootfs = Path(source) / "rootfs"
        rootfs.mkdir()
        mounts.mount("later", str(rootfs), "tmpfs")
        (rootfs / "file").write_text("seen")
        inner = daemons(sandbox)[-1]
        assert Path(f"/proc/{inner.pid}/root/rootfs/file").read_text() == "seen"
        await manager.destroy(sandbox)
        mounts.unmount_below(source)


@in_event_loop
async def test_the_death_of_a_daemon_is_told_and_ends_its_vm(sandbox: str) -> None:
    async with managing() as manager:
        await manager.create(sandbox)
        await manager.add(sandbox)
        manager.kill()
        await manager.start()  # it watches also what it did not start
        for daemon in daemons(sandbox):
            daemon.kill()
        record = await manager.logs("virtiofsd died, ending its VM")
        assert (record["level"], record["sandbox"], record["device"]) == ("error", sandbox, "share-1")
        await manager.logs("VM ended")
        assert daemons(sandbox) == []
        await manager.destroy(sandbox)


@in_event_loop
async def test_the_end_of_a_sandbox_is_no_death_of_a_daemon(sandbox: str) -> None:
    async with managing() as manager:
        await manager.create(sandbox)
        await manager.add(sandbox)
        await manager.destroy(sandbox)
        assert "virtiofsd died, ending its VM" not in {record["event"] for record in manager.logged()}
