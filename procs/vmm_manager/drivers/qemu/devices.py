"""The hot-plugged devices of one VM, of every kind: plugged, unplugged, accounted for.

A device stands on something on the host's side, its *backend*, which is another for each kind (``backends``); what is
the same for all is here.

Ids come from a counter in the VM's record that only grows: QEMU makes the client choose, and an id that was used once
may still be in QEMU's hands. What is to be done is in the record before it is done, and stays there until all of it is
undone; what QEMU lists, of devices and of backends, is the truth about what was done. So a manager that dies leaves
nothing that the next one does not find.

A device is gone when QEMU says ``DEVICE_DELETED`` with its id (an event with a path only is about its inner half), or
when QEMU's list no longer has it after we were away. Of a processor only the inner half's end is told, under emulation:
then the list is asked. A device is *told* gone when its backend is gone as well: only then is the host's file nobody's.

One lock orders what we do to a VM's devices; it is never held while a guest is awaited, only QEMU.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING

from common import log
from common.errors import DeadlineError, HypervisorError, KataError, NotFoundError, UnsupportedError
from common.services.vmm import AddedDevice, PresentDevice, extra_s
from procs.vmm_manager.drivers.qemu.qmp import COMMAND_TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from common.services.vmm import AddDevice
    from procs.vmm_manager.drivers.qemu.backends import Backend
    from procs.vmm_manager.drivers.qemu.qmp import Qmp
    from procs.vmm_manager.drivers.qemu.topology import Topology
    from procs.vmm_manager.drivers.spawn import Process
    from procs.vmm_manager.record import DeviceRecord, VmRecord

_PERIPHERALS = "/machine/peripheral"
_PROCESSOR = re.compile(rf"{_PERIPHERALS}/(cpu-\d+)/")


class Devices:
    """Plugs and unplugs; owns the ``devices`` of the record."""

    def __init__(
        self,
        record: VmRecord,
        topology: Topology,
        backends: Mapping[type, Backend],
        qmp: Qmp,
        qemu: Process,
        on_removed: Callable[[str], None],
    ) -> None:
        self._record = record
        self._topology = topology
        self._backends = backends
        self._qmp = qmp
        self._qemu = qemu
        self._on_removed = on_removed
        self._lock = asyncio.Lock()

    async def find(self, serial: str) -> AddedDevice | None:
        """Return the device of an attach, if QEMU has all of it."""
        device_id = self._record.name_of(serial)
        return self._added(device_id) if device_id and device_id in await self._plugged() else None

    async def add(self, request: AddDevice) -> AddedDevice:
        """Plug a device; undone in reverse if a step fails.

        Raises:
            AlreadyExistsError: the slot is taken; QEMU itself would not always notice.
            UsageError: there is no such slot, or the device's source is not what it must be.
            HypervisorError: QEMU refused.
        """
        place = self._topology.place(request.bus, request.slot)
        backend = self._backends[type(request.spec)]
        async with self._lock:
            device_id = self._record.enter(request, backend.prefix)
            async with AsyncExitStack() as undo:
                undo.push_async_callback(self._undo, device_id)
                try:
                    arguments = await backend.make(device_id, self._record.devices[device_id])
                    await self._plug(device_id, {**arguments, **place.arguments})
                except HypervisorError as err:
                    raise HypervisorError(err.message + backend.said(device_id), hint=err.hint) from err
                except asyncio.CancelledError:
                    undo.pop_all()  # the manager stops: the next one asks QEMU how far this came
                    raise
                undo.pop_all()
            return self._added(device_id)

    async def remove(self, device_id: str) -> None:
        """Ask the guest to let a device go; a second request while one is pending is accepted too.

        One that is gone, but whose backend stayed when it went, gets rid of that now.

        Raises:
            NotFoundError: QEMU has no such device.
            HypervisorError: QEMU has not, and keeps the backend.
            UnsupportedError: a device of its kind stays as long as the VM.
        """
        device = self._record.devices.get(device_id)
        if device is not None and (why := self._backends[type(device.spec)].kept):
            raise UnsupportedError(f"{device_id} cannot be removed: {why}")
        try:
            await self._qmp.execute("device_del", id=device_id)
        except NotFoundError:
            if device_id not in self._record.devices:
                raise
            await self.forget(device_id)
            if device_id in self._record.devices:
                raise HypervisorError(f"{device_id} is gone, but QEMU keeps what it stood on") from None
        except HypervisorError as err:
            if "already in the process of unplug" not in err.message:
                raise

    async def present(self) -> list[PresentDevice]:
        """Return the devices that QEMU has, or whose backend it still has."""
        left = await self._in_qemu()
        known = ((device_id, device) for device_id, device in self._record.devices.items() if device_id in left)
        return [
            PresentDevice(
                hypervisor_id=device_id,
                bus=device.bus,
                slot=device.slot,
                serial=device.serial,
                guest_path=self._guest_path(device),
                spec=device.spec,
            )
            for device_id, device in known
        ]

    async def reconcile(self) -> None:
        """Finish what was left half-done, and notice what was removed, while nobody listened."""
        async with self._lock:
            plugged = await self._plugged()
            for device_id in {*self._record.devices, *await self._made()} - plugged:
                await self._forget(device_id)

    def adopt(self) -> None:
        """Go on with the backends that an earlier manager made."""
        for device_id in self._record.devices:
            self._backend_of(device_id).adopt(device_id)

    async def note_deleted(self, device_id: str, path: str) -> None:
        """Take up the end of a device, or of a part of one.

        Args:
            device_id: the device; empty if it is a part.
            path: where QEMU had it.
        """
        if device_id:
            await self.forget(device_id)
        elif (whole := _PROCESSOR.match(path)) is not None and whole[1] not in await self._plugged():
            await self.forget(whole[1])

    async def forget(self, device_id: str) -> None:
        """Free what a device had that QEMU has deleted, and tell."""
        async with self._lock:
            if device_id in self._record.devices:
                await self._forget(device_id)

    async def _forget(self, device_id: str) -> None:
        try:
            await self._clear(device_id)
        except KataError as err:
            log.get().error("a removed device's backend stays", device=device_id, error=str(err))
        else:
            self._on_removed(device_id)

    def _added(self, device_id: str) -> AddedDevice:
        return AddedDevice(hypervisor_id=device_id, guest_path=self._guest_path(self._record.devices[device_id]))

    def _guest_path(self, device: DeviceRecord) -> str:
        return self._topology.place(device.bus, device.slot).guest_path

    async def _clear(self, device_id: str) -> None:
        """Undo all of a device but its ``device_add``; the record goes last."""
        await self._backend_of(device_id).unmake(device_id)
        self._record.devices.pop(device_id, None)
        if self._qemu.is_running:  # else the record goes with the directory, whose remover expects no new file
            with suppress(FileNotFoundError):
                self._record.save()

    async def _undo(self, device_id: str) -> None:
        try:
            await self._clear(device_id)
        except KataError as err:
            log.get().error("a refused device's backend stays", device=device_id, error=str(err))

    async def _plug(self, device_id: str, arguments: dict[str, object]) -> None:
        try:
            patience_s = COMMAND_TIMEOUT_S + extra_s(self._record.devices[device_id].spec)
            await self._qmp.execute_within(patience_s, "device_add", id=device_id, **arguments)
        except DeadlineError:
            if device_id not in await self._plugged():
                raise

    async def _in_qemu(self) -> set[str]:
        return await self._plugged() | await self._made()

    async def _plugged(self) -> set[str]:
        listed = await self._qmp.execute("qom-list", path=_PERIPHERALS)
        prefixes = tuple(backend.prefix for backend in self._backends.values())
        return {name for name in (str(item["name"]) for item in listed) if name.startswith(prefixes)}

    async def _made(self) -> set[str]:
        return {device_id for backend in self._backends.values() for device_id in await backend.made()}

    def _backend_of(self, device_id: str) -> Backend:
        return next(backend for backend in self._backends.values() if device_id.startswith(backend.prefix))
