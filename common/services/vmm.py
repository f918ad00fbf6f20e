"""``vmm.<hypervisor>``: the VM manager, which owns VM processes and their hypervisor's API.

The shim asks it for the life of a VM, the device manager for its devices; nobody else writes to a hypervisor.
State-changing verbs are idempotent: asked again with the same request id they give the same answer, also after a
restart of the manager.
"""

from __future__ import annotations

import msgspec

from common.bus.wire import Empty, Event, Verb
from common.config import QemuConfig
from common.processes import ProcessIdentity


def service_name(hypervisor: str) -> str:
    """Return the bus name of the manager of one kind of hypervisor, for example ``vmm.qemu``."""
    return f"vmm.{hypervisor}"


class CreateVm(msgspec.Struct, frozen=True, kw_only=True):
    """Start a VM for a sandbox. It boots while the caller does other things."""

    sandbox_id: str
    config: QemuConfig


class Vm(msgspec.Struct, frozen=True, kw_only=True):
    """A VM and how to reach its guest.

    Attributes:
        sandbox_id: whose VM it is.
        hypervisor: ``qemu``.
        version: the hypervisor's own version, for example ``7.2.22``.
        accelerator: ``kvm`` or ``tcg`` (software emulation).
        process: the VMM process.
        agent_socket: Unix socket of the agent's port.
        stream_sockets: Unix sockets of the stream ports; index n is the guest's port ``kata.stream.n``.
        console_log: what the guest printed.
        hotplug_buses: buses that take one device each, by the hypervisor's name.
    """

    sandbox_id: str
    hypervisor: str
    version: str
    accelerator: str
    process: ProcessIdentity
    agent_socket: str
    stream_sockets: tuple[str, ...]
    console_log: str
    hotplug_buses: tuple[str, ...]


class SandboxRef(msgspec.Struct, frozen=True, kw_only=True):
    """Names a sandbox."""

    sandbox_id: str


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


class ShareSpec(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="share"):
    """A directory shared with the guest by virtio-fs.

    Attributes:
        source: host directory.
        tag: virtio-fs tag, at most 36 bytes (virtio 1.2, 5.11.4).
    """

    source: str
    tag: str


class AddDevice(msgspec.Struct, frozen=True, kw_only=True):
    """Plug a device into a bus. Asked only by the device manager, which knows that the bus is free."""

    sandbox_id: str
    spec: ShareSpec
    bus: str


class AddedDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device that the hypervisor took.

    Attributes:
        hypervisor_id: what the hypervisor calls it; never used twice in one VM.
        pci_path: where the guest finds it, slots in hexadecimal from the root bus, for example ``02/00``.
    """

    hypervisor_id: str
    pci_path: str


class RemoveDevice(msgspec.Struct, frozen=True, kw_only=True):
    """Ask the guest to let a device go. The answer means *accepted*; :class:`DeviceRemoved` means *removed*."""

    sandbox_id: str
    hypervisor_id: str


class PresentDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device that the hypervisor has now."""

    hypervisor_id: str
    bus: str


class PresentDevices(msgspec.Struct, frozen=True, kw_only=True):
    """The hypervisor's own list of the hot-plugged devices of a VM."""

    devices: tuple[PresentDevice, ...]


CREATE_VM = Verb("create_vm", CreateVm, Vm)
DESCRIBE_VM = Verb("describe_vm", SandboxRef, VmStatus)
DESTROY_VM = Verb("destroy_vm", SandboxRef, Empty)
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
