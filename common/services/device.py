"""``device``, ``device.1``…: the device manager, which owns every device of every sandbox; one service a shard.

Which shard has a sandbox is told with its VM (:attr:`common.services.vmm.Vm.device_manager`, ``common.shards``).

Attaching has two phases. ``attach`` plugs the device and answers with a lease; the shim has the guest find and use it
and says ``confirm``, or ``abort``. A lease that runs out is an abort without the guest's word
(:class:`Abort`). ``detach`` returns when the hypervisor has *confirmed* the removal; until then bus, slot, id and
source stay taken.

Several containers of a sandbox may hold one device: each ``attach`` names a holder, and one more holder of what is
there already plugs nothing. The last holder that gives it back has it removed. Holders are a set and not a counter, so
a repeated call changes nothing.
"""

from __future__ import annotations

import msgspec

from common import shards
from common.bus.wire import Empty, Event, Verb
from common.services.vmm import DeviceSpec, HotplugBus

SERVICE = shards.FIRST


class Attach(msgspec.Struct, frozen=True, kw_only=True):
    """Plug a device into a sandbox's VM. Idempotent by source and holder.

    Attributes:
        sandbox_id: whose VM.
        hypervisor: which VM manager owns that VM, for example ``qemu``.
        version: the hypervisor's own version, as ``create_vm`` named it.
        buses: the VM's hotplug buses, as ``create_vm`` named them.
        spec: what to plug.
        holder: who uses it: a container's id, or empty for the sandbox itself.
        lease_s: how long the holder may stay unconfirmed, in seconds; a device manager that comes after this one begins
            it anew. Whoever attaches knows what its guest has to do first, which may be to boot.
    """

    sandbox_id: str
    hypervisor: str
    version: str = ""
    buses: tuple[HotplugBus, ...]
    spec: DeviceSpec
    holder: str = ""
    lease_s: float = 60.0


class Holder(msgspec.Struct, frozen=True, kw_only=True):
    """Who uses a device.

    Attributes:
        name: a container's id, or empty for the sandbox itself.
        since: seconds since the epoch.
        lease_s: how long it may stay unconfirmed, in seconds.
        is_confirmed: whether its guest has found the device; if not, its lease is running.
    """

    name: str
    since: float
    lease_s: float = 60.0
    is_confirmed: bool = False


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """One device as the device manager knows it.

    Attributes:
        device_id: ours, 20 hexadecimal characters; unique on this host, never used again. It is also the serial that
            the guest sees, where the device has one: virtio-blk's holds 20 bytes (virtio 1.2, 5.2.6.1).
        sandbox_id: whose VM it is in.
        hypervisor: which VM manager.
        version: the hypervisor's own version; empty if it is not known.
        hypervisor_id: what the hypervisor calls it; empty until it has answered.
        bus: the bus it is on, also while its removal is pending.
        slot: its place on the bus.
        guest_path: see :class:`common.services.vmm.AddedDevice`; empty also until the hypervisor has answered.
        storage_options: see :class:`common.services.vmm.AddedDevice`.
        is_guest_first: see :class:`common.services.vmm.AddedDevice`.
        state: ``attaching``, ``plugged``, ``attached``, ``detaching``, ``overdue``; ``quarantined``: the guest never
            let go, or nobody said that it did; ``unknown``: found in the hypervisor, attached by nobody that we know.
        since: when it came into this state, in seconds since the epoch.
        spec: what was asked for; None if it is not known.
        backing: what the source is, whatever path leads to it, for example ``file 2049:1234``.
        holders: who uses it.
        removals: how often its removal was asked for.
    """

    device_id: str
    sandbox_id: str
    hypervisor: str
    version: str = ""
    hypervisor_id: str = ""
    bus: str
    slot: int
    guest_path: str = ""
    storage_options: str = ""
    is_guest_first: bool = False
    state: str
    since: float
    spec: DeviceSpec | None = None
    backing: str = ""
    holders: tuple[Holder, ...] = ()
    removals: int = 0

    @property
    def serial(self) -> str:
        """What tells this attach from every other one, to the hypervisor and to the guest."""
        return self.device_id

    @property
    def kind(self) -> str:
        """What kind of device it is: ``share``, ``block``, or ``unknown``."""
        return "unknown" if self.spec is None else kind_of(self.spec)


def kind_of(spec: DeviceSpec) -> str:
    """Return what kind of device a specification is for."""
    return str(spec.__struct_config__.tag)


class DeviceRef(msgspec.Struct, frozen=True, kw_only=True):
    """Names a device by our id, and one of its holders.

    In a ``detach`` it says as well that the guest has let go of the device, where the guest goes first.
    """

    device_id: str
    holder: str = ""


class Abort(msgspec.Struct, frozen=True, kw_only=True):
    """Give up a device that a holder cannot use.

    Attributes:
        device_id: which.
        holder: who gives it up.
        is_let_go: whether the guest has let go of it. If it has not said so, a device whose guest goes first
            (:attr:`Device.is_guest_first`) is quarantined, until its holder says so or the VM ends.
    """

    device_id: str
    holder: str = ""
    is_let_go: bool = False


class ListDevices(msgspec.Struct, frozen=True, kw_only=True):
    """Ask for the devices of one sandbox, or of all if the id is empty."""

    sandbox_id: str = ""


class DeviceList(msgspec.Struct, frozen=True, kw_only=True):
    """Devices, oldest first."""

    devices: tuple[Device, ...]


class TellStory(msgspec.Struct, frozen=True, kw_only=True):
    """Ask what happened to a device, also to one that is gone."""

    device_id: str


class Chapter(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that happened to a device.

    Attributes:
        at: when, in seconds since the epoch.
        event: what happened, in words.
        state: the device's state after it.
        detail: ids that were learned, who asked, or the error.
    """

    at: float
    event: str
    state: str
    detail: str


class Story(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to a device, oldest first; the oldest of all devices' chapters are forgotten first."""

    device_id: str
    sandbox_id: str
    chapters: tuple[Chapter, ...]


ATTACH = Verb("attach", Attach, Device)
CONFIRM = Verb("confirm", DeviceRef, Device)
ABORT = Verb("abort", Abort, Empty)
DETACH = Verb("detach", DeviceRef, Empty)
LIST_DEVICES = Verb("list_devices", ListDevices, DeviceList)
TELL_STORY = Verb("tell_story", TellStory, Story)

DEVICE_LOST = Event("device-lost", Device)
"""It vanished without our asking; its holders have to do without."""
DEVICE_QUARANTINED = Event("device-quarantined", Device)
"""The guest did not let it go, or nobody said that it did; bus, slot and source stay taken."""
