"""The virtio-fs devices of one VM: each a virtiofsd, a chardev that leads to it and a device on a hotplug bus.

Ids come from a counter in the VM's record that only grows: QEMU makes the client choose, and an id that was used once
may still be in QEMU's hands. What is to be done is in the record before it is done, and QEMU's own list is the truth
about what was: a manager that dies in between leaves nothing that the next one does not find. A device is gone when
QEMU says ``DEVICE_DELETED`` with its id (an event with a path only is about its inner half), or when QEMU's list no
longer has it after we were away.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from common import log, paths
from common.errors import (
    AlreadyExistsError,
    DeadlineError,
    HypervisorError,
    KataError,
    NotFoundError,
    UnsupportedError,
    UsageError,
)
from common.linux import cgroup
from common.services.vmm import AddedDevice, PresentDevice, ShareSpec
from procs.vmm_manager.drivers.qemu import virtiofsd
from procs.vmm_manager.drivers.qemu.cmdline import HOTPLUG_BUSES, pci_path
from procs.vmm_manager.drivers.qemu.spawn import Process
from procs.vmm_manager.record import DeviceRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.config import QemuConfig
    from common.services.vmm import AddDevice
    from common.workers import Workers
    from procs.vmm_manager.drivers.qemu.qmp import Qmp
    from procs.vmm_manager.record import VmRecord

_PERIPHERALS = "/machine/peripheral"
_PREFIX = "share-"
_COMMON_END_S = 1.0


class Shares:
    """Plugs and unplugs; owns the ``devices`` of the record."""

    def __init__(
        self,
        record: VmRecord,
        config: QemuConfig,
        qmp: Qmp,
        qemu: Process,
        workers: Workers,
        on_removed: Callable[[str], None],
    ) -> None:
        self._record = record
        self._config = config
        self._qmp = qmp
        self._qemu = qemu
        self._workers = workers
        self._on_removed = on_removed
        self._directory = paths.vm_dir(record.sandbox_id)

    async def add(self, request: AddDevice) -> AddedDevice:
        """Serve the directory and plug it; undone in reverse if a step fails.

        Raises:
            AlreadyExistsError: the slot is taken; QEMU itself would not notice.
            UsageError: there is no such slot.
            UnsupportedError: it is no share.
            HypervisorError: QEMU or virtiofsd refused.
        """
        spec = request.spec
        if not isinstance(spec, ShareSpec):
            raise UnsupportedError(f"{spec.source} cannot be plugged into a QEMU VM: only directories can")
        await self._require_free(request.bus, request.slot)
        device_id = self._enter(request)
        async with AsyncExitStack() as undo:
            undo.callback(self._drop, device_id)
            daemon = self._serve(device_id, spec)
            undo.push_async_callback(daemon.end)
            try:
                await self._add_chardev(device_id)
                undo.push_async_callback(self._remove_chardev, device_id)
                await self._plug(device_id, request.bus, spec)
            except HypervisorError as err:
                said = daemon.output.tail().strip()
                raise HypervisorError(f"{err.message}; virtiofsd said: {said or 'nothing'}") from err
            except asyncio.CancelledError:
                undo.pop_all()  # the manager stops: the next one asks QEMU how far this came
                raise
            undo.pop_all()
        self._workers.spawn(self._watch(device_id, daemon))
        return AddedDevice(hypervisor_id=device_id, pci_path=pci_path(request.bus))

    async def remove(self, device_id: str) -> None:
        """Ask the guest to let a device go; a second request while one is pending is accepted too."""
        try:
            await self._qmp.execute("device_del", id=device_id)
        except HypervisorError as err:
            if "already in the process of unplug" not in err.message:
                raise

    async def present(self) -> list[PresentDevice]:
        """Return what QEMU has on the hotplug buses."""
        listed = await self._qmp.execute("qom-list", path=_PERIPHERALS)
        devices = []
        for device_id in (str(item["name"]) for item in listed if str(item["name"]).startswith(_PREFIX)):
            with suppress(NotFoundError):  # it has gone meanwhile
                devices.append(await self._describe(device_id))
        return devices

    async def reconcile(self) -> None:
        """Notice what was removed while nobody listened."""
        present = {device.hypervisor_id for device in await self.present()}
        for device_id in set(self._record.devices) - present:
            await self.forget(device_id)

    def adopt(self) -> None:
        """Watch the daemons that an earlier manager started."""
        for device_id, device in self._record.devices.items():
            if device.daemon is None:
                continue
            daemon = Process.find(device.daemon, directory=self._directory, log=_log_name(device_id))
            if daemon is None:
                self._tell_death(device_id, "nothing that is still known")
            else:
                self._workers.spawn(self._watch(device_id, daemon))

    async def forget(self, device_id: str) -> None:
        """Free what a device had that QEMU has deleted; virtiofsd ends when its connection does."""
        if not device_id.startswith(_PREFIX):
            return
        self._drop(device_id)
        await self._remove_chardev(device_id)
        self._on_removed(device_id)

    async def _require_free(self, bus: str, slot: int) -> None:
        slots = {port.name: port.slots for port in HOTPLUG_BUSES}
        if not 0 <= slot < slots.get(bus, 0):
            has = ", ".join(f"{name} with {count}" for name, count in slots.items())
            raise UsageError(f"QEMU has no slot {slot} on a hotplug bus {bus!r}", hint=f"it has {has}")
        holders = {(device.bus, device.slot): device.hypervisor_id for device in await self.present()}
        holders |= {(device.bus, device.slot): device_id for device_id, device in self._record.devices.items()}
        if (bus, slot) in holders:
            raise AlreadyExistsError(f"slot {slot} of hotplug bus {bus} holds {holders[bus, slot]}")

    def _enter(self, request: AddDevice) -> str:
        device_id = f"{_PREFIX}{self._record.next_device}"
        self._record.next_device += 1
        self._record.devices[device_id] = DeviceRecord(
            bus=request.bus, slot=request.slot, serial=request.serial, spec=request.spec
        )
        self._record.save()
        return device_id

    def _drop(self, device_id: str) -> None:
        self._record.devices.pop(device_id, None)
        for name in (device_id, _log_name(device_id)):
            (Path(self._directory) / name).unlink(missing_ok=True)
        if (
            self._qemu.is_running
        ):  # else the record goes with the directory, and whoever removes that expects no new file
            with suppress(FileNotFoundError):
                self._record.save()

    def _serve(self, device_id: str, spec: ShareSpec) -> Process:
        daemon = virtiofsd.start(
            self._config,
            source=spec.source,
            name=device_id,
            directory=self._directory,
            cgroup=cgroup.path(self._record.sandbox_id),
            log=_log_name(device_id),
        )
        self._record.devices[device_id].daemon = daemon.identity
        self._record.save()
        return daemon

    async def _add_chardev(self, device_id: str) -> None:
        address = {"type": "unix", "data": {"path": device_id}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        await self._qmp.execute("chardev-add", id=device_id, backend=backend)

    async def _plug(self, device_id: str, bus: str, spec: ShareSpec) -> None:
        arguments = {"id": device_id, "bus": bus, "chardev": device_id, "tag": spec.tag}
        try:
            await self._qmp.execute("device_add", driver="vhost-user-fs-pci", **arguments)
        except DeadlineError:
            if device_id not in {device.hypervisor_id for device in await self.present()}:
                raise

    async def _describe(self, device_id: str) -> PresentDevice:
        """Return what QEMU has; the serial of a share, which has no use for one, is in the record alone."""
        path = await self._qmp.execute("qom-get", path=f"{_PERIPHERALS}/{device_id}", property="parent_bus")
        record = self._record.devices.get(device_id)
        return PresentDevice(
            hypervisor_id=device_id,
            bus=str(path).rsplit("/", 1)[-1],
            slot=0,
            serial=record.serial if record else "",
        )

    async def _remove_chardev(self, device_id: str) -> None:
        try:
            await self._qmp.execute("chardev-remove", id=device_id)
        except KataError as err:
            log.get().warning("a removed device's chardev stays", device=device_id, error=str(err))

    async def _watch(self, device_id: str, daemon: Process) -> None:
        """Wait for the end of a virtiofsd, and say so if its device is still in use."""
        await daemon.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(_COMMON_END_S):  # a sandbox's processes are killed together
                await self._qemu.wait()
        if device_id in self._record.devices and self._qemu.is_running:
            self._tell_death(device_id, daemon.output.tail())

    def _tell_death(self, device_id: str, said: str) -> None:
        log.get().error("virtiofsd died", sandbox=self._record.sandbox_id, device=device_id, said=said)


def _log_name(device_id: str) -> str:
    return f"{device_id}.log"
