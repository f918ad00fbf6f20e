"""Hotplug under test: the real device manager and VM manager, with a fake hypervisor that misbehaves on demand.

::

    async with plugging() as stand:
        await stand.vmm.misbehave(stand.vmm.adds[-1], How.ACTED_AND_REFUSED)
        await stand.devices.attach(spec=stand.disk("a"))
"""

from __future__ import annotations

import shutil
import uuid
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from common import paths
from common.bus.client import BusClient
from common.linux import cgroup
from common.services.vmm import BlockDriver, BlockSpec
from common.testing.device_stand import DeviceManager
from common.testing.fake_vmms import FAKES, Fake, trust_kvm
from common.testing.isolation import run_dir
from common.testing.real_vmms import REAL
from common.testing.vmm_stand import Manager, booted, managing
from common.testing.vmms import Vmm

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from contextlib import AbstractAsyncContextManager

    from common.services.vmm import Vm


V = TypeVar("V", bound=Vmm)

ALL: dict[str, type[Vmm]] = {**FAKES, **REAL}
"""Every hypervisor that there is to test with."""

_REMOVAL_TIMEOUT_S = 50.0
"""A guest of an emulated host takes its time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HotplugStand(Generic[V]):
    """Everything that takes part.

    Attributes:
        sandbox_id: whose VM it is.
        devices: the device manager.
        manager: the VM manager.
        vm: the VM.
        vmm: the hypervisor.
    """

    sandbox_id: str
    devices: DeviceManager
    manager: Manager
    vm: Vm
    vmm: V

    def disk(self, name: str) -> BlockSpec:
        """Return what describes a disk, and make its file."""
        return disk(name, self.vmm.driver)


FakeStand = HotplugStand[Fake]


def disk(name: str, driver: BlockDriver = BlockDriver.VIRTIO_BLK) -> BlockSpec:
    """Return what describes a disk in the run directory, and make its file."""
    file = Path(paths.run_dir()) / name
    file.write_bytes(bytes(1 << 20))
    return BlockSpec(source=str(file), driver=driver)


def plugging(fake: str = "qemu", *arguments: str) -> AbstractAsyncContextManager[FakeStand]:
    """Provide a sandbox with a VM of a fake hypervisor, and end all of it.

    Args:
        fake: which, a name of ``FAKES``.
        arguments: what it is started with beside what the VM manager says.
    """
    return plugging_into(FAKES[fake], *arguments)


@asynccontextmanager
async def plugging_into(kind: type[V], *arguments: str) -> AsyncIterator[HotplugStand[V]]:
    """Provide a sandbox with a VM of a hypervisor, fake or real, and end all of it."""
    with run_dir():
        async with plugging_here(kind, *arguments) as stand:
            yield stand


@asynccontextmanager
async def plugging_here(kind: type[V], *arguments: str) -> AsyncIterator[HotplugStand[V]]:
    """Do so in the run directory that there is."""
    sandbox_id = f"h{uuid.uuid4().hex[:8]}"
    async with AsyncExitStack() as stack:
        manager = await stack.enter_async_context(managing(kind.hypervisor))
        bus = await stack.enter_async_context(BusClient())
        vm, vmm = await stack.enter_async_context(a_vm(manager, sandbox_id, kind, *arguments))
        devices = await stack.enter_async_context(_devices_of(vm, bus, kind.removal_timeout_s))
        yield HotplugStand(sandbox_id=sandbox_id, devices=devices, manager=manager, vm=vm, vmm=vmm)


@asynccontextmanager
async def running(hypervisor: str, section: Mapping[str, object]) -> AsyncIterator[tuple[Vm, DeviceManager]]:
    """Provide a sandbox with a real VM whose guest has booted, and its devices; and end all of it.

    Args:
        hypervisor: its name.
        section: changes to a configuration that works.
    """
    sandbox_id = f"v{uuid.uuid4().hex[:8]}"
    async with AsyncExitStack() as stack:
        trust_kvm(stack.enter_context(run_dir()))
        Path(paths.sandbox_dir(sandbox_id)).mkdir(parents=True)
        manager = await stack.enter_async_context(managing(hypervisor))
        bus = await stack.enter_async_context(BusClient())
        stack.callback(shutil.rmtree, paths.sandbox_dir(sandbox_id))
        stack.callback(cgroup.kill, sandbox_id)
        stack.push_async_callback(manager.destroy, sandbox_id)
        vm = await manager.create(sandbox_id, **section)
        devices = await stack.enter_async_context(_devices_of(vm, bus, _REMOVAL_TIMEOUT_S))
        await booted(vm)
        yield vm, devices


@asynccontextmanager
async def _devices_of(vm: Vm, bus: BusClient, removal_timeout_s: float) -> AsyncIterator[DeviceManager]:
    """Run a device manager for a VM, and end it as a crash would."""
    devices = DeviceManager(
        bus,
        vm.sandbox_id,
        vm.hotplug_buses,
        hypervisor=vm.hypervisor,
        version=vm.version,
        removal_timeout_s=removal_timeout_s,
    )
    try:
        await devices.start()
        yield devices
    finally:
        devices.kill()


@asynccontextmanager
async def a_vm(manager: Manager, sandbox_id: str, kind: type[V], *arguments: str) -> AsyncIterator[tuple[Vm, V]]:
    """Provide a sandbox with a VM, and end it."""
    vmm = kind()
    directory = Path(paths.run_dir())
    Path(paths.sandbox_dir(sandbox_id)).mkdir(parents=True)
    trust_kvm(directory)
    try:
        vm = await manager.create(sandbox_id, path=kind.install(directory, *arguments), **kind.config)
        await vmm.connect(vm)
        yield vm, vmm
    finally:
        await vmm.close()
        await manager.destroy(sandbox_id)
        cgroup.kill(sandbox_id)
        shutil.rmtree(paths.sandbox_dir(sandbox_id))


def fake_vm(manager: Manager, sandbox_id: str) -> AbstractAsyncContextManager[tuple[Vm, Fake]]:
    """Provide a sandbox whose VM is the fake of the manager's hypervisor, and end it."""
    return a_vm(manager, sandbox_id, FAKES[manager.hypervisor])
