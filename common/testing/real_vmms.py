"""The real hypervisors as a test uses them, as far as they let themselves be used like the fakes.

They come from whoever runs the tests: ``PYKATA_TEST_CH`` is the path of a Cloud Hypervisor, ``PYKATA_TEST_FC`` of a
Firecracker, which has its jailer beside it. ``make test-real-vmm`` sets them, on a host with KVM. A guest that lets
nothing go is one whose processors are stopped. A real one does not misbehave on demand.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from common import paths
from common.config import BlockDriver
from common.testing.clh_api import ClhApi
from common.testing.guest_door import wait_agent
from common.testing.vmms import Vmm

if TYPE_CHECKING:
    from common.services.vmm import Vm

CH_VARIABLE = "PYKATA_TEST_CH"
FC_VARIABLE = "PYKATA_TEST_FC"
_JAILED: dict[str, object] = {"jailer_path": str(Path(os.environ.get(FC_VARIABLE, "/")).parent / "jailer")}
_ROUNDS = 100
_BOOT_TIMEOUT_S = 300.0
"""A guest of an emulated host takes its time."""


class RealCloudHypervisor(Vmm):
    """A Cloud Hypervisor whose guest runs this project's agent.

    Attributes:
        program: its path.
    """

    program = os.environ.get(CH_VARIABLE, "")
    hypervisor = "clh"
    bus = "segment0"
    removal_timeout_s = 30.0
    rounds = _ROUNDS

    def __init__(self) -> None:
        self._vm: Vm
        self._api: ClhApi

    async def connect(self, vm: Vm) -> None:
        """Wait until the guest's agent takes connections."""
        self._vm, self._api = vm, ClhApi(paths.vm_dir(vm.sandbox_id))
        await _wait_agent(vm)

    async def close(self) -> None:
        """Nothing is held."""

    async def guest_lets_go(self, *, does: bool) -> None:
        """Stop the guest's processors, or let them go on."""
        assert await asyncio.to_thread(self._api.put, "vm.resume" if does else "vm.pause") == ""

    async def let_go(self, _hypervisor_id: str) -> None:
        """Let the guest do what it was asked to."""
        await self.guest_lets_go(does=True)

    async def has(self) -> tuple[set[str], set[str]]:
        """Return the devices' ids, and the names of the files of the run directory that are open."""
        tree = (await asyncio.to_thread(self._api.get, "vm.info"))["device_tree"]
        devices = {name for name in tree if name.startswith(("_disk", "_fs", "_pmem"))}
        return devices, set(self._open_files())

    async def totals(self) -> tuple[int, int]:
        """Return how many processors the VM has, each of which is a thread, and how much memory, in MiB."""
        names = [file.read_text() for file in Path(f"/proc/{self._vm.process.pid}/task").glob("*/comm")]
        info = await asyncio.to_thread(self._api.get, "vm.info")
        return sum(name.startswith("vcpu") for name in names), info["memory_actual_size"] >> 20

    def _open_files(self) -> list[str]:
        """Return which, whatever path it has opened them by."""
        ours = {_file_of(file): file.name for file in Path(paths.run_dir()).iterdir() if file.is_file()}
        found = []
        for file in Path(f"/proc/{self._vm.process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # it was closed meanwhile
                found.append(ours.get(_file_of(file), ""))
        return list(filter(None, found))

    @classmethod
    def install(cls, directory: Path, *_: str) -> str:
        """Copy the program to where it is read from memory; return its path."""
        return str(shutil.copy(cls.program, directory / "cloud-hypervisor"))


class RealFirecracker(Vmm):
    """A jailed Firecracker with disks on PCI. Its guest has not looked for the disks, so it has nothing to let go.

    Attributes:
        program: its path.
    """

    program = os.environ.get(FC_VARIABLE, "")
    hypervisor = "firecracker"
    config: ClassVar[dict[str, object]] = {**_JAILED, "block_device_driver": BlockDriver.VIRTIO_BLK}
    bus = "pci"
    removal_timeout_s = 30.0
    rounds = _ROUNDS
    waits_for_guest = False

    def __init__(self) -> None:
        self._vm: Vm

    async def connect(self, vm: Vm) -> None:
        """Wait until the guest's agent takes connections."""
        self._vm = vm
        await _wait_agent(vm)

    async def close(self) -> None:
        """Nothing is held."""

    async def guest_lets_go(self, *, does: bool) -> None:
        """Nothing: Firecracker does not ask its guest."""

    async def let_go(self, _hypervisor_id: str) -> None:
        """Nothing, likewise."""

    async def has(self) -> tuple[set[str], set[str]]:
        """Return the names of the open nodes of the jail that are disks, and of the files behind their loop devices."""
        nodes, files = set(), set()
        for file in Path(f"/proc/{self._vm.process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # it was closed meanwhile
                number = file.stat().st_rdev
                backing = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/loop/backing_file")
                if backing.exists():
                    nodes.add(file.readlink().name.removesuffix(" (deleted)"))
                    files.add(Path(backing.read_text().strip()).name)
        return nodes, files

    @classmethod
    def install(cls, directory: Path, *_: str) -> str:
        """Copy the program to where it is read from memory; return its path."""
        return str(shutil.copy(cls.program, directory / "firecracker"))


class RealFirecrackerWithPlaceholders(RealFirecracker):
    """The same without PCI: disks take the place of placeholders."""

    config: ClassVar[dict[str, object]] = {**_JAILED, "block_device_driver": BlockDriver.VIRTIO_MMIO}
    bus = "placeholders"
    driver = BlockDriver.VIRTIO_MMIO


def _file_of(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


async def _wait_agent(vm: Vm) -> None:
    async with asyncio.timeout(_BOOT_TIMEOUT_S):
        await wait_agent(vm.channel)


Real = RealCloudHypervisor | RealFirecracker


def _of(variable: str, kinds: dict[str, type[Real]]) -> dict[str, type[Real]]:
    return kinds if os.environ.get(variable) else {}


REAL: dict[str, type[Real]] = {
    **_of(CH_VARIABLE, {"clh-real": RealCloudHypervisor}),
    **_of(FC_VARIABLE, {"firecracker-real": RealFirecracker, "placeholders-real": RealFirecrackerWithPlaceholders}),
}
"""Those that are there."""
