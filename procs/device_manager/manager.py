"""Attaching and detaching: the decisions of the device manager and the calls that carry them out.

A device's bus is free when no row names it. Rows change through :meth:`DeviceManager._apply` only, which asks the
table, writes the journal and wakes whoever waits for the end of the device. What a predecessor left half done is
settled by :meth:`DeviceManager.reconcile`, which compares rows with the hypervisor's own list; it runs whenever events
may have been missed, and so also at start.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter, defaultdict
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import msgspec

from common import log
from common.bus.events import Received, Resync, Subscriber
from common.bus.wire import Empty
from common.errors import ExhaustedError, HypervisorError, KataError, NotFoundError, UnavailableError
from common.services import device as contract
from common.services import vmm
from common.services.device import Device, DeviceList
from procs.device_manager.states import Event, State, after

if TYPE_CHECKING:
    from common.bus.client import BusClient
    from common.bus.server import BusServer
    from common.workers import Workers
    from procs.device_manager.journal import Journal

CALL_TIMEOUT_S = 15.0
LEASE_S = 60.0
"""How long a plugged device may stay unconfirmed."""
REMOVAL_TIMEOUT_S = 15.0
"""How long a guest may take to let a device go."""


class DeviceManager:
    """Owns the table of devices."""

    def __init__(self, journal: Journal, bus: BusClient, workers: Workers) -> None:
        self._journal = journal
        self._bus = bus
        self._workers = workers
        self._devices = {device.device_id: device for device in journal.load()}
        self._ends: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._removing: set[str] = set()
        for device in self._devices.values():
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
        """Return how many devices are in each state."""
        counts = Counter(device.state for device in self._devices.values())
        return {f"devices_{state}": float(counts[state]) for state in State if state is not State.GONE}

    async def attach(self, request: contract.Attach) -> Device:
        """Plug a device; it is undone unless it is confirmed within its lease.

        Raises:
            ExhaustedError: every bus is taken.
            KataError: what the VM manager answered; nothing is left of the device.
        """
        async with self._lock(request.sandbox_id):
            known = self._same(request)
            if known is not None:
                return known
            device = Device(
                device_id=f"{time.time_ns():020d}-{secrets.token_hex(4)}",
                sandbox_id=request.sandbox_id,
                hypervisor=request.hypervisor,
                hypervisor_id="",
                bus=self._free_bus(request),
                pci_path="",
                state=State.ATTACHING,
                spec=request.spec,
            )
            self._store(device)
            added = await self._add(device)
            device = msgspec.structs.replace(device, hypervisor_id=added.hypervisor_id, pci_path=added.pci_path)
            device = self._apply(device, Event.ADDED)
        self._workers.spawn(self._expire_lease(device.device_id))
        return device

    async def confirm(self, request: contract.DeviceRef) -> Device:
        """Note that the guest uses a device."""
        return self._apply(self._known(request.device_id), Event.CONFIRMED)

    async def detach(self, request: contract.DeviceRef) -> Empty:
        """Remove a device; returns when the hypervisor has confirmed it. One that is gone is fine.

        Raises:
            HypervisorError: the guest did not let go in time; the device is quarantined.
        """
        if request.device_id in self._devices:
            await self._remove(self._devices[request.device_id])
        return Empty()

    async def list_devices(self, request: contract.ListDevices) -> DeviceList:
        """Return the devices of one sandbox, or all."""
        wanted = request.sandbox_id
        return DeviceList(devices=tuple(d for d in self._devices.values() if wanted in {"", d.sandbox_id}))

    async def follow(self, hypervisors: tuple[str, ...]) -> None:
        """Hear what the VM managers publish, for ever."""
        async with Subscriber(vmm.service_name(hypervisor) for hypervisor in hypervisors) as news:
            async for item in news:
                if isinstance(item, Resync):
                    self._workers.spawn(self.reconcile(item.service))
                else:
                    self._hear(item)

    async def reconcile(self, service: str) -> None:
        """Compare our rows with what one VM manager has; finish or undo what stands open."""
        try:
            vms = await self._bus.call(service, vmm.LIST_VMS, Empty(), timeout_s=CALL_TIMEOUT_S)
            running = {vm.sandbox_id for vm in vms.vms}
            for sandbox_id in {d.sandbox_id for d in self._of_service(service)}:
                if sandbox_id in running:
                    async with self._lock(sandbox_id):
                        await self._settle(service, sandbox_id)
                else:
                    self._release(sandbox_id)
        except KataError as err:
            log.get().warning("cannot reconcile; the service's return begins it again", service=service, error=str(err))

    def _hear(self, item: Received) -> None:
        exited = item.body_of(vmm.VM_EXITED)
        if exited is not None:
            self._release(exited.sandbox_id)
        removed = item.body_of(vmm.DEVICE_REMOVED)
        if removed is not None:
            for device in list(self._devices.values()):
                if (device.sandbox_id, device.hypervisor_id) == (removed.sandbox_id, removed.hypervisor_id):
                    self._note_removed(device)

    def _note_removed(self, device: Device) -> None:
        if device.state not in {State.DETACHING, State.QUARANTINED}:
            log.get().error("device lost: removed without our asking", **_names(device))
        self._apply(device, Event.REMOVED)

    async def _add(self, device: Device) -> vmm.AddedDevice:
        """Have the VM manager plug a device; if that fails, nothing is left of it."""
        request = vmm.AddDevice(sandbox_id=device.sandbox_id, spec=device.spec, bus=device.bus)
        try:
            return await self._bus.call(
                vmm.service_name(device.hypervisor), vmm.ADD_DEVICE, request, timeout_s=CALL_TIMEOUT_S
            )
        except UnavailableError:
            self._apply(device, Event.FAILED)  # nothing was asked
            raise
        except KataError:
            await self._undo_add(device)
            raise

    async def _undo_add(self, device: Device) -> None:
        """Settle an add whose outcome is not certain: only the hypervisor's list can tell."""
        service = vmm.service_name(device.hypervisor)
        try:
            await self._settle(service, device.sandbox_id)
        except KataError as err:
            log.get().warning("an add stays open until its service is back", error=str(err), **_names(device))

    async def _remove(self, device: Device) -> None:
        """Ask for the removal and wait for its confirmation, holding no lock meanwhile."""
        gone = self._ends[device.device_id]
        self._removing.add(device.device_id)
        try:
            await self._ask_for_removal(device)
            async with asyncio.timeout(REMOVAL_TIMEOUT_S):
                await gone.wait()
        except TimeoutError:
            await self._give_up(device)
        finally:
            self._removing.discard(device.device_id)
            if device.device_id not in self._devices:
                self._ends.pop(device.device_id, None)

    async def _ask_for_removal(self, device: Device) -> None:
        async with self._lock(device.sandbox_id):
            if device.device_id not in self._devices:
                self._ends[device.device_id].set()
                return
            device = self._apply(device, Event.DETACH)
            request = vmm.RemoveDevice(sandbox_id=device.sandbox_id, hypervisor_id=device.hypervisor_id)
            try:
                service = vmm.service_name(device.hypervisor)
                await self._bus.call(service, vmm.REMOVE_DEVICE, request, timeout_s=CALL_TIMEOUT_S)
            except NotFoundError:
                self._note_removed(device)

    async def _give_up(self, device: Device) -> None:
        async with self._lock(device.sandbox_id):
            await self._settle(vmm.service_name(device.hypervisor), device.sandbox_id)
            if device.device_id not in self._devices:
                return
            self._apply(self._devices[device.device_id], Event.GAVE_UP)
        log.get().error("device quarantined: the guest did not let go", **_names(device))
        raise HypervisorError(
            f"the guest did not let {device.hypervisor_id} go within {REMOVAL_TIMEOUT_S:g} s; "
            f"it is quarantined and keeps {device.bus}",
            hint="it is freed by a late confirmation or the end of the sandbox",
        )

    async def _settle(self, service: str, sandbox_id: str) -> None:
        """Make one sandbox's rows agree with the hypervisor's list; its lock is held."""
        reference = vmm.SandboxRef(sandbox_id=sandbox_id)
        try:
            listed = await self._bus.call(service, vmm.LIST_PRESENT_DEVICES, reference, timeout_s=CALL_TIMEOUT_S)
        except NotFoundError:
            self._release(sandbox_id)
            return
        by_bus = {present.bus: present.hypervisor_id for present in listed.devices}
        for device in [d for d in self._devices.values() if d.sandbox_id == sandbox_id]:
            present_id = by_bus.get(device.bus)
            if present_id is None:
                self._note_removed(device) if device.hypervisor_id else self._apply(device, Event.FAILED)
            elif device.state == State.ATTACHING:
                # Nobody waits for it any more: undo.
                self._store(msgspec.structs.replace(device, hypervisor_id=present_id))
                self._workers.spawn(self._remove_in_background(device.device_id))
            elif device.state == State.DETACHING and device.device_id not in self._removing:
                # A predecessor asked, or could not; the drivers make it safe to ask again.
                self._workers.spawn(self._remove_in_background(device.device_id))

    async def _remove_in_background(self, device_id: str) -> None:
        try:
            await self.detach(contract.DeviceRef(device_id=device_id))
        except KataError as err:
            log.get().error("device stays", device=device_id, error=str(err))

    async def _expire_lease(self, device_id: str) -> None:
        await asyncio.sleep(LEASE_S)
        device = self._devices.get(device_id)
        if device is not None and device.state == State.PLUGGED:
            log.get().warning("lease ran out: device removed", **_names(device))
            await self._remove_in_background(device_id)

    def _release(self, sandbox_id: str) -> None:
        """Free everything of a sandbox whose VM has ended."""
        for device in [d for d in self._devices.values() if d.sandbox_id == sandbox_id]:
            self._apply(device, Event.VM_ENDED)

    def _same(self, request: contract.Attach) -> Device | None:
        """Return the device that an earlier, lost answer to this request was about."""
        for device in self._devices.values():
            is_ours = (device.sandbox_id, device.spec) == (request.sandbox_id, request.spec)
            if is_ours and device.state in {State.PLUGGED, State.ATTACHED}:
                return device
        return None

    def _free_bus(self, request: contract.Attach) -> str:
        held = {d.bus: d.state for d in self._devices.values() if d.sandbox_id == request.sandbox_id}
        for bus in request.buses:
            if bus not in held:
                return bus
        counts = ", ".join(f"{count} {state}" for state, count in sorted(Counter(held.values()).items()))
        raise ExhaustedError(
            f"sandbox {request.sandbox_id} has no free hotplug bus: {len(request.buses)} in all ({counts})",
            hint="a device that is detaching frees its bus when the guest has let go",
        )

    def _lock(self, sandbox_id: str) -> asyncio.Lock:
        """Return a sandbox's lock, which lives as long as somebody holds or awaits it."""
        return self._locks.setdefault(sandbox_id, asyncio.Lock())

    def _known(self, device_id: str) -> Device:
        if device_id not in self._devices:
            raise NotFoundError(f"no device {device_id}", hint="its lease ran out or its VM ended")
        return self._devices[device_id]

    def _of_service(self, service: str) -> list[Device]:
        return [d for d in self._devices.values() if vmm.service_name(d.hypervisor) == service]

    def _apply(self, device: Device, event: Event) -> Device:
        """Take one step of a device's life, on disk first."""
        device = msgspec.structs.replace(device, state=after(State(device.state), event, device.device_id))
        log.get().info("device", **_names(device), state=device.state, cause=event.value)
        if device.state == State.GONE:
            self._journal.remove(device.device_id)
            self._devices.pop(device.device_id, None)
            self._ends.pop(device.device_id, asyncio.Event()).set()
        else:
            self._store(device)
        return device

    def _store(self, device: Device) -> None:
        self._journal.save(device)
        self._devices[device.device_id] = device


def _names(device: Device) -> dict[str, str]:
    return {
        "device": device.device_id,
        "sandbox": device.sandbox_id,
        "hypervisor_id": device.hypervisor_id,
        "bus": device.bus,
    }
