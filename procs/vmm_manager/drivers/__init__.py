"""What a hypervisor must be able to do for us; one folder per hypervisor below.

A driver starts VMs and takes over running ones; a machine is one VM. What only some hypervisors can do is said by
:class:`Capabilities`, as data, so that no caller asks which hypervisor it is. What drivers have in common lies beside
this file: ``spawn`` and ``output`` (processes that outlive us), ``virtiofsd`` and ``daemons`` (shared directories),
``lines`` (of logs), ``probe`` (whether KVM works), ``http`` (APIs over a Unix socket), ``sources`` (disks' files).
"""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from common.config import HypervisorConfig
    from common.services.vmm import AddDevice, AddedDevice, MemoryMode, PresentDevice, Vm
    from common.workers import Workers
    from procs.vmm_manager.record import VmRecord
    from procs.vmm_manager.snapshots import Snapshot

DRIVERS = {
    "firecracker": "procs.vmm_manager.drivers.firecracker.driver:FirecrackerDriver",
    "qemu": "procs.vmm_manager.drivers.qemu.driver:QemuDriver",
    "clh": "procs.vmm_manager.drivers.cloud_hypervisor.driver:ClhDriver",
}
"""Where the driver of each hypervisor is, by the name of its section in the configuration; a manager imports one."""

RUNNING, PAUSED = "running", "paused"
"""A machine's runstate while its guest's processors run, and while they are stopped (:meth:`Machine.runstate`)."""

TAIL_SIZE = 4096
"""Bytes of a log or console that are shown to people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a hypervisor can do.

    Attributes:
        devices: kinds of devices that can be hot-plugged, by the type that describes one.
        memory_modes: how a VM that is restored from a snapshot can get its memory; none if it takes no snapshots.
        can_hold: whether a VM can wait with its boot, so that devices are plugged before.
    """

    devices: tuple[type, ...]
    memory_modes: tuple[MemoryMode, ...] = ()
    can_hold: bool = False


class Devices(Protocol):
    """The devices of one VM that come and go while it runs."""

    async def find(self, serial: str) -> AddedDevice | None:
        """Return the device of an attach, if the hypervisor has it."""

    async def add(self, request: AddDevice) -> AddedDevice:
        """Plug a device; it is in the record before the hypervisor hears of it."""

    async def remove(self, hypervisor_id: str) -> None:
        """Ask the guest to let a device go; returns when the request is accepted."""

    async def present(self) -> list[PresentDevice]:
        """Return the hypervisor's own list of hot-plugged devices."""


class Machine(Protocol):
    """One running VM."""

    @property
    def vm(self) -> Vm:
        """What callers are told of it."""

    @property
    def devices(self) -> Devices:
        """Its devices."""

    @property
    def is_running(self) -> bool:
        """Whether its VMM lives."""

    @property
    def counters(self) -> Mapping[str, Mapping[str, int]]:
        """What the VMM counts of itself, by group and name; nothing if it does not."""

    async def runstate(self) -> str:
        """Return the hypervisor's word for the VM's state: :data:`RUNNING`, :data:`PAUSED` or another."""

    async def pause(self) -> None:
        """Have a running guest's processors stopped; nothing in it goes on, and it lets no device go."""

    async def resume(self) -> None:
        """Have a paused guest's processors go on."""

    async def console_tail(self) -> str:
        """Return the last of what the guest printed, made safe to show; also after the VM's end."""

    def log_tail(self) -> str:
        """Return the last of what the VMM itself printed, made safe to show; also after its end."""

    async def wait_end(self) -> None:
        """Wait until the VMM is gone."""


@runtime_checkable
class SnapshotMachine(Machine, Protocol):
    """A running VM that can be written into a directory."""

    @property
    def config(self) -> HypervisorConfig:
        """What it was started with."""

    async def snapshot(self, directory: str) -> None:
        """Write the VM, which is paused, into a directory; what is left of a failure is the caller's to remove."""


class Restoring(NamedTuple):
    """What a VM is to be restored from, and how it gets its memory."""

    snapshot: Snapshot
    memory: MemoryMode


class Driver(Protocol):
    """One kind of hypervisor."""

    name: str
    capabilities: Capabilities

    async def prepare(self) -> None:
        """Do at the manager's start, beside all else, what the first VM would have to wait for."""

    async def start(
        self,
        record: VmRecord,
        workers: Workers,
        on_removed: Callable[[str], None],
        restoring: Restoring | None = None,
    ) -> Machine:
        """Start a VM with the record's configuration, in its directory and cgroup.

        Args:
            record: of the new VM, which the machine keeps up to date.
            workers: who runs what the machine does in the background.
            on_removed: called with the hypervisor's id of each device that is gone.
            restoring: what it is to go on from, instead of a boot; only if the capabilities have its mode.
        """

    async def adopt(self, record: VmRecord, workers: Workers, on_removed: Callable[[str], None]) -> Machine | None:
        """Take over the running VM of a record; None if there is none."""


def driver_of(hypervisor: str) -> Driver:
    """Return a driver of the hypervisor with this name.

    Raises:
        KeyError: there is none.
    """
    driver: Driver = pkgutil.resolve_name(DRIVERS[hypervisor])()
    return driver
