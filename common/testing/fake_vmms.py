"""The fake hypervisors as a test uses them, all in the same way, with what differs between them as data."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import msgspec
from qemu.qmp import QMPClient

from common import paths
from common.linux import identity
from common.testing.fake_qemu.__main__ import CONTROL_SOCKET

if TYPE_CHECKING:
    from common.testing.demands import How


class FakeVmm(Protocol):
    """What a test demands of a fake hypervisor, and sees in it.

    Attributes:
        hypervisor: its name.
        module: the program.
        config: changes to a configuration that works.
        adds: the commands that plug a disk, in order.
        removes: the command that asks for a removal.
        tells: the event that confirms one.
        bus: where it plugs; its slots are what a VM has free.
    """

    hypervisor: ClassVar[str]
    module: ClassVar[str]
    config: ClassVar[dict[str, object]]
    adds: ClassVar[tuple[str, ...]]
    removes: ClassVar[str]
    tells: ClassVar[str]
    bus: ClassVar[str]

    async def connect(self, sandbox_id: str) -> None:
        """Connect to the control socket of a sandbox's fake."""

    async def close(self) -> None:
        """End the connection."""

    async def misbehave(self, what: str, how: How, times: int = 1) -> None:
        """Have the next answers to a command, or the next events of a name, go wrong."""

    async def guest_lets_go(self, *, does: bool) -> None:
        """Say whether the guest lets devices go by itself."""

    async def let_go(self, hypervisor_id: str) -> None:
        """Have the guest let a device go, asked or not."""

    async def transcript(self) -> list[str]:
        """Return what was said so far."""

    async def has(self) -> tuple[set[str], set[str]]:
        """Return the devices' ids, and the names of the files that are open."""


class Qemu:
    """The fake QEMU; its control socket speaks QMP."""

    hypervisor = "qemu"
    module = "common.testing.fake_qemu"
    config: ClassVar[dict[str, object]] = {"initrd": "", "seccompsandbox": ""}
    adds = ("blockdev-add", "device_add")
    removes = "device_del"
    tells = "DEVICE_DELETED"
    bus = "bridge0"

    def __init__(self) -> None:
        self._client = QMPClient()

    async def connect(self, sandbox_id: str) -> None:
        """See :class:`FakeVmm`."""
        await self._client.connect(f"{paths.vm_dir(sandbox_id)}/{CONTROL_SOCKET}")

    async def close(self) -> None:
        """See :class:`FakeVmm`."""
        await self._client.disconnect()

    async def misbehave(self, what: str, how: How, times: int = 1) -> None:
        """See :class:`FakeVmm`."""
        await self.ask("x-misbehave", what=what, how=how.value, times=times)

    async def guest_lets_go(self, *, does: bool) -> None:
        """See :class:`FakeVmm`."""
        await self.ask("x-guest", **{"lets-go": does})

    async def let_go(self, hypervisor_id: str) -> None:
        """See :class:`FakeVmm`."""
        await self.ask("x-let-go", id=hypervisor_id)

    async def transcript(self) -> list[str]:
        """See :class:`FakeVmm`."""
        return [str(line) for line in await self.ask("x-transcript")]

    async def has(self) -> tuple[set[str], set[str]]:
        """See :class:`FakeVmm`."""
        listed = await self.ask("qom-list", path="/machine/peripheral")
        nodes = await self.ask("query-named-block-nodes")
        devices = {str(item["name"]) for item in listed if item["name"] != "type"}
        return devices, {Path(node["file"]).name for node in nodes}

    async def ask(self, command: str, **arguments: object) -> Any:  # noqa: ANN401 - JSON
        """Run a command on the control socket."""
        return await self._client.execute(command, arguments)


class CloudHypervisor:
    """The fake Cloud Hypervisor; its control socket takes a JSON object a line."""

    hypervisor = "clh"
    module = "common.testing.fake_cloud_hypervisor"
    config: ClassVar[dict[str, object]] = {"initrd": ""}
    adds = ("vm.add-disk",)
    removes = "vm.remove-device"
    tells = "device-removed"
    bus = "segment0"

    def __init__(self) -> None:
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None

    async def connect(self, sandbox_id: str) -> None:
        """See :class:`FakeVmm`."""
        path = f"{paths.vm_dir(sandbox_id)}/{CONTROL_SOCKET}"
        self._reader, self._writer = await asyncio.open_unix_connection(path, limit=1 << 20)

    async def close(self) -> None:
        """See :class:`FakeVmm`."""
        if self._writer is not None:
            self._writer.close()

    async def misbehave(self, what: str, how: How, times: int = 1) -> None:
        """See :class:`FakeVmm`."""
        await self.ask("misbehave", what=what, how=how.value, times=times)

    async def guest_lets_go(self, *, does: bool) -> None:
        """See :class:`FakeVmm`."""
        await self.ask("guest", lets_go=does)

    async def let_go(self, hypervisor_id: str) -> None:
        """See :class:`FakeVmm`."""
        await self.ask("let_go", name=hypervisor_id)

    async def transcript(self) -> list[str]:
        """See :class:`FakeVmm`."""
        return [str(line) for line in await self.ask("transcript")]

    async def has(self) -> tuple[set[str], set[str]]:
        """See :class:`FakeVmm`."""
        devices, files = await self.ask("has")
        return set(devices), {Path(file).name for file in files}

    async def garble(self) -> None:
        """Have half a record on the event stream, as if it had been full."""
        await self.ask("garble")

    async def ask(self, demand: str, **arguments: object) -> Any:  # noqa: ANN401 - JSON
        """Have a demand carried out."""
        assert self._writer is not None, "not connected"
        self._writer.write(json.dumps({"demand": demand, **arguments}).encode() + b"\n")
        return json.loads(await self._reader.readline())


FAKES: dict[str, type[Qemu | CloudHypervisor]] = {kind.hypervisor: kind for kind in (Qemu, CloudHypervisor)}


def install(kind: type[Qemu | CloudHypervisor], directory: Path, *arguments: str) -> str:
    """Write a program that can be started as the hypervisor; return its path.

    Args:
        kind: which.
        directory: the run directory of a test: the program lies there, and that KVM works, which a fake does not need.
        arguments: what it is started with before all else.
    """
    program = directory / kind.hypervisor
    command = " ".join([sys.executable, "-P", "-m", kind.module, *arguments])
    program.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    program.chmod(0o700)
    verdict = {"boot_id": identity.boot_id(), "accelerator": "kvm", "reason": "a fake needs none"}
    (directory / "probe.json").write_bytes(msgspec.json.encode(verdict))
    return str(program)
