"""Disks of a real QEMU: plugged, refused, unplugged. What QEMU lists, its open files and its locks always agree."""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from common import paths, shards
from common.bus.events import Subscriber
from common.config import BlockDriver
from common.errors import AlreadyExistsError, HypervisorError, KataError, NotFoundError, UsageError
from common.services import vmm
from common.testing.isolation import in_event_loop
from common.testing.managed_guest import open_images
from common.testing.vmm_stand import SERVICE, Monitor, booted, managing, removed, resynced

if TYPE_CHECKING:
    from common.testing.vmm_stand import Manager

SCSI = BlockDriver.VIRTIO_SCSI
SERIAL = "0123456789abcdef0123"
_FLOCK = struct.Struct("hhqqi4x")  # struct flock (fcntl(2)) on x86-64


def image(sandbox: str, name: str = "image") -> str:
    """Make a disk of 1 MiB."""
    path = Path(paths.sandbox_dir(sandbox)) / name
    path.touch()
    os.truncate(path, 1 << 20)
    return str(path)


def disk(source: str, *, is_read_only: bool = False, driver: BlockDriver = BlockDriver.VIRTIO_BLK) -> vmm.BlockSpec:
    return vmm.BlockSpec(source=source, is_read_only=is_read_only, driver=driver)


def is_locked(path: str) -> bool:
    """Return whether somebody has a lock on a file."""
    with Path(path).open("rb+") as file:
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, *_ = _FLOCK.unpack(fcntl.fcntl(file, fcntl.F_OFD_GETLK, asked))
    return bool(kind != fcntl.F_UNLCK)


async def assert_agreed(manager: Manager, vm: vmm.Vm, wanted: dict[str, str], monitor: Monitor | None = None) -> None:
    """Check that all who know of disks know of these, by id, and of no other."""
    if monitor is None:
        async with Monitor(vm) as opened:
            await assert_agreed(manager, vm, wanted, opened)
            return
    assert sorted(await manager.present(vm.sandbox_id)) == sorted(wanted)
    assert await monitor.plugged() == set(wanted)
    assert await monitor.block_nodes() == set(wanted)
    assert open_images(vm) == sorted(wanted.values())


@pytest.mark.parametrize("driver", [BlockDriver.VIRTIO_BLK, BlockDriver.VIRTIO_SCSI])
@in_event_loop
async def test_disks_come_and_go(sandbox: str, driver: BlockDriver) -> None:
    where = {BlockDriver.VIRTIO_BLK: ("04/01", "04/02"), SCSI: ("0:0", "0:1")}[driver]
    async with managing() as manager, Subscriber({SERVICE: shards.FIRST}) as news:
        vm = await manager.create(sandbox, block_device_driver=driver)
        await booted(vm)
        first, second = image(sandbox, "image1"), image(sandbox, "image2")
        for number in (1, 3, 5):  # the same files again and again, at once
            one = await manager.plug(sandbox, disk(first, driver=driver), 0)
            two = await manager.plug(sandbox, disk(second, driver=driver), 1, serial=SERIAL)
            assert (one.guest_path, two.guest_path) == where
            ids = [f"disk-{number}", f"disk-{number + 1}"]
            assert [one.hypervisor_id, two.hypervisor_id] == ids, "no id is used twice"
            await assert_agreed(manager, vm, {ids[0]: first, ids[1]: second})
            listed = {device.hypervisor_id: device for device in await manager.list(sandbox)}
            assert (listed[ids[1]].slot, listed[ids[1]].serial) == (1, SERIAL)
            for device, path in ((one, first), (two, second)):
                await manager.remove(sandbox, device.hypervisor_id)
                assert await removed(news) == device.hypervisor_id
                assert not is_locked(path), "it is told when the file is free, not before"
            await assert_agreed(manager, vm, {})
        await manager.destroy(sandbox)


@in_event_loop
async def test_a_refused_disk_leaves_nothing(sandbox: str) -> None:
    async with managing() as manager:
        vm = await manager.create(sandbox)
        path, other = image(sandbox, "image1"), image(sandbox, "image2")
        held = await manager.plug(sandbox, disk(path), 0)
        refusals: list[tuple[vmm.BlockSpec, int, type[KataError], str]] = [
            (disk(other), 0, AlreadyExistsError, "slot 0 of hotplug bus bridge0 holds disk-1"),
            (disk(other), 30, UsageError, "no slot 30"),
            (disk(f"{path}x"), 1, NotFoundError, "does not exist"),
            (disk(paths.sandbox_dir(sandbox)), 1, UsageError, "neither a regular file nor a block device"),
            (disk(path), 1, HypervisorError, 'Failed to get "write" lock'),
            (disk(path, is_read_only=True), 1, HypervisorError, 'Failed to get shared "write" lock'),
        ]
        for spec, slot, kind, said in refusals:
            with pytest.raises(kind, match=said):
                await manager.plug(sandbox, spec, slot)
            await assert_agreed(manager, vm, {held.hypervisor_id: path})
        assert not is_locked(other)
        await manager.destroy(sandbox)
        assert not is_locked(path)


@in_event_loop
async def test_a_device_that_qemu_refuses_after_it_opened_the_file_leaves_it_closed(sandbox: str) -> None:
    """The VM has no SCSI controller of that name: the file is open by then."""
    async with managing() as manager:
        vm = await manager.create(sandbox)
        path = image(sandbox)
        with pytest.raises(HypervisorError, match=r"device_add"):
            await manager.plug(sandbox, disk(path, driver=SCSI), 0, bus="bridge0")
        await assert_agreed(manager, vm, {})
        assert not is_locked(path)
        await manager.destroy(sandbox)


@in_event_loop
async def test_a_read_only_disk_may_be_in_two_vms(sandbox: str) -> None:
    async with managing() as manager:
        vm = await manager.create(sandbox)
        path = image(sandbox)
        Path(path).chmod(0o400)
        for slot in (0, 1):
            await manager.plug(sandbox, disk(path, is_read_only=True), slot)
        assert open_images(vm) == [path, path]
        flags = [
            line.split()[1]
            for fd in Path(f"/proc/{vm.process.pid}/fd").iterdir()
            if os.path.realpath(fd) == path
            for line in Path(f"/proc/{vm.process.pid}/fdinfo/{fd.name}").read_text().splitlines()
            if line.startswith("flags:")
        ]
        assert [int(value, 8) & os.O_ACCMODE for value in flags] == [os.O_RDONLY, os.O_RDONLY]
        await manager.destroy(sandbox)


@in_event_loop
async def test_disks_survive_the_manager(sandbox: str) -> None:
    async with managing() as manager, Subscriber({SERVICE: shards.FIRST}) as news:
        await resynced(news)
        vm = await manager.create(sandbox)
        await booted(vm)
        path, other = image(sandbox, "image1"), image(sandbox, "image2")
        plugged = await manager.plug(sandbox, disk(path), 0, serial=SERIAL)
        await manager.plug(sandbox, disk(other), 1)
        manager.kill()
        async with Monitor(vm) as monitor:
            await monitor.unplug("disk-2")  # by itself, as far as the manager knows
        await manager.start()
        await resynced(news)
        await assert_agreed(manager, vm, {"disk-1": path})
        assert await manager.plug(sandbox, disk(path), 0, serial=SERIAL) == plugged, "asked again, answered"
        await manager.remove(sandbox, "disk-1")
        while await removed(news) != "disk-1":  # that of the other may be heard as well, or was told too early
            pass
        await assert_agreed(manager, vm, {})
        await manager.destroy(sandbox)


@in_event_loop
async def test_a_step_that_a_dead_manager_had_begun_is_undone(sandbox: str) -> None:
    """It died between opening the file and plugging the device, or between the removal and closing the file."""
    async with managing() as manager:
        vm = await manager.create(sandbox)
        path = image(sandbox)
        manager.kill()
        async with Monitor(vm) as monitor:
            await monitor.add_block_node("disk-1", path)
        await manager.start()
        await assert_agreed(manager, vm, {})
        assert not is_locked(path)
        await manager.destroy(sandbox)


@in_event_loop
async def test_a_device_whose_file_stays_open_is_not_told_gone(sandbox: str) -> None:
    async with managing() as manager, Subscriber({SERVICE: shards.FIRST}) as news:
        vm = await manager.create(sandbox)
        await booted(vm)
        path = image(sandbox)
        plugged = await manager.plug(sandbox, disk(path, is_read_only=True), 0)
        async with Monitor(vm) as monitor:
            await monitor.use_block_node(plugged.hypervisor_id, "user")
            await manager.remove(sandbox, plugged.hypervisor_id)
            await manager.logs("a removed device's backend stays")
            assert await manager.present(sandbox) == [plugged.hypervisor_id]
            with pytest.raises(HypervisorError, match="disk-1 is gone, but QEMU keeps what it stood on"):
                await manager.remove(sandbox, plugged.hypervisor_id)
            await monitor.delete_block_node("user")
        await manager.remove(sandbox, plugged.hypervisor_id)
        assert await removed(news) == plugged.hypervisor_id
        await assert_agreed(manager, vm, {})
        await manager.destroy(sandbox)


@in_event_loop
async def test_a_frozen_guest_lets_go_when_it_is_thawed(sandbox: str) -> None:
    async with managing() as manager, Subscriber({SERVICE: shards.FIRST}) as news:
        vm = await manager.create(sandbox)
        await booted(vm)
        path = image(sandbox)
        plugged = await manager.plug(sandbox, disk(path), 0)
        async with Monitor(vm) as monitor:
            await monitor.freeze()
            await manager.remove(sandbox, plugged.hypervisor_id)
            await manager.remove(sandbox, plugged.hypervisor_id)  # asking twice is no error
            await assert_agreed(manager, vm, {plugged.hypervisor_id: path}, monitor)
            with pytest.raises(AlreadyExistsError):
                await manager.plug(sandbox, disk(image(sandbox, "image2")), 0)
            await monitor.thaw()
        assert await removed(news) == plugged.hypervisor_id
        await assert_agreed(manager, vm, {})
        again = await manager.plug(sandbox, disk(path), 0)
        await assert_agreed(manager, vm, {again.hypervisor_id: path})
        await manager.destroy(sandbox)


@in_event_loop
async def test_a_guest_that_never_lets_go_keeps_the_file_to_its_end(sandbox: str) -> None:
    """It has no driver for hotplug at all; the manager goes on with everything else."""
    async with managing() as manager:
        vm = await manager.create(sandbox, kernel_params="acpi=off")
        await booted(vm)
        path = image(sandbox)
        plugged = await manager.plug(sandbox, disk(path), 0)
        await manager.remove(sandbox, plugged.hypervisor_id)
        await manager.plug(sandbox, disk(image(sandbox, "image2")), 1)
        await assert_agreed(manager, vm, {"disk-1": path, "disk-2": f"{path}2"})
        assert is_locked(path)
        await manager.destroy(sandbox)
        assert not is_locked(path)


async def cycle(manager: Manager, news: Subscriber, sandbox: str, spec: vmm.BlockSpec, slot: int) -> None:
    plugged = await manager.plug(sandbox, spec, slot)
    await manager.remove(sandbox, plugged.hypervisor_id)
    assert await removed(news) == plugged.hypervisor_id


async def run_cycles(sandbox: str, driver: BlockDriver, count: int) -> None:
    async with managing() as manager, Subscriber({SERVICE: shards.FIRST}) as news:
        vm = await manager.create(sandbox, block_device_driver=driver)
        await booted(vm)
        spec = disk(image(sandbox), driver=driver)
        for number in range(count):
            await cycle(manager, news, sandbox, spec, number % 3)
        await assert_agreed(manager, vm, {})
        await manager.destroy(sandbox)


@pytest.mark.parametrize("driver", [BlockDriver.VIRTIO_BLK, BlockDriver.VIRTIO_SCSI])
@in_event_loop
async def test_many_cycles(sandbox: str, driver: BlockDriver) -> None:
    await run_cycles(sandbox, driver, 30)


@pytest.mark.soak
@pytest.mark.parametrize("driver", [BlockDriver.VIRTIO_BLK, BlockDriver.VIRTIO_SCSI])
@in_event_loop
async def test_a_thousand_cycles(sandbox: str, driver: BlockDriver) -> None:
    await run_cycles(sandbox, driver, 1000)


@in_event_loop
async def test_a_full_bridge(sandbox: str) -> None:
    async with managing() as manager:
        vm = await manager.create(sandbox)
        await booted(vm)
        images = [image(sandbox, f"image{number}") for number in range(30)]
        await asyncio.gather(*(manager.plug(sandbox, disk(path), slot) for slot, path in enumerate(images)))
        assert open_images(vm) == sorted(images)
        for device_id in await manager.present(sandbox):
            await manager.remove(sandbox, device_id)
        while await manager.present(sandbox):  # noqa: ASYNC110 - what the events say is tested above
            await asyncio.sleep(0.02)
        await assert_agreed(manager, vm, {})
        await manager.destroy(sandbox)
