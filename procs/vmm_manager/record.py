"""``vm.json``: what must be known of a VM to take it over after a restart.

Written before the VMM is started (``vm`` is None then: a half-made VM, to be killed by its cgroup) and before and after
each change, always as a whole: temporary file, rename. It has to survive this process and not the host, whose end is
that of every VM: so nothing is synchronised with a disk, on which the run directory may be.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from common import paths, shards
from common.config import HypervisorConfig
from common.errors import AlreadyExistsError
from common.processes import ProcessIdentity
from common.services.vmm import DeviceSpec, Vm

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.services.vmm import AddDevice


class DeviceRecord(msgspec.Struct, kw_only=True):
    """A device that this manager plugged, or is about to.

    Attributes:
        bus: the hotplug bus it is on.
        slot: its place there.
        serial: by which the device manager knows it.
        spec: what was asked for.
        place: its path in the guest, if that does not follow from bus and slot.
        storage_options: what callers are told of it, see :class:`common.services.vmm.AddedDevice`.
        daemon: the process that serves it; None until it is started.
        hypervisor_id: what the hypervisor calls it, if that is the hypervisor's choice; empty until it has answered.
        is_leaving: whether its removal was asked for, of a device that the hypervisor itself does not tell from others.
    """

    bus: str
    slot: int
    serial: str
    spec: DeviceSpec
    place: str = ""
    storage_options: str = ""
    daemon: ProcessIdentity | None = None
    hypervisor_id: str = ""
    is_leaving: bool = False


class VmRecord(msgspec.Struct, kw_only=True):
    """A VM on disk.

    Attributes:
        sandbox_id: whose VM.
        request_id: the request that it was made for.
        config: what it is started with; None if the file could not be read.
        is_held: whether its boot waits for ``resume_vm``.
        device_manager: bus name of the shard of the device manager that it belongs to, for life.
        vm: what callers are told, or None while it is being started.
        next_device: number of the next device; only ever grows, so that no id is used twice in one VM.
        vsock_daemon: the process by which the guest is reached, if it is one.
        devices: by our name for each, which is the hypervisor's id where we choose that.
    """

    sandbox_id: str
    request_id: str = ""
    config: HypervisorConfig | None = None
    is_held: bool = False
    device_manager: str = shards.FIRST
    vm: Vm | None = None
    next_device: int = 1
    vsock_daemon: ProcessIdentity | None = None
    devices: dict[str, DeviceRecord] = {}

    def enter(self, request: AddDevice, prefix: str) -> str:
        """Enter a device that is about to be plugged; return our name for it, which this VM never had.

        The slot is looked at here, since a hypervisor may not notice that it is taken, or leak what it then refuses.

        Raises:
            AlreadyExistsError: the slot is taken.
        """
        for name, device in self.devices.items():
            if (device.bus, device.slot) == (request.bus, request.slot):
                held = device.hypervisor_id or name
                raise AlreadyExistsError(f"slot {request.slot} of hotplug bus {request.bus} holds {held}")
        name = f"{prefix}{self.next_device}"
        self.next_device += 1
        self.devices[name] = DeviceRecord(bus=request.bus, slot=request.slot, serial=request.serial, spec=request.spec)
        self.save()
        return name

    def name_of(self, serial: str) -> str | None:
        """Return our name for the device of an attach, if it is in the record."""
        return next((name for name, device in self.devices.items() if device.serial == serial), None)

    def save(self) -> None:
        """Write the record so that a reader sees the old one or the new one.

        Raises:
            FileNotFoundError: the sandbox has been cleaned up.
        """
        directory = Path(paths.vm_dir(self.sandbox_id))
        temporary = directory / "vm.json.new"
        with temporary.open("wb") as file:
            file.write(msgspec.json.encode(self))
        temporary.rename(directory / "vm.json")


def load_all() -> Iterator[VmRecord]:
    """Yield the record of every VM of this host; one that cannot be read counts as half-made."""
    for file in sorted(Path(paths.sandboxes_dir()).glob("*/vm/vm.json")):
        try:
            yield msgspec.json.decode(file.read_bytes(), type=VmRecord)
        except FileNotFoundError:
            continue  # its sandbox was just cleaned up
        except msgspec.MsgspecError:
            yield VmRecord(sandbox_id=file.parent.parent.name)
