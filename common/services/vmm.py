"""``vmm.<hypervisor>``: the VM manager, which owns VM processes and their hypervisor's API.

The shim asks it for the life of a VM, the device manager for its devices; nobody else writes to a hypervisor.
State-changing verbs are idempotent: asked again with the same request id they give the same answer, also after a
restart of the manager.
"""

from __future__ import annotations

# ruff: noqa: PLC0414  # an alias of the same name is how a re-export is declared
from enum import StrEnum

import msgspec

from common import shards
from common.bus.wire import Empty, Event, Verb
from common.config.hypervisors import BlockDriver as BlockDriver
from common.config.hypervisors import HypervisorConfig
from common.processes import ProcessIdentity
from common.services.channel import GuestChannel
from common.services.specs import BlockSpec as BlockSpec
from common.services.specs import BusKind as BusKind
from common.services.specs import CpuSpec as CpuSpec
from common.services.specs import DeviceSpec as DeviceSpec
from common.services.specs import InterfaceKind as InterfaceKind
from common.services.specs import MemorySpec as MemorySpec
from common.services.specs import NetworkSpec as NetworkSpec
from common.services.specs import PmemSpec as PmemSpec
from common.services.specs import ShareSpec as ShareSpec
from common.services.specs import VfioSpec as VfioSpec
from common.services.specs import VhostUserDiskSpec as VhostUserDiskSpec
from common.services.specs import VsockSpec as VsockSpec
from common.services.specs import bus_kinds as bus_kinds
from common.services.specs import extra_s as extra_s


def service_name(hypervisor: str) -> str:
    """Return the bus name of the manager of one kind of hypervisor, for example ``vmm.qemu``."""
    return f"vmm.{hypervisor}"


class CreateVm(msgspec.Struct, frozen=True, kw_only=True):
    """Start a VM for a sandbox. It boots while the caller does other things.

    Attributes:
        sandbox_id: whose.
        config: how it is made, in the terms of the manager that is asked.
        is_held: whether its boot waits for ``resume_vm``: what is plugged until then the guest's firmware finds, as if
            it had always been there.
    """

    sandbox_id: str
    config: HypervisorConfig
    is_held: bool = False


class HotplugBus(msgspec.Struct, frozen=True, kw_only=True):
    """A place for devices that come while the guest runs; a device holds one slot of one bus.

    Attributes:
        name: the hypervisor's name for it, unique in a VM.
        kind: which devices fit.
        slots: how many it takes, numbered from 0. A PCIe root port takes one.
    """

    name: str
    kind: BusKind
    slots: int


class Vm(msgspec.Struct, frozen=True, kw_only=True):
    """A VM and how to reach its guest.

    Attributes:
        sandbox_id: whose VM it is.
        hypervisor: its name, that of its section in the configuration.
        version: the hypervisor's own version, for example ``7.2.22``.
        accelerator: ``kvm`` or ``tcg`` (software emulation).
        process: the VMM process.
        channel: how to reach its agent.
        console_log: what the guest printed.
        hotplug_buses: where devices can be plugged. Which slots are taken is the device manager's to know.
        device_manager: bus name of the shard of the device manager that has the sandbox's devices (``common.shards``).
    """

    sandbox_id: str
    hypervisor: str
    version: str
    accelerator: str
    process: ProcessIdentity
    channel: GuestChannel
    console_log: str
    hotplug_buses: tuple[HotplugBus, ...]
    device_manager: str = shards.FIRST


class SandboxRef(msgspec.Struct, frozen=True, kw_only=True):
    """Names a sandbox."""

    sandbox_id: str


class MemoryMode(StrEnum):
    """How a restored VM gets its memory: all of it before it goes on, or each page when the guest first touches it."""

    COPY = "copy"
    ON_DEMAND = "on-demand"


class SnapshotVm(msgspec.Struct, frozen=True, kw_only=True):
    """Write a VM that is paused and has no hot-plugged devices into a directory. It stays paused.

    Attributes:
        sandbox_id: whose VM.
        directory: absolute path of an empty directory of the host. What is written there is the guest's memory.
    """

    sandbox_id: str
    directory: str


class RestoreVm(msgspec.Struct, frozen=True, kw_only=True):
    """Start a VM for a sandbox as another one was when a snapshot was taken; with its configuration, and running.

    What was unique in that guest is so no longer: its random numbers, its clock, the names it gave itself.

    Attributes:
        sandbox_id: whose.
        directory: where the snapshot is. With memory on demand it has to stay as long as the VM.
        memory: how the guest gets it.
    """

    sandbox_id: str
    directory: str
    memory: MemoryMode = MemoryMode.COPY


class VmStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What is true of a VM now.

    Attributes:
        vm: as given by ``create_vm``.
        is_running: whether its VMM lives.
        runstate: the hypervisor's own word for the VM's state, for example ``running`` or ``guest-panicked``.
        console_tail: the last lines of the console, at most 4 KiB, control characters replaced.
        log_tail: the last lines that the VMM itself printed, at most 4 KiB.
    """

    vm: Vm
    is_running: bool
    runstate: str
    console_tail: str
    log_tail: str


class VmList(msgspec.Struct, frozen=True, kw_only=True):
    """Every VM that the manager owns."""

    vms: tuple[Vm, ...]


class AddDevice(msgspec.Struct, frozen=True, kw_only=True):
    """Plug a device. Asked only by the device manager, which knows that the slot is free.

    Attributes:
        sandbox_id: whose VM.
        spec: what to plug.
        bus: name of the bus.
        slot: its place there.
        serial: 20 hexadecimal characters, of this attach and no other. A disk tells it to the guest (the 20 bytes of
            VIRTIO_BLK_T_GET_ID, virtio 1.2, 5.2.6; the unit serial number of SCSI).
    """

    sandbox_id: str
    spec: DeviceSpec
    bus: str
    slot: int
    serial: str


class AddedDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device that the hypervisor took.

    Attributes:
        hypervisor_id: what the hypervisor calls it; never used twice in one VM.
        guest_path: where the guest finds it, in the terms of its bus (:class:`BusKind`). PCI: slots in hexadecimal from
            the root bus, for example ``02/00``; if that is another PCI segment's than the first, this before it, for
            example ``0001:05``. SCSI: target and unit, for example ``0:7``. MMIO: the node that a guest
            without other disks has had since its boot, for example ``/dev/vda``. Empty if there is no such place, or it
            is not known. An agent takes it as the source of a storage.
        storage_options: what the agent must be told to find it, as options of a storage's driver
            (:mod:`guest.agent.storage`) between commas; empty if that is the serial of the request and nothing else.
        is_guest_first: whether the guest must have let go of it before its removal is asked for: the hypervisor takes
            it without asking, and the guest would be left with a dead device.
    """

    hypervisor_id: str
    guest_path: str = ""
    storage_options: str = ""
    is_guest_first: bool = False


class RemoveDevice(msgspec.Struct, frozen=True, kw_only=True):
    """Ask the guest to let a device go. The answer means *accepted*; :class:`DeviceRemoved` means *removed*."""

    sandbox_id: str
    hypervisor_id: str


class PresentDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device that the hypervisor has now; the fields are those of :class:`AddDevice` and :class:`AddedDevice`.

    With what is here a device manager that has lost its books can begin them anew.
    """

    hypervisor_id: str
    bus: str
    slot: int
    serial: str
    guest_path: str = ""
    storage_options: str = ""
    is_guest_first: bool = False
    spec: DeviceSpec | None = None


class PresentDevices(msgspec.Struct, frozen=True, kw_only=True):
    """The hypervisor's own list of the hot-plugged devices of a VM."""

    devices: tuple[PresentDevice, ...]


CREATE_TIMEOUT_S = 120.0
"""How long a caller of ``create_vm`` waits, in seconds.

A manager gives up by itself, with the reason, when a step of a start takes 30 s: a hypervisor has two or three. And the
first VM of a host may have to wait until the manager knows whether KVM works. A manager that ends is noticed at once:
this is the limit for one that hangs.
"""

CREATE_VM = Verb("create_vm", CreateVm, Vm)
DESCRIBE_VM = Verb("describe_vm", SandboxRef, VmStatus)
DESTROY_VM = Verb("destroy_vm", SandboxRef, Empty)
PAUSE_VM = Verb("pause_vm", SandboxRef, Empty)
RESUME_VM = Verb("resume_vm", SandboxRef, Empty)
SNAPSHOT_VM = Verb("snapshot_vm", SnapshotVm, Empty)
RESTORE_VM = Verb("restore_vm", RestoreVm, Vm)
LIST_VMS = Verb("list_vms", Empty, VmList)
ADD_DEVICE = Verb("add_device", AddDevice, AddedDevice)
REMOVE_DEVICE = Verb("remove_device", RemoveDevice, Empty)
LIST_PRESENT_DEVICES = Verb("list_present_devices", SandboxRef, PresentDevices)


class VmExited(msgspec.Struct, frozen=True, kw_only=True):
    """The VMM process is gone, and with it every device of the sandbox."""

    sandbox_id: str


class DeviceRemoved(msgspec.Struct, frozen=True, kw_only=True):
    """The hypervisor confirmed that the guest let a device go, or that it vanished on its own."""

    sandbox_id: str
    hypervisor_id: str


VM_EXITED = Event("vm-exited", VmExited)
DEVICE_REMOVED = Event("device-removed", DeviceRemoved)
