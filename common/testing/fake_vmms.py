"""The fake hypervisors as a test uses them; see :mod:`common.testing.vmms`."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
from qemu.qmp import QMPClient, QMPError

from common import paths
from common.config import BlockDriver
from common.linux import identity
from common.services.channel import HybridVsock
from common.testing.fake_qemu.__main__ import CONTROL_SOCKET
from common.testing.vmms import FakeVmm

if TYPE_CHECKING:
    from common.services.vmm import Vm
    from common.testing.demands import How


class Qemu(FakeVmm):
    """The fake QEMU; its control socket speaks QMP."""

    hypervisor = "qemu"
    module = "common.testing.fake_qemu"
    config: ClassVar[dict[str, object]] = {"initrd": "", "seccompsandbox": ""}
    adds: ClassVar[tuple[str, ...]] = ("blockdev-add", "device_add")
    removes = "device_del"
    tells = "DEVICE_DELETED"
    bus = "bridge0"

    def __init__(self) -> None:
        self._client = QMPClient()

    async def connect(self, vm: Vm) -> None:
        """See :class:`Vmm`."""
        await self._client.connect(f"{paths.vm_dir(vm.sandbox_id)}/{CONTROL_SOCKET}")

    async def close(self) -> None:
        """See :class:`Vmm`. One that has ended says so here, which is no news."""
        with suppress(QMPError, EOFError):
            await self._client.disconnect()

    async def misbehave(self, what: str, how: How, times: int = 1) -> None:
        """See :class:`Vmm`."""
        await self.ask("x-misbehave", what=what, how=how.value, times=times)

    async def guest_lets_go(self, *, does: bool) -> None:
        """See :class:`Vmm`."""
        await self.ask("x-guest", **{"lets-go": does})

    async def let_go(self, hypervisor_id: str) -> None:
        """See :class:`Vmm`."""
        await self.ask("x-let-go", id=hypervisor_id)

    async def transcript(self) -> list[str]:
        """See :class:`Vmm`."""
        return [str(line) for line in await self.ask("x-transcript")]

    async def has(self) -> tuple[set[str], set[str]]:
        """See :class:`Vmm`."""
        listed = await self.ask("qom-list", path="/machine/peripheral")
        nodes = await self.ask("query-named-block-nodes")
        devices = {str(item["name"]) for item in listed if item["name"] != "type"}
        return devices, {Path(node["file"]).name for node in nodes}

    async def looks(self) -> int:
        """Return how often somebody asked whether the guest has them."""
        return int(await self.ask("x-looks"))

    async def drive(self) -> None:
        """Have the guest load its drivers."""
        await self.ask("x-drive")

    async def ask(self, command: str, **arguments: object) -> Any:  # noqa: ANN401 - JSON
        """Run a command on the control socket."""
        return await self._client.execute(command, arguments)


class _Lines(FakeVmm):
    """A fake whose control socket takes a JSON object a line."""

    def __init__(self) -> None:
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None

    def directory(self, vm: Vm) -> Path:
        """Return where the control socket is."""
        return Path(paths.vm_dir(vm.sandbox_id))

    async def connect(self, vm: Vm) -> None:
        """See :class:`Vmm`."""
        path = f"{self.directory(vm)}/{CONTROL_SOCKET}"
        self._reader, self._writer = await asyncio.open_unix_connection(path, limit=1 << 20)

    async def close(self) -> None:
        """See :class:`Vmm`."""
        if self._writer is not None:
            self._writer.close()

    async def misbehave(self, what: str, how: How, times: int = 1) -> None:
        """See :class:`Vmm`."""
        await self.ask("misbehave", what=what, how=how.value, times=times)

    async def guest_lets_go(self, *, does: bool) -> None:
        """See :class:`Vmm`."""
        await self.ask("guest", lets_go=does)

    async def let_go(self, hypervisor_id: str) -> None:
        """See :class:`Vmm`."""
        await self.ask("let_go", name=hypervisor_id)

    async def transcript(self) -> list[str]:
        """See :class:`Vmm`."""
        return [str(line) for line in await self.ask("transcript")]

    async def has(self) -> tuple[set[str], set[str]]:
        """See :class:`Vmm`."""
        devices, files = await self.ask("has")
        return set(devices), {Path(file).name for file in files}

    async def ask(self, demand: str, **arguments: object) -> Any:  # noqa: ANN401 - JSON
        """Have a demand carried out."""
        assert self._writer is not None, "not connected"
        self._writer.write(json.dumps({"demand": demand, **arguments}).encode() + b"\n")
        return json.loads(await self._reader.readline())


class CloudHypervisor(_Lines):
    """The fake Cloud Hypervisor."""

    hypervisor = "clh"
    module = "common.testing.fake_cloud_hypervisor"
    config: ClassVar[dict[str, object]] = {"initrd": "", "kernel": __file__}
    adds: ClassVar[tuple[str, ...]] = ("vm.add-disk",)
    removes = "vm.remove-device"
    tells = "device-removed"
    bus = "segment0"

    async def garble(self) -> None:
        """Have half a record on the event stream, as if it had been full."""
        await self.ask("garble")

    async def memory(self) -> tuple[str, str]:
        """Return what a restored guest had in its memory, and how that comes."""
        memory, mode = await self.ask("memory")
        return memory, mode

    async def totals(self) -> tuple[int, int]:
        """Return how many processors the VM has, and how much memory, in MiB."""
        vcpus, memory = await self.ask("totals")
        return vcpus, memory >> 20

    async def tell(self, source: str, name: str) -> None:
        """Have an event told."""
        await self.ask("tell", source=source, name=name)

    async def print(self, text: str) -> None:
        """Have the guest print something."""
        await self.ask("print", text=text)


class UnconfinedCloudHypervisor(CloudHypervisor):
    """One that may open every file of the host."""

    config: ClassVar[dict[str, object]] = {**CloudHypervisor.config, "disable_landlock": True}


class Firecracker(_Lines):
    """The fake Firecracker, without a jailer, with disks on PCI. Its guest is not asked: it must have let go before."""

    hypervisor = "firecracker"
    module = "common.testing.fake_firecracker"
    config: ClassVar[dict[str, object]] = {
        "jailer_path": "",
        "kernel": sys.executable,  # it has to be ELF
        "initrd": __file__,
        "block_device_driver": BlockDriver.VIRTIO_BLK,
    }
    adds: ClassVar[tuple[str, ...]] = ("PUT /drives",)
    removes = "DELETE /drives"
    tells = ""
    bus = "pci"
    arguments: ClassVar[tuple[str, ...]] = ("--as-version", "1.16.1")
    waits_for_guest = False

    def directory(self, vm: Vm) -> Path:
        """Return the jail's root."""
        assert isinstance(vm.channel, HybridVsock)
        return Path(vm.channel.socket).parent


class OlderFirecracker(Firecracker):
    """One that can only exchange what is behind placeholders."""

    config: ClassVar[dict[str, object]] = {**Firecracker.config, "block_device_driver": BlockDriver.VIRTIO_MMIO}
    adds: ClassVar[tuple[str, ...]] = ("PATCH /drives",)
    removes = "PATCH /drives"
    bus = "placeholders"
    driver = BlockDriver.VIRTIO_MMIO
    arguments: ClassVar[tuple[str, ...]] = ("--as-version", "1.12.1")


Fake = Qemu | CloudHypervisor | Firecracker
FAKES: dict[str, type[Fake]] = {
    "qemu": Qemu,
    "clh": CloudHypervisor,
    "firecracker": Firecracker,
    "firecracker-1.12": OlderFirecracker,
}


def trust_kvm(directory: Path) -> None:
    """Have the VM managers of a run directory believe that KVM works: a fake needs none, and else it is known."""
    verdict = {"boot_id": identity.boot_id(), "accelerator": "kvm", "reason": "the test says so"}
    (directory / "probe.json").write_bytes(msgspec.json.encode(verdict))
