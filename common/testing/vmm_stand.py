"""A VM manager under test: the real program, on a real bus, with real QEMU.

::

    def test_something(sandbox: str) -> None:          # the fixture of tests/vm/conftest.py
        async with managing() as manager:
            vm = await manager.create(sandbox)
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from qemu.qmp import QMPClient

from common import paths
from common.bus.client import BusClient
from common.bus.events import Received, Resync, Subscriber
from common.bus.wire import Empty
from common.config import ClhConfig, ExtraMonitor, FirecrackerConfig, HypervisorConfig, QemuConfig, VirtioFsSection
from common.errors import InterruptedCallError, UnavailableError
from common.services import vmm
from common.testing.guest_door import wait_agent
from common.testing.stack import GUEST, VIRTIOFSD

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


SERVICE = vmm.service_name("qemu")
MEMORY_MIB = 384
_CONFIGS: dict[str, type[HypervisorConfig]] = {
    "qemu": QemuConfig,
    "clh": ClhConfig,
    "firecracker": FirecrackerConfig,
}
_BUSES = {
    ("qemu", vmm.BusKind.PCI): "bridge0",
    ("qemu", vmm.BusKind.SCSI): "scsi0.0",
    ("qemu", vmm.BusKind.CPU): "cpus",
    ("qemu", vmm.BusKind.MEMORY): "memory",
    ("clh", vmm.BusKind.PCI): "segment0",
    ("clh", vmm.BusKind.CPU): "cpus",
    ("clh", vmm.BusKind.MEMORY): "memory",
    ("firecracker", vmm.BusKind.PCI): "pci",
    ("firecracker", vmm.BusKind.MMIO): "placeholders",
    ("firecracker", vmm.BusKind.MMIO_READ_ONLY): "read-only-placeholders",
    ("firecracker", vmm.BusKind.MMIO_NETWORK): "interfaces",
}
_TIMEOUT_S = 60.0
_SNAPSHOT_TIMEOUT_S = 300.0


def config(hypervisor: str = "qemu", **changes: Any) -> HypervisorConfig:  # noqa: ANN401 - fields of any of them
    """Return a configuration that works, with changes."""
    works: dict[str, Any] = {
        "kernel": str(GUEST / "vmlinux"),
        "initrd": str(GUEST / "initrd.img"),
        "default_memory": MEMORY_MIB,
        "enable_debug": True,
    }
    if issubclass(_CONFIGS[hypervisor], VirtioFsSection):
        works["virtio_fs_daemon"] = VIRTIOFSD
    if hypervisor == "qemu":
        works["extra_monitor_socket"] = ExtraMonitor.QMP
    return _CONFIGS[hypervisor](**{**works, **changes})


class Manager:
    """A running VM manager and how the test talks to it.

    Attributes:
        hypervisor: whose.
        service: its name on the bus.
        process: it itself.
    """

    def __init__(self, bus: BusClient, hypervisor: str = "qemu") -> None:
        self.hypervisor = hypervisor
        self.service = vmm.service_name(hypervisor)
        self._bus = bus
        self._log = Path(paths.run_dir()) / "manager.log"
        self.process: subprocess.Popen[bytes]

    async def start(self) -> None:
        """Start it, and return when it answers: it knows then what it owns."""
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "procs.vmm_manager", "--hypervisor", self.hypervisor]
            self.process = subprocess.Popen(command, stdout=log)  # noqa: ASYNC220
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

    async def create(self, sandbox_id: str, **changes: Any) -> vmm.Vm:  # noqa: ANN401 - of its configuration
        """Ask for a VM, with changes to its configuration."""
        return await self._create(vmm.CreateVm(sandbox_id=sandbox_id, config=config(self.hypervisor, **changes)))

    async def hold(self, sandbox_id: str, **changes: Any) -> vmm.Vm:  # noqa: ANN401 - of its configuration
        """Ask for a VM that waits with its boot."""
        wish = vmm.CreateVm(sandbox_id=sandbox_id, config=config(self.hypervisor, **changes), is_held=True)
        return await self._create(wish)

    async def _create(self, wish: vmm.CreateVm) -> vmm.Vm:
        return await self._bus.call(self.service, vmm.CREATE_VM, wish, timeout_s=_TIMEOUT_S)

    async def describe(self, sandbox_id: str) -> vmm.VmStatus:
        """Ask for what is true of a VM."""
        return await self._bus.call(self.service, vmm.DESCRIBE_VM, _ref(sandbox_id), timeout_s=_TIMEOUT_S)

    async def destroy(self, sandbox_id: str) -> None:
        """Ask for the end of a VM."""
        await self._bus.call(self.service, vmm.DESTROY_VM, _ref(sandbox_id), timeout_s=_TIMEOUT_S)

    async def pause(self, sandbox_id: str) -> None:
        """Ask for a guest's processors to be stopped."""
        await self._bus.call(self.service, vmm.PAUSE_VM, _ref(sandbox_id), timeout_s=_TIMEOUT_S)

    async def resume(self, sandbox_id: str) -> None:
        """Ask for them to go on."""
        await self._bus.call(self.service, vmm.RESUME_VM, _ref(sandbox_id), timeout_s=_TIMEOUT_S)

    async def snapshot(self, sandbox_id: str, directory: Path) -> None:
        """Ask for a VM to be written into a directory."""
        request = vmm.SnapshotVm(sandbox_id=sandbox_id, directory=str(directory))
        await self._bus.call(self.service, vmm.SNAPSHOT_VM, request, timeout_s=_SNAPSHOT_TIMEOUT_S)

    async def restore(self, sandbox_id: str, directory: Path, memory: vmm.MemoryMode = vmm.MemoryMode.COPY) -> vmm.Vm:
        """Ask for a VM from a snapshot."""
        request = vmm.RestoreVm(sandbox_id=sandbox_id, directory=str(directory), memory=memory)
        return await self._bus.call(self.service, vmm.RESTORE_VM, request, timeout_s=_SNAPSHOT_TIMEOUT_S)

    async def vms(self) -> tuple[vmm.Vm, ...]:
        """Ask for all VMs."""
        return (await self._bus.call(self.service, vmm.LIST_VMS, Empty(), timeout_s=_TIMEOUT_S)).vms

    async def add(self, sandbox_id: str, slot: int = 0, *, source: str = "", bus: str = "") -> vmm.AddedDevice:
        """Plug a share, of the sandbox's share directory unless told otherwise."""
        spec = vmm.ShareSpec(source=source or paths.share_dir(sandbox_id), tag="kataShared")
        return await self.plug(sandbox_id, spec, slot, bus=bus)

    async def plug(
        self, sandbox_id: str, spec: vmm.DeviceSpec, slot: int = 0, *, bus: str = "", serial: str = ""
    ) -> vmm.AddedDevice:
        """Plug a device, into a bus that it fits unless told otherwise."""
        request = vmm.AddDevice(
            sandbox_id=sandbox_id,
            spec=spec,
            bus=bus or _BUSES[self.hypervisor, spec.bus_kind],
            slot=slot,
            serial=serial or secrets.token_hex(10),
        )
        return await self._bus.call(self.service, vmm.ADD_DEVICE, request, timeout_s=_TIMEOUT_S)

    async def remove(self, sandbox_id: str, hypervisor_id: str) -> None:
        """Ask for a device's removal."""
        request = vmm.RemoveDevice(sandbox_id=sandbox_id, hypervisor_id=hypervisor_id)
        await self._bus.call(self.service, vmm.REMOVE_DEVICE, request, timeout_s=_TIMEOUT_S)

    async def present(self, sandbox_id: str) -> list[str]:
        """Ask for the ids of the devices that QEMU has."""
        return [device.hypervisor_id for device in await self.list(sandbox_id)]

    async def list(self, sandbox_id: str) -> tuple[vmm.PresentDevice, ...]:
        """Ask for the devices that QEMU has."""
        listed = await self._bus.call(self.service, vmm.LIST_PRESENT_DEVICES, _ref(sandbox_id), timeout_s=_TIMEOUT_S)
        return listed.devices


class Monitor:
    """QEMU's extra monitor, beside the manager's: to see what is true, and to do what the manager must then notice."""

    def __init__(self, vm: vmm.Vm) -> None:
        self._directory = paths.vm_dir(vm.sandbox_id)
        self._client = QMPClient(vm.sandbox_id)

    async def __aenter__(self) -> Self:
        await self._client.connect(f"{self._directory}/extra-monitor.sock")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.disconnect()

    async def plugged(self) -> set[str]:
        """Return the hot-plugged devices."""
        listed: Any = await self._client.execute("qom-list", {"path": "/machine/peripheral"})
        return {item["name"] for item in listed if "-" in item["name"]}

    async def network_ends(self) -> set[str]:
        """Return the host's interfaces that QEMU has open, by the names that it was given."""
        answer: Any = await self._client.execute("human-monitor-command", {"command-line": "info network"})
        return set(re.findall(r"(nic-\d+): index=\d+,type=tap", answer))

    async def macs(self) -> dict[str, str]:
        """Return the address of each network device."""
        listed: Any = await self._client.execute("query-rx-filter", {})
        return {item["name"]: item["main-mac"] for item in listed}

    async def taken(self, device_id: str) -> None:
        """Wait until the guest has said, by ACPI, that it knows a processor or memory that was plugged."""
        async for event in self._client.events:
            data: Any = event.get("data", {})
            if event["event"] == "ACPI_DEVICE_OST" and data["info"].get("device") == device_id:
                return

    async def cpus(self) -> int:
        """Return how many processors the machine has."""
        listed: Any = await self._client.execute("query-cpus-fast", {})
        return len(listed)

    async def memory_mib(self) -> tuple[int, int]:
        """Return how much memory the machine booted with, and how much has been plugged."""
        answer: Any = await self._client.execute("query-memory-size-summary", {})
        return answer["base-memory"] >> 20, answer["plugged-memory"] >> 20

    async def memory_backends(self) -> set[str]:
        """Return the memory backends beside that of the boot."""
        listed: Any = await self._client.execute("qom-list", {"path": "/objects"})
        return {item["name"] for item in listed if "-" in item["name"]}

    async def block_nodes(self) -> set[str]:
        """Return the block nodes that somebody named."""
        listed: Any = await self._client.execute("query-named-block-nodes", {"flat": True})
        return {item["node-name"] for item in listed if not item["node-name"].startswith("#")}

    async def add_block_node(self, name: str, path: str) -> None:
        """Open a file."""
        file = {"driver": "file", "filename": path}
        await self._client.execute("blockdev-add", {"driver": "raw", "node-name": name, "file": file})

    async def use_block_node(self, name: str, user: str) -> None:
        """Have a block node used by another, which keeps it from being deleted."""
        await self._client.execute("blockdev-add", {"driver": "raw", "node-name": user, "file": name})

    async def delete_block_node(self, name: str) -> None:
        """Delete a block node."""
        await self._client.execute("blockdev-del", {"node-name": name})

    async def plug_large(self, size_mib: int, bus: str) -> None:
        """Plug a PCI device, "large", which needs so much address space and has nothing else to it."""
        memory = {"qom-type": "memory-backend-ram", "id": "shared", "size": size_mib << 20}
        await self._client.execute("object-add", memory)
        device = {"driver": "ivshmem-plain", "id": "large", "bus": bus, "memdev": "shared"}
        await self._client.execute("device_add", device)

    async def unplug(self, device_id: str) -> None:
        """Remove a device and wait until the guest has let go."""
        await self._client.execute("device_del", {"id": device_id})
        async for event in self._client.events:
            data: Any = event.get("data", {})
            if event["event"] == "DEVICE_DELETED" and data.get("device") == device_id:
                return

    async def freeze(self) -> None:
        """Stop the guest's processors."""
        await self._client.execute("stop")

    async def thaw(self) -> None:
        """Let the guest go on."""
        await self._client.execute("cont")


@asynccontextmanager
async def managing(hypervisor: str = "qemu") -> AsyncIterator[Manager]:
    """A running VM manager; what it started does not end with it."""
    async with BusClient() as bus:
        manager = Manager(bus, hypervisor)
        try:
            await manager.start()
            yield manager
        finally:
            manager.kill()


async def booted(vm: vmm.Vm) -> None:
    """Wait until the guest's agent answers; hotplug needs a guest that listens."""
    await wait_agent(vm.channel)


async def heard(news: Subscriber, topic: str) -> Received:
    """Wait for an event."""
    async for item in news:
        if isinstance(item, Received) and item.news.topic == topic:
            return item
    raise AssertionError(topic)


async def resynced(news: Subscriber) -> None:
    """Wait until a subscriber hears a publisher that is new to it: what was published before is lost to it."""
    async for item in news:
        if isinstance(item, Resync):
            return


async def removed(news: Subscriber) -> str:
    """Wait until a removal is told; return the hypervisor's id."""
    body = (await heard(news, vmm.DEVICE_REMOVED.topic)).body_of(vmm.DEVICE_REMOVED)
    assert body is not None
    return body.hypervisor_id


def _ref(sandbox_id: str) -> vmm.SandboxRef:
    return vmm.SandboxRef(sandbox_id=sandbox_id)
