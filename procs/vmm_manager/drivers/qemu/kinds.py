"""The kinds of devices that QEMU plugs, and what handles each: the table that all else is read from."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from common.services.vmm import (
    BlockSpec,
    CpuSpec,
    MemorySpec,
    NetworkSpec,
    PmemSpec,
    ShareSpec,
    VfioSpec,
    VhostUserDiskSpec,
    VsockSpec,
)
from procs.vmm_manager.drivers.daemons import Daemons
from procs.vmm_manager.drivers.qemu.disks import Disks
from procs.vmm_manager.drivers.qemu.nics import Nics
from procs.vmm_manager.drivers.qemu.parts import Cpus, Memory
from procs.vmm_manager.drivers.qemu.pmem import Pmem
from procs.vmm_manager.drivers.qemu.shares import Shares
from procs.vmm_manager.drivers.qemu.vfio import VfioDevices
from procs.vmm_manager.drivers.qemu.vhost_user_disks import VhostUserDisks
from procs.vmm_manager.drivers.qemu.vsocks import Vsocks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from common.config import QemuConfig
    from common.workers import Workers
    from procs.vmm_manager.drivers.qemu.backends import Backend
    from procs.vmm_manager.drivers.qemu.qmp import Qmp
    from procs.vmm_manager.drivers.spawn import Process
    from procs.vmm_manager.record import VmRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """A running QEMU, as far as its devices need it.

    Attributes:
        record: of the VM.
        config: ``[hypervisor.qemu]``.
        accelerator: ``kvm`` or ``tcg``.
        qmp: its monitor.
        process: its process.
        workers: who runs what watches daemons.
    """

    record: VmRecord
    config: QemuConfig
    accelerator: str
    qmp: Qmp
    process: Process
    workers: Workers


KINDS: Mapping[type, Callable[[Context], Backend]] = MappingProxyType(
    {
        ShareSpec: lambda vm: Shares(Daemons(vm.record, vm.config, vm.process, vm.workers), vm.qmp),
        BlockSpec: lambda vm: Disks(vm.config, vm.qmp),
        PmemSpec: lambda vm: Pmem(vm.config, vm.qmp),
        VhostUserDiskSpec: lambda vm: VhostUserDisks(vm.qmp),
        VfioSpec: lambda _: VfioDevices(),
        VsockSpec: lambda _: Vsocks(),
        NetworkSpec: lambda vm: Nics(vm.qmp),
        CpuSpec: lambda vm: Cpus(vm.config, vm.accelerator, vm.qmp),
        MemorySpec: lambda vm: Memory(vm.qmp),
    }
)


def backends(vm: Context) -> dict[type, Backend]:
    """Return what handles each kind in a VM."""
    return {kind: make(vm) for kind, make in KINDS.items()}
