"""Hotplug under test: the real device manager and VM manager, with a fake QEMU that misbehaves on demand.

::

    async with plugging() as stand:
        await stand.qemu.misbehave("device_add", How.ACTED_AND_REFUSED)
        await stand.devices.attach(spec=stand.disk("a"))
"""

from __future__ import annotations

import shutil
import sys
import uuid
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qemu.qmp import QMPClient

from common import paths
from common.bus.client import BusClient
from common.linux import cgroup
from common.services.vmm import BlockSpec
from common.testing.device_stand import DeviceManager
from common.testing.fake_qemu.__main__ import CONTROL_SOCKET
from common.testing.isolation import run_dir
from common.testing.vmm_stand import Manager, managing

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from common.services.vmm import Vm
    from common.testing.fake_qemu.monitor import How


class Qemu:
    """What a test demands of the fake QEMU and sees in it."""

    def __init__(self) -> None:
        self._client = QMPClient()

    async def connect(self, sandbox_id: str) -> None:
        """Connect to the control socket of a sandbox's QEMU."""
        await self._client.connect(f"{paths.vm_dir(sandbox_id)}/{CONTROL_SOCKET}")

    async def close(self) -> None:
        """End the connection."""
        await self._client.disconnect()

    async def misbehave(self, command: str, how: How, times: int = 1) -> None:
        """Have the next answers to a command, or the next events of a name, go wrong."""
        await self.ask("x-misbehave", what=command, how=how.value, times=times)

    async def guest_lets_go(self, *, does: bool) -> None:
        """Say whether the guest lets devices go by itself."""
        await self.ask("x-guest", **{"lets-go": does})

    async def let_go(self, hypervisor_id: str) -> None:
        """Have the guest let a device go, asked or not."""
        await self.ask("x-let-go", id=hypervisor_id)

    async def transcript(self) -> list[str]:
        """Return what was said on the monitor."""
        return [str(line) for line in await self.ask("x-transcript")]

    async def has(self) -> tuple[set[str], set[str]]:
        """Return the devices and the block nodes that QEMU has."""
        listed = await self.ask("qom-list", path="/machine/peripheral")
        nodes = await self.ask("query-named-block-nodes")
        devices = {str(item["name"]) for item in listed if item["name"] != "type"}
        return devices, {str(node["node-name"]) for node in nodes}

    async def ask(self, command: str, **arguments: object) -> Any:  # noqa: ANN401 - JSON
        """Run a command on the control socket."""
        return await self._client.execute(command, arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class HotplugStand:
    """Everything that takes part.

    Attributes:
        sandbox_id: whose VM it is.
        devices: the device manager.
        manager: the VM manager.
        qemu: the fake QEMU.
    """

    sandbox_id: str
    devices: DeviceManager
    manager: Manager
    qemu: Qemu

    def disk(self, name: str) -> BlockSpec:
        """Return what describes a disk, and make its file."""
        return disk(name)


def disk(name: str) -> BlockSpec:
    """Return what describes a disk in the run directory, and make its file."""
    file = Path(paths.run_dir()) / name
    file.write_bytes(bytes(1 << 20))
    return BlockSpec(source=str(file))


@asynccontextmanager
async def plugging() -> AsyncIterator[HotplugStand]:
    """Provide a sandbox with a VM, and end all of it."""
    sandbox_id = f"h{uuid.uuid4().hex[:8]}"
    with run_dir():
        async with managing() as manager, BusClient() as bus, fake_vm(manager, sandbox_id) as (vm, qemu):
            devices = DeviceManager(bus, sandbox_id, vm.hotplug_buses)
            try:
                await devices.start()
                yield HotplugStand(sandbox_id=sandbox_id, devices=devices, manager=manager, qemu=qemu)
            finally:
                devices.kill()


@asynccontextmanager
async def fake_vm(manager: Manager, sandbox_id: str) -> AsyncIterator[tuple[Vm, Qemu]]:
    """Provide a sandbox whose VM is a fake QEMU, and end it."""
    qemu = Qemu()
    Path(paths.sandbox_dir(sandbox_id)).mkdir(parents=True)
    try:
        vm = await manager.create(sandbox_id, path=_executable(), initrd="", seccompsandbox="")
        await qemu.connect(sandbox_id)
        yield vm, qemu
    finally:
        await qemu.close()
        await manager.destroy(sandbox_id)
        cgroup.kill(sandbox_id)
        shutil.rmtree(paths.sandbox_dir(sandbox_id))


def _executable() -> str:
    """Return a program that can be started as QEMU."""
    program = Path(paths.run_dir()) / "qemu"
    if not program.exists():
        program.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m common.testing.fake_qemu "$@"\n')
        program.chmod(0o700)
    return str(program)
