"""Devices of a real QEMU that others serve: files that guests map, programs by vhost-user, the host's hardware."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from common import paths
from common.errors import AlreadyExistsError, HypervisorError, NotFoundError, UnsupportedError, UsageError
from common.services.vmm import BlockSpec, PmemSpec, VfioSpec, VhostUserDiskSpec
from common.testing.guest_sandbox import make_busybox_image
from common.testing.isolation import in_event_loop
from common.testing.managed_guest import hotplugging
from common.testing.storage_daemon import serving
from common.testing.vmm_stand import MEMORY_MIB, Monitor, managing

ROOM = {"default_maxmemory": MEMORY_MIB + 128}
_MIB = 1 << 20


def written(path: Path) -> str:
    """Return what a container has written into a disk."""
    command = ["/sbin/debugfs", "-R", "cat log", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@in_event_loop
async def test_a_container_runs_in_a_file_that_its_guest_maps(sandbox: str) -> None:
    path = make_busybox_image(sandbox)
    async with hotplugging(sandbox, **ROOM) as stand, Monitor(stand.vm) as monitor:
        memory = await stand.devices.attach(spec=PmemSpec(source=str(path)))
        assert (memory.hypervisor_id, await monitor.memory_backends()) == ("pmem-1", {"pmem-1"})
        task = await stand.run(memory, "grep -o '^/dev/pmem0 / ext4' /proc/mounts; echo kept > /log")
        assert await stand.output(task) == "/dev/pmem0 / ext4\n"
        task.remove()
        assert written(path) == "kept\n"
        assert [device.hypervisor_id for device in await stand.devices.list()] == ["pmem-1"]
        with pytest.raises(UnsupportedError, match="pmem-1 cannot be removed: QEMU unplugs no virtio device that is"):
            await stand.manager.remove(sandbox, memory.hypervisor_id)
        with pytest.raises(AlreadyExistsError, match="is attached read-write as persistent memory and cannot also be"):
            await stand.devices.attach(spec=BlockSpec(source=str(path)))


@in_event_loop
async def test_memory_that_cannot_be_mapped_leaves_nothing(sandbox: str) -> None:
    path = Path(paths.sandbox_dir(sandbox)) / "image"
    path.write_bytes(bytes(2 * _MIB))
    path.with_name("large").touch()
    os.truncate(path.with_name("large"), 512 * _MIB)
    async with managing() as manager:
        vm = await manager.create(sandbox, **ROOM)
        with pytest.raises(NotFoundError, match="missing does not exist"):
            await manager.plug(sandbox, PmemSpec(source=str(path.with_name("missing"))))
        assert not path.with_name("missing").exists(), "QEMU would make it"
        with pytest.raises(HypervisorError, match="QEMU refused device_add: not enough space"):
            await manager.plug(sandbox, PmemSpec(source=str(path.with_name("large"))))
        async with Monitor(vm) as monitor:
            assert (await monitor.memory_backends(), await manager.present(sandbox)) == (set(), [])
        await manager.destroy(sandbox)
        await manager.create(sandbox)
        with pytest.raises(UnsupportedError, match=r"no room for .* as memory \(set default_maxmemory"):
            await manager.plug(sandbox, PmemSpec(source=str(path)))
        await manager.destroy(sandbox)


@in_event_loop
async def test_a_container_runs_on_a_disk_that_a_program_serves(sandbox: str) -> None:
    path = make_busybox_image(sandbox)
    with serving(path) as socket:
        async with hotplugging(sandbox) as stand, Monitor(stand.vm) as monitor:
            for number in (1, 2):  # the same program again, at once
                disk = await stand.devices.attach(spec=VhostUserDiskSpec(source=str(socket)))
                assert disk.hypervisor_id == f"vhost-user-disk-{number}"
                assert await monitor.plugged() == {disk.hypervisor_id}
                task = await stand.run(disk, "grep -o '^/dev/vda / ext4' /proc/mounts; echo again >> /log")
                assert await stand.output(task) == "/dev/vda / ext4\n"
                await stand.give_back(task, disk)
                assert (await monitor.plugged(), await stand.devices.list()) == (set(), ())
    assert written(path) == "again\nagain\n"


@in_event_loop
async def test_a_socket_on_which_nobody_listens_is_refused(sandbox: str) -> None:
    path = make_busybox_image(sandbox)
    with serving(path) as socket:
        pass
    async with hotplugging(sandbox) as stand, Monitor(stand.vm) as monitor:
        with pytest.raises(HypervisorError, match=r"Failed to connect to .*socket"):
            await stand.devices.attach(spec=VhostUserDiskSpec(source=str(socket)))
        with pytest.raises(UsageError, match="is a file; a vhost-user disk needs the socket"):
            await stand.devices.attach(spec=VhostUserDiskSpec(source=str(path)))
        assert (await monitor.plugged(), await stand.devices.list()) == (set(), ())


@in_event_loop
async def test_a_device_that_the_host_does_not_have_is_refused(sandbox: str) -> None:
    async with managing() as manager:
        vm = await manager.create(sandbox)
        with pytest.raises(HypervisorError, match=r"vfio /sys/bus/pci/devices/0000:ff:1f\.7: no such host device"):
            await manager.plug(sandbox, VfioSpec(source="0000:ff:1f.7"))
        async with Monitor(vm) as monitor:
            assert (await monitor.plugged(), await manager.present(sandbox)) == (set(), [])
        await manager.destroy(sandbox)
