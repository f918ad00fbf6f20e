"""The whole way of a disk: device manager, VM manager, QEMU, guest; and all of them agree afterwards."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from common import paths
from common.config import BlockDriver
from common.testing.guest_sandbox import make_busybox_rootfs
from common.testing.isolation import in_event_loop
from common.testing.managed_guest import HotplugStand, hotplugging

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
