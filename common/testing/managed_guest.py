"""A guest that the real services own, driven through its agent: real VM manager, real device manager, no shim.

::

    async with hotplugging(sandbox) as stand:          # the fixture of tests/vm/conftest.py
        disk = await stand.attach(image)
        task = await stand.run(disk, "true")
        await stand.give_back(task, disk)
"""

from __future__ import annotations

import asyncio
import itertools
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import paths
from common.bus.client import BusClient
from common.config import BlockDriver
from common.protocols.agent import CONTAINERS_DIRECTORY, Storage
from common.services.vmm import BlockSpec, BusKind
from common.testing.device_stand import DeviceManager
from common.testing.guest_sandbox import GuestSandbox
from common.testing.guest_vm import GuestVm
from common.testing.vmm_stand import Manager, Monitor, booted, managing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from contextlib import AbstractAsyncContextManager

    from common.services.device import Device
    from common.services.vmm import Vm
    from common.testing.guest_sandbox import Task

    Plug = Callable[[DeviceManager, Vm], Awaitable[None]]

_PORTS = 8
_DRIVERS = {"pmem": "nvdimm", "vhost-user-blk": "blk"}
"""The agent's drivers of what is no :class:`BlockSpec`."""
_REMOVAL_TIMEOUT_S = 60
"""A real guest on a loaded machine."""


class _ManagedVm(GuestVm):
    """The sockets of a VM that the VM manager started."""

    def __init__(self, vm: Vm) -> None:
        self._directory = Path(paths.vm_dir(vm.sandbox_id))
        self.vsock = None
        self._generation = 0
        self._free_ports = list(range(_PORTS))


class ManagedGuest(GuestSandbox):
    """The agent of such a VM."""

    def __init__(self, vm: Vm) -> None:
        self.vm = _ManagedVm(vm)
        self.agent = self.vm.connect()
        self._ids = itertools.count(1)


class HotplugStand:
    """Both managers and a guest.

    Attributes:
        manager: the VM manager.
        devices: the device manager.
        vm: the VM.
        guest: its agent.
    """

    def __init__(self, manager: Manager, devices: DeviceManager, vm: Vm, guest: ManagedGuest) -> None:
        self.manager = manager
        self.devices = devices
        self.vm = vm
        self.guest = guest

    async def attach(self, image: Path, driver: BlockDriver = BlockDriver.VIRTIO_BLK) -> Device:
        """Have a disk plugged."""
        return await self.devices.attach(spec=BlockSpec(source=str(image), driver=driver))

    async def run(self, disk: Device, script: str) -> Task:
        """Run a shell script in a container whose root is a disk, and confirm the disk."""
        task = await asyncio.to_thread(self.guest.run, "sh", "-c", script, storages=[_storage(disk)])
        await self.devices.confirm(disk)
        return task

    async def output(self, task: Task) -> str:
        """Wait for the end of a container's output and of the container."""
        said = await asyncio.to_thread(task.stdout.read_all)
        await asyncio.to_thread(task.wait)
        return said.decode()

    async def give_back(self, task: Task, disk: Device) -> None:
        """Remove a container and have its disk removed."""
        await asyncio.to_thread(task.remove)
        await self.devices.detach(disk)

    async def seen(self, task: Task) -> set[str]:
        """Return the serials of the virtio disks that the guest's kernel has, as a running container sees them."""
        script = "for disk in /sys/block/vd*; do cat $disk/serial; echo; done"
        listing = await asyncio.to_thread(self.guest.exec, task, "sh", "-c", script)
        return set((await self.output(listing)).split())

    async def assert_agreed(self, disks: list[Device]) -> None:
        """Check that device manager, VM manager, QEMU and its open files know of these disks and of no other."""
        ids = {disk.hypervisor_id for disk in disks}
        assert {device.hypervisor_id for device in await self.devices.list()} == ids
        assert set(await self.manager.present(self.vm.sandbox_id)) == ids
        async with Monitor(self.vm) as monitor:
            assert await monitor.plugged() == ids
            assert await monitor.block_nodes() == ids
        sources = sorted(disk.spec.source for disk in disks if disk.spec)
        assert open_images(self.vm) == sources


def open_images(vm: Vm) -> list[str]:
    """Return the files called ``image…`` that QEMU has open."""
    found = []
    for file in Path(f"/proc/{vm.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # QEMU has closed it meanwhile
            found.append(str(file.readlink()))
    return sorted(name for name in found if "/image" in name)


def _storage(disk: Device) -> Storage:
    assert disk.spec is not None
    has_serial = isinstance(disk.spec, BlockSpec)
    return Storage(
        driver=_DRIVERS.get(disk.kind) or ("scsi" if disk.spec.bus_kind is BusKind.SCSI else "blk"),
        driver_options=[f"serial={disk.serial}"] if has_serial else [],
        source=disk.guest_path,
        fstype="ext4",
        mount_point=f"{CONTAINERS_DIRECTORY}/{disk.serial}/rootfs",
    )


def hotplugging(
    sandbox_id: str,
    *,
    removal_timeout_s: float = _REMOVAL_TIMEOUT_S,
    **config: Any,  # noqa: ANN401 - of QemuConfig
) -> AbstractAsyncContextManager[HotplugStand]:
    """Both managers, and a guest that has booted; it may take so long to let a device go."""
    return _running(sandbox_id, config, None, removal_timeout_s)


def cold_plugging(sandbox_id: str, plug: Plug, **config: Any) -> AbstractAsyncContextManager[HotplugStand]:  # noqa: ANN401 - of QemuConfig
    """Both managers, and a guest that has booted with what was plugged before."""
    return _running(sandbox_id, config, plug)


@asynccontextmanager
async def _running(
    sandbox_id: str, config: dict[str, Any], plug: Plug | None, removal_timeout_s: float = _REMOVAL_TIMEOUT_S
) -> AsyncIterator[HotplugStand]:
    async with managing() as manager, BusClient() as bus:
        vm = await (manager.hold if plug else manager.create)(sandbox_id, **config)
        devices = DeviceManager(bus, sandbox_id, vm.hotplug_buses, removal_timeout_s=removal_timeout_s)
        await devices.start()
        try:
            if plug:
                await plug(devices, vm)
                await manager.resume(sandbox_id)
            await booted(vm)
            guest = await asyncio.to_thread(ManagedGuest, vm)
            with guest.agent:
                yield HotplugStand(manager, devices, vm, guest)
        finally:
            devices.kill()
            await manager.destroy(sandbox_id)
