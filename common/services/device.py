"""``device``: the device manager, which owns every device of every sandbox.

Attaching has two phases. ``attach`` plugs the device and answers with a lease; the shim has the guest find and use it
and says ``confirm``, or ``abort``. A lease that runs out is an abort. ``detach`` returns when the hypervisor has
*confirmed* the removal; until then the slot, the id and the backing file or directory stay taken.
"""

from __future__ import annotations

import msgspec

from common.bus.wire import Empty, Verb
from common.services.vmm import DeviceSpec, HotplugBus

SERVICE = "device"


class Attach(msgspec.Struct, frozen=True, kw_only=True):
    """Plug a device into a sandbox's VM. Idempotent by request id.

    Attributes:
        sandbox_id: whose VM.
        hypervisor: which VM manager owns that VM, for example ``qemu``.
        buses: the VM's hotplug buses, as ``create_vm`` named them; the device gets a free slot of one that it fits.
        spec: what to plug.
    """

    sandbox_id: str
    hypervisor: str
    buses: tuple[HotplugBus, ...]
    spec: DeviceSpec


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """One device as the device manager knows it.

    Attributes:
        device_id: ours; unique on this host and never used again.
        sandbox_id: whose VM it is in.
        hypervisor: which VM manager.
        hypervisor_id: what the hypervisor calls it; empty until it has answered.
        bus: the bus on which it holds a slot, also while its removal is pending.
        slot: the slot that it holds there.
        serial: of this attach and no other; a disk tells it to the guest.
        pci_path: where the guest finds it, or the controller of its SCSI bus.
        state: ``attaching``, ``plugged``, ``attached``, ``detaching``, or ``quarantined``: the guest never let go.
        spec: what was asked for.
    """

    device_id: str
    sandbox_id: str
    hypervisor: str
    hypervisor_id: str
    bus: str
    slot: int
    serial: str
    pci_path: str
    state: str
    spec: DeviceSpec


class DeviceRef(msgspec.Struct, frozen=True, kw_only=True):
    """Names a device by our id."""

    device_id: str


class ListDevices(msgspec.Struct, frozen=True, kw_only=True):
    """Ask for the devices of one sandbox, or of all if the id is empty."""

    sandbox_id: str = ""


class DeviceList(msgspec.Struct, frozen=True, kw_only=True):
    """Devices, oldest first."""

    devices: tuple[Device, ...]


ATTACH = Verb("attach", Attach, Device)
CONFIRM = Verb("confirm", DeviceRef, Device)
ABORT = Verb("abort", DeviceRef, Empty)
DETACH = Verb("detach", DeviceRef, Empty)
LIST_DEVICES = Verb("list_devices", ListDevices, DeviceList)
