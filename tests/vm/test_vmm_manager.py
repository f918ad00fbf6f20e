"""The VM manager with real QEMU: what it starts, takes over and cleans up. Most of this needs no booted guest."""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import uuid
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec

import psutil
import pytest

from common import paths
from common.bus.client import BusClient
from common.bus.events import Received, Subscriber
from common.bus.wire import Empty
from common.channel import HELLO, HELLO_REPLY
from common.config import QemuConfig
from common.errors import AlreadyExistsError, HypervisorError, NotFoundError, UnavailableError
from common.linux import cgroup
from common.services import vmm
from common.testing.stack import GUEST

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

P = ParamSpec("P")

SERVICE = vmm.service_name("qemu")
CONFIG = QemuConfig(
    kernel=str(GUEST / "vmlinux"),
    initrd=str(GUEST / "initrd.img"),
    default_memory=384,
    virtio_fs_daemon="/usr/lib/qemu/virtiofsd",
)
_TIMEOUT_S = 60.0


def in_event_loop(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 150))

    return run


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A sandbox's directory in a run directory of the test's own; nothing of it may be left."""
    directory = tempfile.mkdtemp(prefix="kt-", dir="/tmp")
    monkeypatch.setenv(paths.RUN_DIR_VARIABLE, directory)
    sandbox_id = f"v{uuid.uuid4().hex[:8]}"
    os.makedirs(paths.share_dir(sandbox_id))  # noqa: PTH103
    yield sandbox_id
    left = cgroup.processes(sandbox_id)
    cgroup.kill(sandbox_id)
    shutil.rmtree(directory)
    assert left == []


class Manager:
    """A running VM manager and how the test talks to it."""

    def __init__(self, bus: BusClient) -> None:
        self._bus = bus
        self.process: subprocess.Popen[bytes]

    async def start(self) -> None:
        self.process = subprocess.Popen(  # noqa: ASYNC220 - returns at once
            [sys.executable, "-m", "procs.vmm_manager"], stdout=subprocess.DEVNULL
        )
        while True:
            try:
                await self.vms()  # answered when it knows what it owns
            except UnavailableError:
                continue
            return

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    async def create(self, sandbox_id: str, config: QemuConfig = CONFIG) -> vmm.Vm:
        request = vmm.CreateVm(sandbox_id=sandbox_id, config=config)
        return await self._bus.call(SERVICE, vmm.CREATE_VM, request, timeout_s=_TIMEOUT_S)

    async def describe(self, sandbox_id: str) -> vmm.VmStatus:
        return await self._bus.call(SERVICE, vmm.DESCRIBE_VM, vmm.SandboxRef(sandbox_id=sandbox_id), timeout_s=10)

    async def destroy(self, sandbox_id: str) -> None:
        await self._bus.call(SERVICE, vmm.DESTROY_VM, vmm.SandboxRef(sandbox_id=sandbox_id), timeout_s=10)

    async def vms(self) -> tuple[vmm.Vm, ...]:
        return (await self._bus.call(SERVICE, vmm.LIST_VMS, Empty(), timeout_s=10)).vms

    async def add(self, sandbox_id: str, bus: str = "port0") -> vmm.AddedDevice:
        spec = vmm.ShareSpec(source=paths.share_dir(sandbox_id), tag="kataShared")
        request = vmm.AddDevice(sandbox_id=sandbox_id, spec=spec, bus=bus)
        return await self._bus.call(SERVICE, vmm.ADD_DEVICE, request, timeout_s=30)

    async def remove(self, sandbox_id: str, hypervisor_id: str) -> None:
        request = vmm.RemoveDevice(sandbox_id=sandbox_id, hypervisor_id=hypervisor_id)
        await self._bus.call(SERVICE, vmm.REMOVE_DEVICE, request, timeout_s=30)

    async def present(self, sandbox_id: str) -> list[str]:
        ref = vmm.SandboxRef(sandbox_id=sandbox_id)
        listed = await self._bus.call(SERVICE, vmm.LIST_PRESENT_DEVICES, ref, timeout_s=10)
        return [device.hypervisor_id for device in listed.devices]


@asynccontextmanager
async def managing() -> AsyncIterator[Manager]:
    async with BusClient() as bus:
        manager = Manager(bus)
        await manager.start()
        try:
            yield manager
        finally:
            manager.kill()


async def booted(vm: vmm.Vm) -> None:
    """Wait until the guest's agent answers; hotplug needs a guest that listens."""
    reader, writer = await asyncio.open_unix_connection(vm.agent_socket)
    writer.write(HELLO + bytes(16))
    assert await reader.readexactly(24) == HELLO_REPLY + bytes(16)
    writer.close()


async def heard(news: Subscriber, topic: str) -> Received:
    async for item in news:
        if isinstance(item, Received) and item.news.topic == topic:
            return item
    raise AssertionError(topic)


@in_event_loop
async def test_a_vm_from_its_making_to_its_end(sandbox: str) -> None:
    async with managing() as manager:
        vm = await manager.create(sandbox)
        assert psutil.Process(vm.process.pid).name().startswith("qemu-system")
        assert cgroup.processes(sandbox) == [vm.process.pid]
        assert await manager.create(sandbox) == vm, "asking again changes nothing"
        assert (await manager.describe(sandbox)).runstate == "running"
        await manager.destroy(sandbox)
        await manager.destroy(sandbox)
        assert not psutil.pid_exists(vm.process.pid)
        assert os.listdir(paths.sandbox_dir(sandbox)) == ["share"]  # noqa: PTH208
        assert not os.path.exists(cgroup.path(sandbox))  # noqa: PTH110
        with pytest.raises(NotFoundError):
            await manager.describe(sandbox)


@in_event_loop
async def test_devices_come_and_go_and_survive_the_manager(sandbox: str) -> None:
    async with managing() as manager, Subscriber([SERVICE]) as news:
        vm = await manager.create(sandbox)
        await booted(vm)
        first = await manager.add(sandbox)
        assert (first.hypervisor_id, first.pci_path) == ("share-1", "04/00")
        with pytest.raises(AlreadyExistsError, match="port0 holds share-1"):
            await manager.add(sandbox)
        await manager.remove(sandbox, first.hypervisor_id)
        removed = (await heard(news, vmm.DEVICE_REMOVED.topic)).body_of(vmm.DEVICE_REMOVED)
        assert removed == vmm.DeviceRemoved(sandbox_id=sandbox, hypervisor_id="share-1")
        assert await manager.present(sandbox) == []

        second = await manager.add(sandbox)
        assert second.hypervisor_id == "share-2", "an id is never used twice"
        manager.kill()
        await manager.start()
        assert await manager.vms() == (vm,)
        assert await manager.present(sandbox) == ["share-2"]

        await manager.remove(sandbox, "share-2")
        await manager.remove(sandbox, "share-2") if await manager.present(sandbox) else None
        assert (await heard(news, vmm.DEVICE_REMOVED.topic)).news.body["hypervisor_id"] == "share-2"
        assert (await manager.add(sandbox, "port1")).pci_path == "05/00"
        await manager.destroy(sandbox)


@in_event_loop
async def test_the_end_of_a_vm_is_told_and_its_last_words_are_kept(sandbox: str) -> None:
    async with managing() as manager, Subscriber([SERVICE]) as news:
        config = QemuConfig(
            kernel=CONFIG.kernel, initrd=CONFIG.initrd, default_memory=384, kernel_params="rdinit=/no/such/init"
        )
        await manager.create(sandbox, config)
        await heard(news, vmm.VM_EXITED.topic)
        status = await manager.describe(sandbox)
        assert not status.is_running
        assert "Kernel panic - not syncing" in status.console_tail
        await manager.destroy(sandbox)


@in_event_loop
async def test_a_vm_that_ends_while_the_manager_is_away_is_told_on_return(sandbox: str) -> None:
    async with managing() as manager:
        vm = await manager.create(sandbox)
        manager.kill()
        psutil.Process(vm.process.pid).kill()
        psutil.wait_procs([psutil.Process(vm.process.pid)] if psutil.pid_exists(vm.process.pid) else [], timeout=10)
        await manager.start()
        assert await manager.vms() == ()
        assert not Path(paths.vm_dir(sandbox)).exists()


@in_event_loop
async def test_a_half_made_vm_is_made_again(sandbox: str) -> None:
    async with managing() as manager:
        vm = await manager.create(sandbox)
        manager.kill()
        record = Path(paths.vm_dir(sandbox)) / "vm.json"
        record.write_text(f'{{"sandbox_id": "{sandbox}"}}')  # as it is before QEMU's monitor has answered
        await manager.start()
        assert cgroup.processes(sandbox) == []
        again = await manager.create(sandbox)
        assert again.process != vm.process
        await manager.destroy(sandbox)


@in_event_loop
async def test_qemus_own_words_are_in_the_error_and_nothing_is_left(sandbox: str) -> None:
    async with managing() as manager:
        config = QemuConfig(kernel="/no/such/kernel", initrd=CONFIG.initrd, default_memory=384)
        with pytest.raises(HypervisorError, match=r"QEMU ended before it ran: .*/no/such/kernel"):
            await manager.create(sandbox, config)
        assert os.listdir(paths.sandbox_dir(sandbox)) == ["share"]  # noqa: PTH208
