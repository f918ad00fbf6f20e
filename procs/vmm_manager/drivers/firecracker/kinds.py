"""The kinds of devices that a VM of Firecracker can have, and what is special about each; ``devices`` has the rest.

==============  ======================  ========================================================================
kind            resource                stands on
==============  ======================  ========================================================================
disk            ``/drives``             a node in the jail, while Firecracker opens it (``jail``)
network device  ``/network-interfaces`` a tap that Firecracker opens by name, in its own network namespace, where
                                        the tap is made; from there it goes to where it is wanted (``taps``)
==============  ======================  ========================================================================

A network device on PCI comes and goes as a disk does. Without PCI it has to come before the boot, in a VM that waits
with that, and stays as long as the VM.

Source: src/vmm/src/vmm_config/net.rs and src/vmm/src/devices/virtio/net of Firecracker 1.16.1 and 1.12.1.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Protocol

from common.errors import NotFoundError, UnsupportedError, UsageError
from common.linux import taps
from common.services.vmm import BlockSpec, InterfaceKind, NetworkSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    from procs.vmm_manager.drivers.firecracker.api import Api
    from procs.vmm_manager.drivers.firecracker.jail import Jail
    from procs.vmm_manager.drivers.firecracker.places import Places
    from procs.vmm_manager.record import DeviceRecord

NOT_STARTED = "not started"
"""Firecracker's state of a VM that has not booted, in small letters."""
_NICS = "/network-interfaces"


class Kind(Protocol):
    """One kind.

    Attributes:
        prefix: what our names of its devices begin with.
        is_guest_first: whether Firecracker takes a device without asking the guest.
        kept: why a device stays as long as its VM; empty if it does not.
    """

    prefix: str
    is_guest_first: bool
    kept: str

    async def put_in(self, device_id: str, device: DeviceRecord, note: Callable[[], None]) -> None:
        """Have Firecracker take a device.

        Args:
            device_id: our name of it, and Firecracker's.
            device: it.
            note: writes the record, once what is in it of the device is true.

        Raises:
            KataError, OSError: it was not taken, or it is not known whether it was.
        """

    async def take_out(self, firecracker_id: str) -> None:
        """Have Firecracker give a device up that the guest has let go."""

    async def finish(self, device: DeviceRecord) -> None:
        """Do what is left to do on the host, if anything is, of a device that Firecracker has."""

    async def clear(self, device: DeviceRecord) -> None:
        """Free what is left on the host of a device that Firecracker does not have."""

    def listed(self, config: dict[str, Any]) -> dict[str, str]:
        """Return the devices in Firecracker's configuration, by our names, with its ids."""


class Disks:
    """Disks."""

    prefix = "disk_"
    is_guest_first = True
    kept = ""

    def __init__(self, api: Api, jail: Jail, places: Places) -> None:
        self._api = api
        self._jail = jail
        self._places = places

    async def put_in(self, device_id: str, device: DeviceRecord, note: Callable[[], None]) -> None:
        """See :class:`Kind`."""
        assert isinstance(device.spec, BlockSpec)
        with ExitStack() as stack:
            lent = await asyncio.to_thread(stack.enter_context, self._jail.lent(device_id, device.spec))
            device.storage_options = self._places.options(lent)
            note()
            await self._places.put_in(self._api, device_id, device)

    async def take_out(self, firecracker_id: str) -> None:
        """See :class:`Kind`."""
        await self._places.take_out(self._api, firecracker_id)

    async def finish(self, _device: DeviceRecord) -> None:
        """See :class:`Kind`: nothing."""

    async def clear(self, _device: DeviceRecord) -> None:
        """See :class:`Kind`: nothing, the node went when the disk was open."""

    def listed(self, config: dict[str, Any]) -> dict[str, str]:
        """Return the disks, whose files bear our names; a placeholder's drive has another id."""
        drives = config.get("drives") or ()
        named = {str(drive.get("path_on_host")): str(drive.get("drive_id")) for drive in drives}
        return {name: drive_id for name, drive_id in named.items() if name.startswith(self.prefix)}


class Nics:
    """Network devices.

    Args:
        api: of this VM.
        jail: its user may open the taps.
        pid: Firecracker's process, which has the network namespace.
        is_on_pci: whether devices come and go while the guest runs.
    """

    prefix = "nic_"

    def __init__(self, api: Api, jail: Jail, pid: int, *, is_on_pci: bool) -> None:
        self._api = api
        self._jail = jail
        self._pid = pid
        self._is_on_pci = is_on_pci
        self.is_guest_first = is_on_pci
        self.kept = "" if is_on_pci else "without PCI Firecracker gives no network device up"

    async def put_in(self, device_id: str, device: DeviceRecord, note: Callable[[], None]) -> None:
        """See :class:`Kind`.

        Raises:
            UnsupportedError: it comes too late, or is no tap.
            UsageError: there is an interface of that name.
            NotFoundError: there is no such namespace.
        """
        spec = device.spec
        assert isinstance(spec, NetworkSpec)
        await self._require(spec)
        note()
        name = _tap_of(device)
        await asyncio.to_thread(taps.make, self._namespace, name, self._jail.owner)
        body: dict[str, object] = {
            "iface_id": device_id,
            "host_dev_name": name,
            "guest_mac": spec.address(device.serial),
        }
        await self._api.put(f"{_NICS}/{device_id}", body)
        await self.finish(device)

    async def take_out(self, firecracker_id: str) -> None:
        """See :class:`Kind`."""
        await self._api.delete(f"{_NICS}/{firecracker_id}")

    async def finish(self, device: DeviceRecord) -> None:
        """Have the tap go with Firecracker's descriptor, and move it to where it is wanted."""
        spec, name = device.spec, _tap_of(device)
        assert isinstance(spec, NetworkSpec)
        if await asyncio.to_thread(taps.exists, self._namespace, name):
            await asyncio.to_thread(taps.let_go_with, self._pid, name)
            await asyncio.to_thread(taps.move, self._namespace, name, spec.namespace, spec.interface)

    async def clear(self, device: DeviceRecord) -> None:
        """Remove a tap that Firecracker has not opened."""
        await asyncio.to_thread(taps.remove, self._namespace, _tap_of(device))

    def listed(self, config: dict[str, Any]) -> dict[str, str]:
        """See :class:`Kind`."""
        ids = (str(interface.get("iface_id")) for interface in config.get("network-interfaces") or ())
        return {name: name for name in ids if name.startswith(self.prefix)}

    @property
    def _namespace(self) -> str:
        return f"/proc/{self._pid}/ns/net"

    async def _require(self, spec: NetworkSpec) -> None:
        if spec.type is not InterfaceKind.TAP:
            raise UnsupportedError(
                f"Firecracker cannot have {spec.interface}, a {spec.type}: it opens taps only", hint="have a tap made"
            )
        if not self._is_on_pci and str((await self._api.get("/"))["state"]).lower() != NOT_STARTED:
            raise UnsupportedError(
                "Firecracker takes network devices without PCI only before the guest boots",
                hint="`create_vm` with is_held, then attach, then `resume_vm`; or block_device_driver = "
                '"virtio-blk", with 1.16 and later',
            )
        try:
            is_there = await asyncio.to_thread(taps.exists, spec.namespace, spec.interface)
        except FileNotFoundError as err:
            raise NotFoundError(f"network namespace {spec.namespace} does not exist") from err
        if is_there:
            raise UsageError(
                f"{spec.interface} is in {spec.namespace} already, and Firecracker has taps that are made for it only",
                hint="name another interface, and connect it when it is there",
            )


def _tap_of(device: DeviceRecord) -> str:
    """Return what a tap is called until it is where it is wanted: without a jail, among all of the host's."""
    return f"fc{device.serial[-12:]}"
