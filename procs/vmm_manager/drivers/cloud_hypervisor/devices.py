"""The hot-plugged devices of one VM: plugged, unplugged, accounted for.

A device has two names. Ours, from a counter in the VM's record that only grows, is in the record before Cloud
Hypervisor hears of it; a shared directory's socket bears it. Cloud Hypervisor's is in its answer. If that answer is
lost, the device is found in the VM's configuration by what is unique to this attach (``kinds``).

A device is gone when Cloud Hypervisor tells so, or when its device tree no longer has it; its configuration is no
witness, since an entry leaves that as soon as a removal is asked for. It is *told* gone when its file is closed as well
(:meth:`Api.settle`): only then is it nobody's.

One lock orders what we do to a VM's devices; it is never held while a guest is awaited, only Cloud Hypervisor.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from common import log
from common.errors import HypervisorError, KataError, NotFoundError
from common.services.vmm import AddedDevice, PresentDevice
from procs.vmm_manager.drivers.cloud_hypervisor.api import is_refusal
from procs.vmm_manager.drivers.cloud_hypervisor.topology import address, pci_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from common.services.vmm import AddDevice, DeviceSpec, HotplugBus
    from procs.vmm_manager.drivers.cloud_hypervisor.api import Api
    from procs.vmm_manager.drivers.cloud_hypervisor.kinds import Kind
    from procs.vmm_manager.drivers.cloud_hypervisor.topology import Address
    from procs.vmm_manager.drivers.cloud_hypervisor.versions import Features
    from procs.vmm_manager.drivers.spawn import Process
    from procs.vmm_manager.record import DeviceRecord, VmRecord


class Devices:
    """Plugs and unplugs; owns the ``devices`` of the record.

    Args:
        record: of the VM.
        buses: that take hotplug.
        kinds: of device, by the type that describes one.
        features: of this version.
        api: of this VM.
        vmm: its process.
        on_removed: called with Cloud Hypervisor's id of each device that is gone.
    """

    def __init__(
        self,
        record: VmRecord,
        buses: Iterable[HotplugBus],
        kinds: Mapping[type, Kind],
        features: Features,
        api: Api,
        vmm: Process,
        on_removed: Callable[[str], None],
    ) -> None:
        self._record = record
        self._buses = tuple(buses)
        self._kinds = kinds
        self._features = features
        self._api = api
        self._vmm = vmm
        self._on_removed = on_removed
        self._lock = asyncio.Lock()

    def takes(self, spec: DeviceSpec) -> bool:
        """Return whether a device with this description is one of those here."""
        return type(spec) in self._kinds

    async def find(self, serial: str) -> AddedDevice | None:
        """Return the device of an attach, if Cloud Hypervisor has it."""
        async with self._lock:
            name = self._record.name_of(serial)
            if name is None or not self.takes(self._record.devices[name].spec):
                return None
            info = await self._api.get("vm.info")
            found = self._found(info, name)
            return self._added(name, found, bdf_of(_tree_of(info), found)) if found else None

    async def add(self, request: AddDevice) -> AddedDevice:
        """Plug a device; undone in reverse if a step fails.

        Raises:
            AlreadyExistsError: the slot is taken, or the file is open elsewhere.
            NotFoundError: there is no such file or network namespace.
            UsageError: there is no such slot, or the device's source is not what it must be.
            HypervisorError: Cloud Hypervisor refused.
        """
        place = self._place(address(self._buses, request.bus, request.slot))
        async with self._lock:
            name = self._record.enter(request, self._kinds[type(request.spec)].prefix)
            try:
                return await self._plug(name, place)
            except (KataError, OSError) as err:
                return await self._settle_add(name, err)

    async def remove(self, hypervisor_id: str) -> None:
        """Ask the guest to let a device go; a second request while one is pending is accepted too.

        Version 53.0 does not know a device any more that is on its way out. The device tree does. Older ones must not
        be asked twice.

        Raises:
            NotFoundError: Cloud Hypervisor has no such device.
        """
        if not self._features.is_second_removal_harmless and await self._is_leaving(hypervisor_id):
            return
        try:
            await self._api.put("vm.remove-device", {"id": hypervisor_id})
        except NotFoundError:
            if hypervisor_id in await self._tree():
                return
            if self._name_of(hypervisor_id) is None:
                raise
            await self.forget(hypervisor_id)

    async def present(self) -> list[PresentDevice]:
        """Return the devices that Cloud Hypervisor has."""
        await self.reconcile()
        return [
            PresentDevice(
                hypervisor_id=device.hypervisor_id,
                bus=device.bus,
                slot=device.slot,
                serial=device.serial,
                spec=device.spec,
            )
            for _, device in self._own()
            if device.hypervisor_id
        ]

    async def reconcile(self) -> None:
        """Finish what was left half-done, and notice what was removed, while nobody listened."""
        async with self._lock:
            info = await self._api.get("vm.info")
            for name, device in list(self._own()):
                device.hypervisor_id = device.hypervisor_id or self._found(info, name)
                if device.hypervisor_id not in _tree_of(info):
                    await self._forget(name)

    def adopt(self) -> None:
        """Go on with what an earlier manager started for its devices."""
        for name, _ in self._own():
            self._kind(name).adopt(name)

    async def forget(self, hypervisor_id: str) -> None:
        """Free what a device had that has been ejected, and tell."""
        async with self._lock:
            name = self._name_of(hypervisor_id)
            if name is not None:
                await self._forget(name)

    def _own(self) -> Iterator[tuple[str, DeviceRecord]]:
        return ((name, device) for name, device in self._record.devices.items() if self.takes(device.spec))

    def _place(self, wanted: Address) -> dict[str, int]:
        """Return what is added to a request so that the device comes to a place."""
        segment = {"pci_segment": wanted.segment} if wanted.segment else {}
        return {**segment, "pci_device_id": wanted.slot} if self._features.is_slot_ours else segment

    async def _plug(self, name: str, place: Mapping[str, int]) -> AddedDevice:
        answer = await self._kind(name).plug(name, self._record.devices[name], place)
        if not isinstance(answer, dict) or not {"id", "bdf"} <= answer.keys():
            raise HypervisorError(f"Cloud Hypervisor added a device and does not say which: {answer!r}")
        return self._added(name, str(answer["id"]), str(answer["bdf"]))

    async def _settle_add(self, name: str, failure: KataError | OSError) -> AddedDevice:
        """Find out what a failed add did: undo what is left of it, or take it for done if only the answer is lost.

        Raises:
            KataError: the failure. The record keeps a device that is there although it was refused: whoever compares
                finds it.
        """
        said = self._kind(name).said(name, self._record.devices[name])
        info = await self._api.get("vm.info")
        found = self._found(info, name)
        if not found:
            await self._clear(name, is_ejected=False)
        elif is_refusal(failure):
            self._learn(name, found)
        else:
            return self._added(name, found, bdf_of(_tree_of(info), found))
        if isinstance(failure, KataError):
            raise type(failure)(failure.message + said, hint=failure.hint) from failure
        raise failure

    def _added(self, name: str, hypervisor_id: str, bdf: str) -> AddedDevice:
        self._learn(name, hypervisor_id)
        return AddedDevice(hypervisor_id=hypervisor_id, guest_path=pci_path(bdf))

    def _learn(self, name: str, hypervisor_id: str) -> None:
        self._record.devices[name].hypervisor_id = hypervisor_id
        self._record.save()

    async def _forget(self, name: str) -> None:
        hypervisor_id = self._record.devices[name].hypervisor_id
        try:
            await self._api.settle()
            await self._clear(name, is_ejected=bool(hypervisor_id))
        except KataError as err:
            log.get().error("a removed device may still be open", device=name, error=str(err))
            return
        if hypervisor_id:
            self._on_removed(hypervisor_id)

    async def _clear(self, name: str, *, is_ejected: bool) -> None:
        """Free all that a device had on the host; the record goes last."""
        await self._kind(name).clear(name, is_ejected=is_ejected)
        self._record.devices.pop(name, None)
        if self._vmm.is_running:  # else the record goes with the directory, whose remover expects no new file
            with suppress(FileNotFoundError):
                self._record.save()

    async def _is_leaving(self, hypervisor_id: str) -> bool:
        """Return whether a removal has been asked for: the configuration has no such device any more, the tree has."""
        name = self._name_of(hypervisor_id)
        if name is None:
            return False
        info = await self._api.get("vm.info")
        entries = info["config"].get(self._kind(name).section) or ()
        return hypervisor_id in _tree_of(info) and hypervisor_id not in {str(entry["id"]) for entry in entries}

    async def _tree(self) -> dict[str, Any]:
        return _tree_of(await self._api.get("vm.info"))

    def _kind(self, name: str) -> Kind:
        return self._kinds[type(self._record.devices[name].spec)]

    def _found(self, info: dict[str, Any], name: str) -> str:
        """Return Cloud Hypervisor's id of a device of ours, by what this attach alone has, or nothing.

        Of an address that a caller chose there may be two: the other one is known already.
        """
        kind, devices = self._kind(name), self._record.devices
        others = {device.hypervisor_id for other, device in devices.items() if other != name}
        wanted = kind.marked(name, devices[name])
        entries = info["config"].get(kind.section) or ()
        ids = (str(entry["id"]) for entry in entries if entry.get(kind.mark) == wanted)
        return next((hypervisor_id for hypervisor_id in ids if hypervisor_id not in others), "")

    def _name_of(self, hypervisor_id: str) -> str | None:
        names = (name for name, device in self._own() if device.hypervisor_id == hypervisor_id)
        return next(names, None)


def _tree_of(info: dict[str, Any]) -> dict[str, Any]:
    """Return the device tree, which a VM has while it runs."""
    return info.get("device_tree") or {}


def bdf_of(tree: dict[str, Any], hypervisor_id: str) -> str:
    """Return a device's address, which its parent in the tree has; one of the host is a PCI device itself."""
    node = tree[hypervisor_id]
    return str(node.get("pci_bdf") or tree[node["parent"]]["pci_bdf"])
