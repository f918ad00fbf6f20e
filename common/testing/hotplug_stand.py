"""Hotplug under test: the real device manager and VM manager, with a fake hypervisor that misbehaves on demand.

::

    async with plugging() as stand:
        await stand.vmm.misbehave(stand.vmm.adds[-1], How.ACTED_AND_REFUSED)
        await stand.devices.attach(spec=stand.disk("a"))
"""

from __future__ import annotations

import shutil
import uuid
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common import paths
from common.bus.client import BusClient
from common.linux import cgroup
from common.services.vmm import BlockSpec
from common.testing.device_stand import DeviceManager
from common.testing.fake_vmms import FAKES, CloudHypervisor, Qemu, install
from common.testing.isolation import run_dir
from common.testing.vmm_stand import Manager, managing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from common.services.vmm import Vm


@dataclass(frozen=True, slots=True, kw_only=True)
class HotplugStand:
    """Everything that takes part.

    Attributes:
        sandbox_id: whose VM it is.
        devices: the device manager.
        manager: the VM manager.
        vm: the VM.
        vmm: the fake hypervisor.
    """

    sandbox_id: str
    devices: DeviceManager
    manager: Manager
    vm: Vm
    vmm: Qemu | CloudHypervisor

    def disk(self, name: str) -> BlockSpec:
        """Return what describes a disk, and make its file."""
        return disk(name)


def disk(name: str) -> BlockSpec:
    """Return what describes a disk in the run directory, and make its file."""
    file = Path(paths.run_dir()) / name
    file.write_bytes(bytes(1 << 20))
    return BlockSpec(source=str(file))


@asynccontextmanager
async def plugging(hypervisor: str = "qemu", *arguments: str) -> AsyncIterator[HotplugStand]:
    """Provide a sandbox with a VM of a fake hypervisor, and end all of it.

    Args:
        hypervisor: whose fake.
        arguments: what the fake is started with beside what the VM manager says.
    """
    sandbox_id = f"h{uuid.uuid4().hex[:8]}"
    with run_dir():
        async with (
            managing(hypervisor) as manager,
            BusClient() as bus,
            fake_vm(manager, sandbox_id, *arguments) as (vm, vmm),
        ):
            devices = DeviceManager(bus, sandbox_id, vm.hotplug_buses, hypervisor=hypervisor, version=vm.version)
            try:
                await devices.start()
                yield HotplugStand(sandbox_id=sandbox_id, devices=devices, manager=manager, vm=vm, vmm=vmm)
            finally:
                devices.kill()


@asynccontextmanager
async def fake_vm(
    manager: Manager, sandbox_id: str, *arguments: str
) -> AsyncIterator[tuple[Vm, Qemu | CloudHypervisor]]:
    """Provide a sandbox whose VM is the fake of the manager's hypervisor, and end it."""
    kind = FAKES[manager.hypervisor]
    vmm = kind()
    Path(paths.sandbox_dir(sandbox_id)).mkdir(parents=True)
    try:
        program = install(kind, Path(paths.run_dir()), *arguments)
        vm = await manager.create(sandbox_id, path=program, **vmm.config)
        await vmm.connect(sandbox_id)
        yield vm, vmm
    finally:
        await vmm.close()
        await manager.destroy(sandbox_id)
        cgroup.kill(sandbox_id)
        shutil.rmtree(paths.sandbox_dir(sandbox_id))
