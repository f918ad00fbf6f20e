"""A VM manager under test: the real program, on a real bus, with real QEMU.

::

    def test_something(sandbox: str) -> None:          # the fixture of tests/vm/conftest.py
        async with managing() as manager:
            vm = await manager.create(sandbox)
"""

from __future__ import annotations

import asyncio
import json
import secrets
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import paths
from common.bus.client import BusClient
from common.bus.events import Received, Subscriber
from common.bus.wire import Empty
from common.channel import HELLO, HELLO_REPLY, NONCE_SIZE
from common.config import QemuConfig
from common.errors import InterruptedCallError, UnavailableError
from common.services import vmm
from common.testing.stack import GUEST

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


SERVICE = vmm.service_name("qemu")
MEMORY_MIB = 384
_TIMEOUT_S = 60.0


def config(**changes: Any) -> QemuConfig:  # noqa: ANN401 - fields of QemuConfig
    """Return a configuration that works, with changes."""
    works = {
        "kernel": str(GUEST / "vmlinux"),
        "initrd": str(GUEST / "initrd.img"),
        "default_memory": MEMORY_MIB,
        "virtio_fs_daemon": "/usr/lib/qemu/virtiofsd",
    }
    return QemuConfig(**{**works, **changes})


class Manager:
    """A running VM manager and how the test talks to it."""

    def __init__(self, bus: BusClient) -> None:
        self._bus = bus
        self._log = Path(paths.run_dir()) / "manager.log"
        self.process: subprocess.Popen[bytes]

    async def start(self) -> None:
        """Start it, and return when it answers: it knows then what it owns."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen([sys.executable, "-m", "procs.vmm_manager"], stdout=log)  # noqa: ASYNC220
        while True:
            try:
                await self.vms()
            except (UnavailableError, InterruptedCallError):
                continue
            return

    def kill(self) -> None:
        """End it as a crash would."""
        self.process.kill()
        self.process.wait()

    def logged(self) -> list[dict[str, Any]]:
        """Return the records of its log."""
        return [json.loads(line) for line in self._log.read_text().splitlines()]

    async def logs(self, event: str) -> dict[str, Any]:
        """Wait until it has logged an event; return the first such record."""
        with subprocess.Popen(  # noqa: ASYNC220 - returns at once
            ["/usr/bin/tail", "-n", "+1", "-f", self._log], stdout=subprocess.PIPE
        ) as tail:
            assert tail.stdout is not None
            try:
                while True:
                    record: dict[str, Any] = json.loads(await asyncio.to_thread(tail.stdout.readline))
                    if record["event"] == event:
                        return record
            finally:
                tail.kill()

    async def create(self, sandbox_id: str, **changes: Any) -> vmm.Vm:  # noqa: ANN401 - fields of QemuConfig
        """Ask for a VM, with changes to its configuration."""
        request = vmm.CreateVm(sandbox_id=sandbox_id, config=config(**changes))
        return await self._bus.call(SERVICE, vmm.CREATE_VM, request, timeout_s=_TIMEOUT_S)

    async def describe(self, sandbox_id: str) -> vmm.VmStatus:
        """Ask for what is true of a VM."""
        return await self._bus.call(SERVICE, vmm.DESCRIBE_VM, _ref(sandbox_id), timeout_s=_TIMEOUT_S)

    async def destroy(self, sandbox_id: str) -> None:
        """Ask for the end of a VM."""
        await self._bus.call(SERVICE, vmm.DESTROY_VM, _ref(sandbox_id), timeout_s=_TIMEOUT_S)

    async def vms(self) -> tuple[vmm.Vm, ...]:
        """Ask for all VMs."""
        return (await self._bus.call(SERVICE, vmm.LIST_VMS, Empty(), timeout_s=_TIMEOUT_S)).vms

    async def add(self, sandbox_id: str, bus: str = "port0", source: str = "") -> vmm.AddedDevice:
        """Plug a share, of the sandbox's share directory unless told otherwise."""
        spec = vmm.ShareSpec(source=source or paths.share_dir(sandbox_id), tag="kataShared")
        request = vmm.AddDevice(sandbox_id=sandbox_id, spec=spec, bus=bus, slot=0, serial=secrets.token_hex(10))
        return await self._bus.call(SERVICE, vmm.ADD_DEVICE, request, timeout_s=_TIMEOUT_S)

    async def remove(self, sandbox_id: str, hypervisor_id: str) -> None:
        """Ask for a device's removal."""
        request = vmm.RemoveDevice(sandbox_id=sandbox_id, hypervisor_id=hypervisor_id)
        await self._bus.call(SERVICE, vmm.REMOVE_DEVICE, request, timeout_s=_TIMEOUT_S)

    async def present(self, sandbox_id: str) -> list[str]:
        """Ask for the devices that QEMU has."""
        listed = await self._bus.call(SERVICE, vmm.LIST_PRESENT_DEVICES, _ref(sandbox_id), timeout_s=_TIMEOUT_S)
        return [device.hypervisor_id for device in listed.devices]


@asynccontextmanager
async def managing() -> AsyncIterator[Manager]:
    """A running VM manager; what it started does not end with it."""
    async with BusClient() as bus:
        manager = Manager(bus)
        try:
            await manager.start()
            yield manager
        finally:
            manager.kill()


async def booted(vm: vmm.Vm) -> None:
    """Wait until the guest's agent answers; hotplug needs a guest that listens."""
    reader, writer = await asyncio.open_unix_connection(vm.agent_socket)
    nonce = bytes(NONCE_SIZE)
    writer.write(HELLO + nonce)
    assert await reader.readexactly(len(HELLO_REPLY) + NONCE_SIZE) == HELLO_REPLY + nonce
    writer.close()


async def heard(news: Subscriber, topic: str) -> Received:
    """Wait for an event."""
    async for item in news:
        if isinstance(item, Received) and item.news.topic == topic:
            return item
    raise AssertionError(topic)


def _ref(sandbox_id: str) -> vmm.SandboxRef:
    return vmm.SandboxRef(sandbox_id=sandbox_id)
