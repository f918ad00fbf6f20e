"""The devices of a VM beside those that it is made with: put in, taken out, accounted for (``kinds``: which there are).

Ids come from a counter in the VM's record that only grows. What is to be done is in the record before it is done;
Firecracker's own configuration (``GET /vm/config``) says what was done, by names that are ours. Before anything new is
done, and before anybody is told what is there, the two are made the same: what a manager before us asked for may be
carried out after its death, even after we have looked for the first time.

A removal is over when Firecracker answers: it has closed what the device stood on. The guest must have let go *before*
(``places``).

One lock orders what we do to a VM's devices; no guest is awaited.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING

from common import log
from common.errors import DeadlineError, KataError, NotFoundError, UnsupportedError
from common.services.vmm import AddedDevice, PresentDevice
from procs.vmm_manager.drivers.firecracker.places import require

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from common.services.vmm import AddDevice
    from procs.vmm_manager.drivers.firecracker.api import Api
    from procs.vmm_manager.drivers.firecracker.kinds import Kind
    from procs.vmm_manager.drivers.firecracker.places import Places
    from procs.vmm_manager.record import VmRecord


class Devices:
    """Puts in and takes out; owns the ``devices`` of the record.

    Args:
        record: of the VM.
        places: where devices go.
        kinds: of device, by the type that describes one.
        api: of this VM.
        on_removed: called with the id of each device that is gone.
    """

    def __init__(
        self,
        record: VmRecord,
        places: Places,
        kinds: Mapping[type, Kind],
        api: Api,
        on_removed: Callable[[str], None],
    ) -> None:
        self._record = record
        self._places = places
        self._kinds = kinds
        self._api = api
        self._on_removed = on_removed
        self._lock = asyncio.Lock()

    async def find(self, serial: str) -> AddedDevice | None:
        """Return the device of an attach, if Firecracker has it."""
        async with self._lock:
            if self._record.name_of(serial) is None:
                return None
            await self._settle()
            device_id = self._record.name_of(serial)
            return self._added(device_id) if device_id else None

    async def add(self, request: AddDevice) -> AddedDevice:
        """Put a device in; undone if a step fails.

        Raises:
            AlreadyExistsError: the slot is taken.
            UsageError: there is no such slot, or the source is not what it must be.
            NotFoundError: there is no such source.
            UnsupportedError: a device of its kind comes too late.
            HypervisorError: Firecracker refused.
        """
        require(self._places, request.bus, request.slot)
        async with self._lock:
            await self._settle()
            device_id = self._record.enter(request, self._kinds[type(request.spec)].prefix)
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
        """Take a device out that the guest has let go.

        Raises:
            NotFoundError: there is none of this id.
            UnsupportedError: a device of its kind stays as long as the VM.
            HypervisorError: Firecracker refused.
        """
        async with self._lock:
            if device_id not in self._record.devices:
                raise NotFoundError(f"Firecracker has no device {device_id}")
            if why := self._kind(device_id).kept:
                raise UnsupportedError(f"{device_id} cannot be removed: {why}")
            await self._clear(device_id)
            self._on_removed(device_id)

    async def present(self) -> list[PresentDevice]:
        """Return the devices that Firecracker has."""
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
                is_guest_first=self._kind(device_id).is_guest_first,
                spec=device.spec,
            )
            for device_id, device in self._record.devices.items()
        ]

    async def _settle(self) -> None:
        """Forget, and tell, what Firecracker does not have; take out what it has and nobody knows; finish the rest."""
        has = await self._has()
        for device_id in has.keys() - self._record.devices.keys():
            kind, firecracker_id = has[device_id]
            if not kind.kept:
                log.get().warning("a device that nobody knows is taken out", device=device_id)
                await kind.take_out(firecracker_id)
        for device_id in self._record.devices.keys() - has.keys():
            await self._forget(device_id)
            self._on_removed(device_id)
        for device_id, device in self._record.devices.items():
            try:
                await self._kind(device_id).finish(device)
            except OSError as err:
                log.get().error("a device is not where it is wanted", device=device_id, error=str(err))

    async def _put_in(self, device_id: str) -> None:
        """Have Firecracker take a device."""
        device = self._record.devices[device_id]
        device.place = self._places.place(device, [other.place for other in self._record.devices.values()])
        try:
            await self._kind(device_id).put_in(device_id, device, self._record.save)
        except DeadlineError:
            if device_id not in await self._has():
                raise
            await self._kind(device_id).finish(device)

    async def _undo(self, device_id: str) -> None:
        try:
            await self._clear(device_id)
        except KataError as err:
            log.get().warning("a refused device is taken out later", device=device_id, error=str(err))
            await self._forget(device_id)  # nobody knows it any more, and :meth:`_settle` takes such out

    async def _clear(self, device_id: str) -> None:
        """Take a device out if it is in, then forget it."""
        kind, firecracker_id = (await self._has()).get(device_id, (None, ""))
        if kind is not None:
            try:
                await kind.take_out(firecracker_id)
            except KataError:
                if device_id in await self._has():
                    raise
        await self._forget(device_id)

    async def _forget(self, device_id: str) -> None:
        await self._kind(device_id).clear(self._record.devices[device_id])
        del self._record.devices[device_id]
        with suppress(FileNotFoundError):  # the sandbox was cleaned up
            self._record.save()

    async def _has(self) -> dict[str, tuple[Kind, str]]:
        """Return the devices that Firecracker has, by our names, each with its kind and Firecracker's id."""
        config = await self._api.get("/vm/config")
        return {
            name: (kind, firecracker_id)
            for kind in self._kinds.values()
            for name, firecracker_id in kind.listed(config).items()
        }

    def _added(self, device_id: str) -> AddedDevice:
        device = self._record.devices[device_id]
        return AddedDevice(
            hypervisor_id=device_id,
            guest_path=device.place,
            storage_options=device.storage_options,
            is_guest_first=self._kind(device_id).is_guest_first,
        )

    def _kind(self, device_id: str) -> Kind:
        return self._kinds[type(self._record.devices[device_id].spec)]
