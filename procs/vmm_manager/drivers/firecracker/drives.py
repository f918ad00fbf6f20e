"""The disks that come and go while a VM runs: put in, taken out, accounted for.

Ids come from a counter in the VM's record that only grows. What is to be done is in the record before it is done;
Firecracker's own configuration (``GET /vm/config``) says what was done, since a disk's file in the jail is named as the
disk. Before anything new is done, and before anybody is told what is there, the two are made the same: what a manager
before us asked for may be carried out after its death, even after we have looked for the first time.

A removal is over when Firecracker answers: it has closed the file. The guest must have let go *before* (``places``).

One lock orders what we do to a VM's disks; no guest is awaited.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, ExitStack, suppress
from typing import TYPE_CHECKING

from common import log
from common.errors import DeadlineError, KataError, NotFoundError
from common.services.vmm import AddedDevice, BlockSpec, PresentDevice
from procs.vmm_manager.drivers.firecracker.places import require

if TYPE_CHECKING:
    from collections.abc import Callable

    from common.services.vmm import AddDevice
    from procs.vmm_manager.drivers.firecracker.api import Api
    from procs.vmm_manager.drivers.firecracker.jail import Jail
    from procs.vmm_manager.drivers.firecracker.places import Places
    from procs.vmm_manager.record import VmRecord

_PREFIX = "disk_"


class Drives:
    """Puts in and takes out; owns the ``devices`` of the record."""

    def __init__(
        self, record: VmRecord, places: Places, api: Api, jail: Jail, on_removed: Callable[[str], None]
    ) -> None:
        self._record = record
        self._places = places
        self._api = api
        self._jail = jail
        self._on_removed = on_removed
        self._lock = asyncio.Lock()

    async def find(self, serial: str) -> AddedDevice | None:
        """Return the disk of an attach, if Firecracker has it."""
        async with self._lock:
            if self._record.name_of(serial) is None:
                return None
            await self._settle()
            device_id = self._record.name_of(serial)
            return self._added(device_id) if device_id else None

    async def add(self, request: AddDevice) -> AddedDevice:
        """Put a disk in; undone if a step fails.

        Raises:
            AlreadyExistsError: the slot is taken.
            UsageError: there is no such slot, or the source is no disk.
            HypervisorError: Firecracker refused.
        """
        require(self._places, request.bus, request.slot)
        async with self._lock:
            await self._settle()
            device_id = self._record.enter(request, _PREFIX)
            async with AsyncExitStack() as undo:
                undo.push_async_callback(self._undo, device_id)
                try:
                    await self._put_in(device_id)
                except asyncio.CancelledError:
                    undo.pop_all()  # the manager stops: the next one asks how far this came
                    raise
                undo.pop_all()
            return self._added(device_id)

    async def remove(self, device_id: str) -> None:
        """Take a disk out that the guest has let go.

        Raises:
            NotFoundError: there is none of this id.
            HypervisorError: Firecracker refused.
        """
        async with self._lock:
            if device_id not in self._record.devices:
                raise NotFoundError(f"Firecracker has no disk {device_id}")
            await self._clear(device_id)
            self._on_removed(device_id)

    async def present(self) -> list[PresentDevice]:
        """Return the disks that Firecracker has."""
        async with self._lock:
            await self._settle()
        return [
            PresentDevice(
                hypervisor_id=device_id,
                bus=device.bus,
                slot=device.slot,
                serial=device.serial,
                guest_path=device.place,
                storage_options=device.storage_options,
                is_guest_first=True,
                spec=device.spec,
            )
            for device_id, device in self._record.devices.items()
        ]

    async def _settle(self) -> None:
        """Forget, and tell, what Firecracker does not have; take out what it has and nobody knows."""
        has = await self._has()
        for device_id in has.keys() - self._record.devices.keys():
            log.get().warning("a disk that nobody knows is taken out", device=device_id)
            await self._places.take_out(self._api, has[device_id])
        for device_id in self._record.devices.keys() - has.keys():
            self._forget(device_id)
            self._on_removed(device_id)

    async def _put_in(self, device_id: str) -> None:
        """Have Firecracker take a disk."""
        device = self._record.devices[device_id]
        device.place = self._places.place(device, [other.place for other in self._record.devices.values()])
        assert isinstance(device.spec, BlockSpec), "what Capabilities say"
        with ExitStack() as stack:
            lent = await asyncio.to_thread(stack.enter_context, self._jail.lent(device_id, device.spec))
            device.storage_options = self._places.options(lent)
            self._record.save()
            try:
                await self._places.put_in(self._api, device_id, device)
            except DeadlineError:
                if device_id not in await self._has():
                    raise

    async def _undo(self, device_id: str) -> None:
        try:
            await self._clear(device_id)
        except KataError as err:
            log.get().warning("a refused disk is taken out later", device=device_id, error=str(err))
            self._forget(device_id)  # nobody knows it any more, and :meth:`_settle` takes such out

    async def _clear(self, device_id: str) -> None:
        """Take a disk out if it is in, then forget it."""
        drive_id = (await self._has()).get(device_id)
        if drive_id is not None:
            try:
                await self._places.take_out(self._api, drive_id)
            except KataError:
                if device_id in await self._has():
                    raise
        self._forget(device_id)

    def _forget(self, device_id: str) -> None:
        del self._record.devices[device_id]
        with suppress(FileNotFoundError):  # the sandbox was cleaned up
            self._record.save()

    async def _has(self) -> dict[str, str]:
        """Return the disks that Firecracker has, by their files' names, and in which drive each is."""
        drives = (await self._api.get("/vm/config")).get("drives", [])
        named = {str(drive.get("path_on_host")): str(drive.get("drive_id")) for drive in drives}
        return {name: drive_id for name, drive_id in named.items() if name.startswith(_PREFIX)}

    def _added(self, device_id: str) -> AddedDevice:
        device = self._record.devices[device_id]
        return AddedDevice(
            hypervisor_id=device_id,
            guest_path=device.place,
            storage_options=device.storage_options,
            is_guest_first=True,
        )
