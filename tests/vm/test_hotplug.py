"""The whole way of a disk: device manager, VM manager, QEMU, guest; and all of them agree afterwards."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

import pytest

from common import paths
from common.config import BlockDriver
from common.errors import ExhaustedError, HypervisorError
from common.services.vmm import BlockSpec
from common.testing.chaos import survive
from common.testing.guest_sandbox import make_busybox_rootfs
from common.testing.isolation import in_event_loop
from common.testing.managed_guest import HotplugStand, hotplugging
from common.testing.vmm_stand import Monitor

WRITES = "while :; do dd if=/dev/zero of=/busy bs=64k count=16 conv=fsync 2>/dev/null; done"


def images(sandbox: str, count: int) -> list[Path]:
    """Make disks with busybox."""
    directory = Path(paths.sandbox_dir(sandbox))
    content = directory / "content"
    make_busybox_rootfs(content)
    first = directory / "image0"
    subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", "-d", str(content), str(first), "16M"], check=True)
    others = [directory / f"image{number}" for number in range(1, count)]
    for other in others:
        shutil.copy(first, other)
    return [first, *others]


async def cycle(stand: HotplugStand, image: Path, driver: BlockDriver, number: int) -> None:
    disk = await stand.attach(image, driver)
    task = await stand.run(disk, f"echo {number} >> /log; cat /log")
    past = [str(earlier) for earlier in range(number + 1)]
    assert (await stand.output(task)).split() == past, "each finds what those before it left"
    await stand.give_back(task, disk)


async def run_cycles(sandbox: str, driver: BlockDriver, count: int) -> None:
    (image,) = images(sandbox, 1)
    async with hotplugging(sandbox, block_device_driver=driver) as stand:
        for number in range(count):
            await cycle(stand, image, driver, number)
        await stand.assert_agreed([])


async def run_interleaved(sandbox: str, count: int) -> None:
    """Two containers at a time, each writing without pause; the older one goes, a new one comes, on the same file."""
    files = images(sandbox, 2)
    async with hotplugging(sandbox) as stand:
        older = await stand.attach(files[0])
        task = await stand.run(older, WRITES)
        for number in range(1, count + 1):
            newer = await stand.attach(files[number % 2])
            next_task = await stand.run(newer, WRITES)
            assert await stand.seen(next_task) == {older.serial, newer.serial}
            await stand.assert_agreed([older, newer])
            task.kill()
            await stand.give_back(task, older)
            assert await stand.seen(next_task) == {newer.serial}
            await stand.assert_agreed([newer])
            older, task = newer, next_task
        task.kill()
        await stand.give_back(task, older)
        await stand.assert_agreed([])


@pytest.mark.parametrize("driver", [BlockDriver.VIRTIO_BLK, BlockDriver.VIRTIO_SCSI])
@in_event_loop
async def test_a_disk_comes_and_goes_with_its_container(sandbox: str, driver: BlockDriver) -> None:
    await run_cycles(sandbox, driver, 3)


@in_event_loop
async def test_containers_come_and_go_while_others_write(sandbox: str) -> None:
    await run_interleaved(sandbox, 3)


@pytest.mark.soak
@in_event_loop
async def test_two_hundred_containers_come_and_go_while_others_write(sandbox: str) -> None:
    await run_interleaved(sandbox, 200)


@in_event_loop
async def test_a_disk_that_is_taken_from_under_a_container_is_free_all_the_same(sandbox: str) -> None:
    """The guest's kernel lets go although a container still runs on it; what that does then is its own affair."""
    (image,) = images(sandbox, 1)
    async with hotplugging(sandbox) as stand:
        disk = await stand.attach(image)
        task = await stand.run(disk, "exec sleep 1000")
        await stand.devices.detach(disk)
        await stand.assert_agreed([])
        task.close()


@in_event_loop
async def test_a_frozen_guest_keeps_a_disk_until_it_is_thawed_and_who_wants_that_again_waits(sandbox: str) -> None:
    files = images(sandbox, 2)
    async with hotplugging(sandbox) as stand:
        root = await stand.attach(files[0])
        task = await stand.run(root, "exec sleep 1000")
        disk = await stand.devices.confirm(await stand.attach(files[1]))
        async with Monitor(stand.vm) as monitor:
            await monitor.freeze()
        async with asyncio.TaskGroup() as calls:
            leaving = calls.create_task(stand.devices.detach(disk))
            await stand.devices.wait_devices({root.hypervisor_id: "attached", disk.hypervisor_id: "detaching"})
            wanted = calls.create_task(stand.attach(files[1]))
            await stand.assert_agreed([root, disk])
            assert not leaving.done()
            assert not wanted.done()
            async with Monitor(stand.vm) as monitor:
                await monitor.thaw()
        again = await stand.devices.confirm(wanted.result())
        assert again.hypervisor_id != disk.hypervisor_id
        await stand.assert_agreed([root, again])
        assert await stand.seen(task) == {root.serial, again.serial}
        task.kill()
        await stand.give_back(task, root)
        await stand.devices.detach(again)
        await stand.assert_agreed([])


@in_event_loop
async def test_what_a_guest_never_lets_go_is_quarantined_to_its_end(sandbox: str) -> None:
    """It has no driver for hotplug at all."""
    files = images(sandbox, 2)
    async with hotplugging(sandbox, kernel_params="acpi=off", removal_timeout_s=1) as stand:
        kept, other = [await stand.devices.confirm(await stand.attach(file)) for file in files]
        with pytest.raises(HypervisorError, match=f"did not let {kept.hypervisor_id} go in time; it is quarantined"):
            await stand.devices.detach(kept)
        assert await stand.devices.devices() == {kept.hypervisor_id: "quarantined", other.hypervisor_id: "attached"}
        await stand.assert_agreed([kept, other])
        await stand.manager.destroy(sandbox)
        await stand.devices.wait_devices({})


@in_event_loop
async def test_a_full_bus(sandbox: str) -> None:
    (image,) = images(sandbox, 1)
    async with hotplugging(sandbox) as stand:
        slots = next(bus.slots for bus in stand.vm.hotplug_buses if bus.name == "bridge0")
        files = [image.with_name(f"image-{number}") for number in range(slots + 1)]
        for file in files:
            shutil.copy(image, file)
        answers = await asyncio.gather(*(stand.attach(file) for file in files), return_exceptions=True)
        (refusal,) = (answer for answer in answers if isinstance(answer, BaseException))
        assert isinstance(refusal, ExhaustedError)
        assert f"of {slots}, {slots} are held, 0 pending removal, 0 quarantined" in str(refusal)
        disks = [answer for answer in answers if not isinstance(answer, BaseException)]
        await asyncio.gather(*map(stand.devices.confirm, disks))
        await stand.assert_agreed(disks)
        await asyncio.gather(*map(stand.devices.detach, disks))
        await stand.assert_agreed([])


async def run_with_kills(sandbox: str, victim: str, *, kills: int, cycles: int) -> None:
    root, *files = images(sandbox, 3)
    async with hotplugging(sandbox) as stand:
        held = await stand.attach(root)
        task = await stand.run(held, WRITES)
        disks = [BlockSpec(source=str(file)) for file in files]
        await survive(stand.devices, getattr(stand, victim), disks, kills=kills, cycles=cycles)
        await stand.assert_agreed([held])
        assert await stand.seen(task) == {held.serial}
        task.kill()
        await stand.give_back(task, held)
        await stand.assert_agreed([])


@pytest.mark.parametrize("victim", ["devices", "manager"])
@in_event_loop
async def test_a_manager_may_die_at_any_moment(sandbox: str, victim: str) -> None:
    await run_with_kills(sandbox, victim, kills=5, cycles=10)


@pytest.mark.soak
@pytest.mark.parametrize("victim", ["devices", "manager"])
def test_a_manager_may_die_a_hundred_times(sandbox: str, victim: str) -> None:
    asyncio.run(run_with_kills(sandbox, victim, kills=100, cycles=300))
