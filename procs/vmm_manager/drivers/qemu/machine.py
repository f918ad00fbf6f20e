"""One VM under QEMU: its process, its monitor, its devices.

Ids of devices come from a counter in the VM's record that only grows: QEMU makes the client choose, and an id that was
used once may still be in QEMU's hands. A device is removed when QEMU says ``DEVICE_DELETED`` with its id (an event with
only a path is its inner half), or when QEMU's own list no longer has it after we were away.
"""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import log, paths
from common.errors import AlreadyExistsError, DeadlineError, HypervisorError, KataError
from common.linux import cgroup
from common.processes import wait_exit
from common.services.vmm import PresentDevice
from procs.vmm_manager.drivers.qemu import virtiofsd
from procs.vmm_manager.drivers.qemu.cmdline import HOTPLUG_BUSES, pci_path
from procs.vmm_manager.drivers.qemu.console import Console, read_tail
from procs.vmm_manager.record import DeviceRecord

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from common.config import QemuConfig
    from common.services.vmm import AddDevice, Vm
    from common.workers import Workers
    from procs.vmm_manager.drivers.qemu.qmp import Qmp
    from procs.vmm_manager.record import VmRecord

_PERIPHERALS = "/machine/peripheral"
_PREFIX = "share-"
_COMMON_END_S = 1.0


class QemuMachine:
    """A running QEMU. Owns its monitor; the record is shared with the registry, which saves nothing itself."""

    def __init__(
        self,
        record: VmRecord,
        vm: Vm,
        config: QemuConfig,
        qmp: Qmp,
        workers: Workers,
        pidfd: int,
        child: subprocess.Popen[bytes] | None,
        on_removed: Callable[[str], None],
    ) -> None:
        self.vm = vm
        self._record = record
        self._config = config
        self._qmp = qmp
        self._workers = workers
        self._child = child
        self._on_removed = on_removed
        self._directory = paths.vm_dir(record.sandbox_id)
        self._console = Console(Path(vm.console_log), qmp)
        self._pidfd = pidfd
        self._has_ended = asyncio.Event()

    def follow(self) -> None:
        """Begin to hear QEMU's events and to wait for its end."""
        self._workers.spawn(self._qmp.follow(self._handle_event))
        self._workers.spawn(self._watch_end())

    async def wait_end(self) -> None:
        """Wait until QEMU is gone."""
        await self._has_ended.wait()

    async def runstate(self) -> str:
        """Return QEMU's run state (``RunState`` in qapi/run-state.json)."""
        return str((await self._qmp.execute("query-status"))["status"])

    async def console_tail(self) -> str:
        """Return the last of what the guest printed."""
        return await self._console.tail()

    def log_tail(self) -> str:
        """Return the last of what QEMU printed."""
        return read_tail(Path(self._directory) / "qemu.log")

    async def add_device(self, request: AddDevice) -> str:
        """Serve the directory and plug it; undone in reverse if a step fails.

        Raises:
            AlreadyExistsError: the bus is taken; QEMU itself would not notice.
            HypervisorError: QEMU refused.
        """
        await self._require_free(request.bus)
        device_id = self._next_id()
        async with AsyncExitStack() as undo:
            daemon = virtiofsd.start(
                self._config,
                source=request.spec.source,
                name=device_id,
                directory=self._directory,
                cgroup=cgroup.path(self._record.sandbox_id),
            )
            undo.callback(_end_child, daemon)
            await self._qmp.execute(
                "chardev-add",
                id=device_id,
                backend={
                    "type": "socket",
                    "data": {"addr": {"type": "unix", "data": {"path": device_id}}, "server": False},
                },
            )
            undo.push_async_callback(self._remove_chardev, device_id)
            await self._plug(device_id, request)
            undo.pop_all()
        self._record.devices[device_id] = DeviceRecord(
            bus=request.bus, pci_path=pci_path(request.bus), spec=request.spec
        )
        self._record.save()
        self._workers.spawn(self._watch_daemon(device_id, daemon))
        return device_id

    async def remove_device(self, hypervisor_id: str) -> None:
        """Ask the guest to let a device go; a second request while one is pending is accepted too."""
        try:
            await self._qmp.execute("device_del", id=hypervisor_id)
        except HypervisorError as err:
            if "already in the process of unplug" not in err.message:
                raise

    async def present_devices(self) -> list[PresentDevice]:
        """Return what QEMU has on the hotplug buses."""
        listed = await self._qmp.execute("qom-list", path=_PERIPHERALS)
        ids = [str(item["name"]) for item in listed if str(item["name"]).startswith(_PREFIX)]
        return [PresentDevice(hypervisor_id=device_id, bus=await self._bus_of(device_id)) for device_id in ids]

    async def reconcile(self) -> None:
        """Notice what was removed while nobody listened."""
        present = {device.hypervisor_id for device in await self.present_devices()}
        for device_id in set(self._record.devices) - present:
            await self._forget(device_id)

    def kill(self) -> None:
        """End QEMU at once."""
        with suppress(OSError):  # it has ended
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def _require_free(self, bus: str) -> None:
        if bus not in HOTPLUG_BUSES:
            raise HypervisorError(f"QEMU has no hotplug bus {bus!r}", hint=f"it has {', '.join(HOTPLUG_BUSES)}")
        for device in await self.present_devices():
            if device.bus == bus:
                raise AlreadyExistsError(f"hotplug bus {bus} holds {device.hypervisor_id}")

    def _next_id(self) -> str:
        number = self._record.next_device
        self._record.next_device = number + 1
        self._record.save()
        return f"{_PREFIX}{number}"

    async def _plug(self, device_id: str, request: AddDevice) -> None:
        try:
            await self._qmp.execute(
                "device_add",
                driver="vhost-user-fs-pci",
                id=device_id,
                bus=request.bus,
                chardev=device_id,
                tag=request.spec.tag,
            )
        except HypervisorError as err:
            said = read_tail(Path(self._directory) / virtiofsd.LOG).strip()
            raise HypervisorError(f"{err.message}; virtiofsd said: {said or 'nothing'}") from err
        except DeadlineError:
            if device_id not in {device.hypervisor_id for device in await self.present_devices()}:
                raise

    async def _bus_of(self, device_id: str) -> str:
        path = await self._qmp.execute("qom-get", path=f"{_PERIPHERALS}/{device_id}", property="parent_bus")
        return str(path).rsplit("/", 1)[-1]

    async def _remove_chardev(self, device_id: str) -> None:
        try:
            await self._qmp.execute("chardev-remove", id=device_id)
        except KataError as err:
            log.get().warning("a removed device's chardev stays", device=device_id, error=str(err))

    async def _forget(self, device_id: str) -> None:
        del self._record.devices[device_id]
        self._record.save()
        await self._remove_chardev(device_id)
        (Path(self._directory) / device_id).unlink(missing_ok=True)
        self._on_removed(device_id)

    async def _handle_event(self, name: str, data: dict[str, Any]) -> None:
        if name == "DEVICE_DELETED" and data.get("device") in self._record.devices:
            await self._forget(data["device"])
        elif name in {"SHUTDOWN", "GUEST_PANICKED"}:
            log.get().warning("guest ended", sandbox=self.vm.sandbox_id, cause=data.get("reason", name))
            await self._console.tail()
            self.kill()

    async def _watch_daemon(self, device_id: str, daemon: subprocess.Popen[bytes]) -> None:
        """Reap a virtiofsd, and say so if its device is still in use."""
        await wait_exit(os.pidfd_open(daemon.pid))
        daemon.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(_COMMON_END_S):  # both are killed when a sandbox ends
                await self._has_ended.wait()
        if device_id in self._record.devices and not self._has_ended.is_set():
            said = read_tail(Path(self._directory) / virtiofsd.LOG)
            log.get().error("virtiofsd died", sandbox=self.vm.sandbox_id, device=device_id, said=said)

    async def _watch_end(self) -> None:
        await wait_exit(os.dup(self._pidfd))
        os.close(self._pidfd)
        if self._child is not None:
            self._child.wait()
        await self._qmp.close()
        self._has_ended.set()


def _end_child(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
