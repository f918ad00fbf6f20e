"""Attaching and detaching: what is decided about a device and the calls that carry it out.

A sandbox's lock orders its hotplug commands; it is held while the VM manager answers, never while a guest is awaited.
Each removal is one task (:meth:`DeviceManager._begin_removal`) that all who want the device gone join. After every
``await`` a device is looked up again, since its VM may have ended meanwhile.

Rows are a belief, the hypervisor's list is the truth. A sandbox is *unsettled* when they may differ: its rows come from
a predecessor, events may have been missed, or the outcome of a call is not known. It is settled by
:meth:`DeviceManager._settle` as soon as its VM manager answers, and in any case before it is given anything new.

An add bears its device's id as call id. So one that may still be running can be repeated: the VM manager has the second
call join the first, or gives it the same answer. Absence from the list would prove nothing while it runs.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from common import log
from common.bus.events import Received, Resync, Subscriber
from common.bus.wire import Empty
from common.errors import (
    DeadlineError,
    HypervisorError,
    InterruptedCallError,
    KataError,
    NotFoundError,
    UnavailableError,
    WireError,
)
from common.services import device as contract
from common.services import vmm
from common.services.device import Device, DeviceList
from procs.device_manager.states import Event, State
from procs.device_manager.table import Table, names

if TYPE_CHECKING:
    from common.bus.client import BusClient
    from common.bus.server import BusServer
    from common.workers import Workers
    from procs.device_manager.journal import Journal

CALL_TIMEOUT_S = 15.0
LEASE_S = 60.0
"""How long a plugged device may stay unconfirmed; a successor begins it anew."""
REMOVAL_TIMEOUT_S = 15.0
"""How long a guest may take to let a device go."""


class DeviceManager:
    """Decides about every device.

    Args:
        journal: what a predecessor left; its rows are taken over.
        bus: leads to the VM managers.
        workers: runs removals and leases.
        lease_s: see :data:`LEASE_S`.
        removal_timeout_s: see :data:`REMOVAL_TIMEOUT_S`.
    """

    def __init__(
        self,
        journal: Journal,
        bus: BusClient,
        workers: Workers,
        *,
        lease_s: float = LEASE_S,
        removal_timeout_s: float = REMOVAL_TIMEOUT_S,
    ) -> None:
        self._bus = bus
        self._workers = workers
        self._lease_s = lease_s
        self._removal_timeout_s = removal_timeout_s
        self._table = Table(journal, self._wake)
        self._gone: dict[str, asyncio.Event] = {}
        self._removals: dict[str, asyncio.Task[KataError | None]] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._unsettled = {device.sandbox_id for device in self._table}
        for device in self._table:
            if device.state == State.PLUGGED:
                workers.spawn(self._expire_lease(device.device_id))

    def register(self, server: BusServer) -> None:
        """Answer the device manager's verbs."""
        server.register(contract.ATTACH, self.attach)
        server.register(contract.CONFIRM, self.confirm)
        server.register(contract.ABORT, self.detach)
        server.register(contract.DETACH, self.detach)
        server.register(contract.LIST_DEVICES, self.list_devices)

    def gauges(self) -> dict[str, float]:
        """Return how many devices are in each state, as ``devices_<state>``."""
        return {f"devices_{state}": float(count) for state, count in self._table.counts().items()}

    async def attach(self, request: contract.Attach) -> Device:
        """Plug a device; it is undone unless it is confirmed within its lease.

        Raises:
            ExhaustedError: every slot that it fits is taken.
            KataError: what the VM manager answered; what may be left of the device is undone.
        """
        service = vmm.service_name(request.hypervisor)
        async with self._lock(request.sandbox_id):
            if request.sandbox_id in self._unsettled:
                await self._settle(service, request.sandbox_id)
            device = self._table.usable_like(request)
            return device or await self._plug(self._table.begin(request))

    async def confirm(self, request: contract.DeviceRef) -> Device:
        """Note that the guest uses a device."""
        return self._table.apply(request.device_id, Event.CONFIRMED)

    async def detach(self, request: contract.DeviceRef) -> Empty:
        """Remove a device; returns when the hypervisor has confirmed it. One that is gone is fine.

        Raises:
            HypervisorError: the guest did not let go in time; the device is quarantined.
            StateError: it has been quarantined before.
            KataError: the VM manager is away; the removal goes on when it is back.
        """
        if self._table.get(request.device_id) is not None:
            failure = await asyncio.shield(self._begin_removal(request.device_id))
            if failure is not None:
                raise failure
        return Empty()

    async def list_devices(self, request: contract.ListDevices) -> DeviceList:
        """Return the devices of one sandbox, or all."""
        return DeviceList(devices=tuple(self._table.of(request.sandbox_id) if request.sandbox_id else self._table))

    async def follow(self, hypervisors: tuple[str, ...]) -> None:
        """Hear what the VM managers publish, for ever."""
        async with Subscriber(vmm.service_name(hypervisor) for hypervisor in hypervisors) as news:
            async for item in news:
                if isinstance(item, Resync):
                    self._workers.spawn(self._reconcile(item.service))
                else:
                    self._hear(item)

    def _hear(self, item: Received) -> None:
        try:
            exited = item.body_of(vmm.VM_EXITED)
            removed = item.body_of(vmm.DEVICE_REMOVED)
        except WireError as err:
            log.get().warning("an event is not readable: comparing", service=item.service, error=str(err))
            self._workers.spawn(self._reconcile(item.service))
            return
        if exited is not None:
            self._release(exited.sandbox_id)
        if removed is not None:
            for device in self._table.of(removed.sandbox_id):
                if device.hypervisor_id == removed.hypervisor_id:
                    self._note_removed(device)

    async def _plug(self, device: Device) -> Device:
        """Plug a new device; the sandbox's lock is held."""
        try:
            return await self._add(device)
        except UnavailableError:
            self._table.end(device.device_id, Event.FAILED)  # nothing was asked
            raise
        except KataError:
            await self._try_settle(vmm.service_name(device.hypervisor), device.sandbox_id)
            settled = self._table.get(device.device_id)
            if settled is None or settled.state != State.PLUGGED:
                raise
            return settled

    async def _add(self, device: Device) -> Device:
        """Have the VM manager plug a device, or say what became of an earlier call to do so."""
        added = await self._bus.call(
            vmm.service_name(device.hypervisor),
            vmm.ADD_DEVICE,
            vmm.AddDevice(
                sandbox_id=device.sandbox_id,
                spec=device.spec,
                bus=device.bus,
                slot=device.slot,
                serial=device.serial,
            ),
            timeout_s=CALL_TIMEOUT_S,
            call_id=device.device_id,
        )
        plugged = self._table.apply(
            device.device_id, Event.ADDED, hypervisor_id=added.hypervisor_id, pci_path=added.pci_path
        )
        self._workers.spawn(self._expire_lease(device.device_id))
        return plugged

    async def _expire_lease(self, device_id: str) -> None:
        await asyncio.sleep(self._lease_s)
        device = self._table.get(device_id)
        if device is not None and device.state == State.PLUGGED:
            log.get().warning("lease ran out: device removed", **names(device))
            self._begin_removal(device_id)

    def _begin_removal(self, device_id: str) -> asyncio.Task[KataError | None]:
        """Have a task remove a device, unless one does; its result is why the device stays."""
        if device_id not in self._removals:
            task = self._workers.spawn(self._remove(device_id))
            task.add_done_callback(lambda _: self._removals.pop(device_id))
            self._removals[device_id] = task
        return self._removals[device_id]

    async def _remove(self, device_id: str) -> KataError | None:
        """Ask for the removal of a device and wait for its confirmation, holding no lock meanwhile."""
        gone = self._gone[device_id] = asyncio.Event()
        try:
            await self._ask_for_removal(device_id)
            async with asyncio.timeout(self._removal_timeout_s):
                await gone.wait()
        except NotFoundError:
            return None  # it went before it was asked to
        except KataError as err:
            log.get().warning("device not removed", device=device_id, error=str(err))
            return err
        except TimeoutError:
            return await self._give_up(device_id)
        finally:
            del self._gone[device_id]
        return None

    async def _ask_for_removal(self, device_id: str) -> None:
        """Take the step to ``detaching`` and tell the VM manager.

        Raises:
            NotFoundError: the device is gone.
            KataError: the VM manager is away or the device may not be removed.
        """
        device = self._table.known(device_id)
        service = vmm.service_name(device.hypervisor)
        async with self._lock(device.sandbox_id):
            if self._table.known(device_id).state == State.ATTACHING:
                await self._settle(service, device.sandbox_id)
            device = self._table.apply(device_id, Event.DETACH)
            request = vmm.RemoveDevice(sandbox_id=device.sandbox_id, hypervisor_id=device.hypervisor_id)
            try:
                await self._bus.call(service, vmm.REMOVE_DEVICE, request, timeout_s=CALL_TIMEOUT_S)
            except NotFoundError:
                self._table.end(device_id, Event.REMOVED)
            except (UnavailableError, InterruptedCallError):
                raise
            except KataError as err:
                # It may have taken effect all the same: wait as if it had been accepted.
                log.get().warning("removal refused", **names(device), error=str(err))

    async def _give_up(self, device_id: str) -> KataError | None:
        """Quarantine a device, unless the hypervisor says that it is gone."""
        device = self._table.get(device_id)
        if device is None:
            return None
        async with self._lock(device.sandbox_id):
            await self._try_settle(vmm.service_name(device.hypervisor), device.sandbox_id)
            if self._table.get(device_id) is None:
                return None
            self._table.apply(device_id, Event.GAVE_UP)
        log.get().error("device quarantined: the guest did not let go", **names(device))
        return HypervisorError(
            f"the guest did not let {device.hypervisor_id} go within {self._removal_timeout_s:g} s; "
            f"it is quarantined and keeps slot {device.slot} of {device.bus}",
            hint="it is freed by a late confirmation or the end of the sandbox",
        )

    async def _reconcile(self, service: str) -> None:
        """Settle every sandbox of a VM manager, none waiting for another.

        One that is not settled now is so before its next command, or when its VM manager has come back.
        """
        held = {d.sandbox_id for d in self._table if vmm.service_name(d.hypervisor) == service}
        self._unsettled |= held
        try:
            vms = await self._bus.call(service, vmm.LIST_VMS, Empty(), timeout_s=CALL_TIMEOUT_S)
        except KataError as err:
            log.get().warning("devices not compared", service=service, error=str(err))
            return
        running = {vm.sandbox_id for vm in vms.vms}
        for sandbox_id in held:
            if sandbox_id in running:
                self._workers.spawn(self._settle_in_turn(service, sandbox_id))
            else:
                self._release(sandbox_id)

    async def _settle_in_turn(self, service: str, sandbox_id: str) -> None:
        async with self._lock(sandbox_id):
            await self._try_settle(service, sandbox_id)

    async def _try_settle(self, service: str, sandbox_id: str) -> None:
        """Settle a sandbox now or note that it is to be settled later."""
        self._unsettled.add(sandbox_id)
        try:
            await self._settle(service, sandbox_id)
        except KataError as err:
            log.get().warning("sandbox not settled", sandbox=sandbox_id, error=str(err))

    async def _settle(self, service: str, sandbox_id: str) -> None:
        """Make a sandbox's rows agree with the hypervisor's list; its lock is held.

        Raises:
            KataError: the VM manager does not tell; the sandbox stays unsettled.
        """
        for device in self._table.of(sandbox_id):
            if device.state == State.ATTACHING:
                await self._finish_add(device)
        for device, present_id in await self._compared(service, sandbox_id):
            if device.state == State.ATTACHING and present_id:  # refused, yet it took effect
                self._table.apply(device.device_id, Event.DETACH, hypervisor_id=present_id)
                self._begin_removal(device.device_id)
            elif device.state == State.ATTACHING:
                self._table.apply(device.device_id, Event.FAILED)
            elif not present_id:
                self._note_removed(device)
            elif device.state == State.DETACHING:
                self._begin_removal(device.device_id)
        self._unsettled.discard(sandbox_id)

    async def _finish_add(self, device: Device) -> None:
        """Learn how an add ended.

        Raises:
            KataError: the VM manager does not tell; the add may still be running.
        """
        try:
            await self._add(device)
        except (UnavailableError, InterruptedCallError, DeadlineError):
            raise
        except KataError as err:
            log.get().info("add was refused", **names(device), error=str(err))

    async def _compared(self, service: str, sandbox_id: str) -> list[tuple[Device, str]]:
        """Return a sandbox's devices, each with what the hypervisor calls the one with its serial, or nothing."""
        reference = vmm.SandboxRef(sandbox_id=sandbox_id)
        try:
            listed = await self._bus.call(service, vmm.LIST_PRESENT_DEVICES, reference, timeout_s=CALL_TIMEOUT_S)
        except NotFoundError:
            self._release(sandbox_id)
            return []
        present_ids = {present.serial: present.hypervisor_id for present in listed.devices}
        return [(device, present_ids.get(device.serial, "")) for device in self._table.of(sandbox_id)]

    def _note_removed(self, device: Device) -> None:
        if device.state not in {State.DETACHING, State.QUARANTINED}:
            log.get().error("device lost: removed without our asking", **names(device))
        self._table.apply(device.device_id, Event.REMOVED)

    def _release(self, sandbox_id: str) -> None:
        """Free everything of a sandbox whose VM has ended."""
        for device in self._table.of(sandbox_id):
            self._table.apply(device.device_id, Event.VM_ENDED)
        self._unsettled.discard(sandbox_id)

    def _lock(self, sandbox_id: str) -> asyncio.Lock:
        """Return a sandbox's lock, which lives as long as somebody holds or awaits it."""
        return self._locks.setdefault(sandbox_id, asyncio.Lock())

    def _wake(self, device_id: str) -> None:
        if device_id in self._gone:
            self._gone[device_id].set()
