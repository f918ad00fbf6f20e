"""``[hypervisor.X]``: the sections that say how a VM is made, one type each; the section is the choice of hypervisor.

Names of sections and keys, and the defaults, are upstream's (Kata Containers 4.1.0, ``configuration-qemu.toml.in``,
``-clh.toml.in``, ``-fc.toml.in``). Ours differs where a guest of QEMU drives disks: upstream's default is
``virtio-scsi``, a controller and three modules more.

The types travel in ``create_vm`` and lie in a VM's record, told apart by ``hypervisor``. Who needs only what all of
them have takes :class:`HypervisorSection`.
"""

from __future__ import annotations

import os
from enum import StrEnum
from typing import Self

import msgspec

MAX_ROOT_PORTS = 16
"""Each takes address space and time at boot; the limit is upstream's."""


class BlockDriver(StrEnum):
    """``block_device_driver``: how a guest drives a disk."""

    VIRTIO_BLK = "virtio-blk"
    VIRTIO_SCSI = "virtio-scsi"
    VIRTIO_MMIO = "virtio-mmio"


class BlockAio(StrEnum):
    """``block_device_aio``: how QEMU does a disk's input and output."""

    THREADS = "threads"
    NATIVE = "native"
    IO_URING = "io_uring"


class VfioPort(StrEnum):
    """``hot_plug_vfio``: where a device of the host goes in a VM; ``no-port``: nowhere, no container gets one."""

    NO_PORT = "no-port"
    ROOT_PORT = "root-port"
    BRIDGE_PORT = "bridge-port"
    SWITCH_PORT = "switch-port"


class ExtraMonitor(StrEnum):
    """``extra_monitor_socket``: a second monitor of QEMU for people, beside ours; only with ``enable_debug``."""

    NONE = ""
    HMP = "hmp"
    QMP = "qmp"
    QMP_PRETTY = "qmp-pretty"


class HypervisorSection(msgspec.Struct, frozen=True, kw_only=True, tag_field="hypervisor"):
    """What every hypervisor's section has. Memory is in MiB."""

    path: str
    kernel: str = "/usr/share/kata-containers/vmlinux.container"
    initrd: str = ""
    kernel_params: str = ""
    default_vcpus: int = 1
    default_memory: int = 2048
    disable_block_device_use: bool = True
    block_device_driver: BlockDriver = BlockDriver.VIRTIO_BLK
    guest_hook_path: str = ""
    enable_debug: bool = False

    @property
    def name(self) -> str:
        """The section's name, which is the hypervisor's everywhere."""
        return str(self.__struct_config__.tag)

    @property
    def can_share(self) -> bool:
        """Whether this hypervisor shares directories of the host with its guest."""
        return False

    @property
    def vfio_port(self) -> VfioPort:
        """Where devices of the host go in a VM."""
        return VfioPort.NO_PORT

    @property
    def has_root_ports_for_vfio(self) -> bool:
        """Whether that is a bus of its own (``BusKind.PCIE``), and not the one where virtio devices go."""
        return False

    @property
    def is_vfio_cold(self) -> bool:
        """Whether they are there when the guest boots."""
        return False

    def with_root_ports(self, _count: int) -> Self:
        """Return the section with at least so many root ports, if devices go there and as far as there can be."""
        return self


class VirtioFsSection(HypervisorSection, frozen=True, kw_only=True):
    """What the section of a hypervisor has that shares directories with its guest."""

    virtio_fs_daemon: str = "/usr/libexec/virtiofsd"
    virtio_fs_cache: str = "auto"
    virtio_fs_extra_args: tuple[str, ...] = ()

    @property
    def can_share(self) -> bool:
        """That it does."""
        return True


class GrowingSection(VirtioFsSection, frozen=True, kw_only=True):
    """What the section of a hypervisor has whose VMs can have more than disks and shares after their boot.

    That is processors, memory, and devices of the host (docs/adr/0032-a-containers-iommu-groups.md). A maximum of 0 is
    what the VM boots with, and not what the host has as upstream has it
    (docs/adr/0028-processors-and-memory-are-devices.md).
    """

    default_maxvcpus: int = 0
    default_maxmemory: int = 0
    memory_slots: int = 10
    hot_plug_vfio: VfioPort = VfioPort.NO_PORT
    cold_plug_vfio: VfioPort = VfioPort.NO_PORT

    @property
    def max_vcpus(self) -> int:
        """How many processors a VM can ever have."""
        return max(self.default_vcpus, min(self.default_maxvcpus, os.cpu_count() or 1))

    @property
    def max_memory(self) -> int:
        """How much memory a VM can ever have."""
        host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
        return max(self.default_memory, min(self.default_maxmemory, host))

    @property
    def vfio_port(self) -> VfioPort:
        """Where devices of the host go; only one of the two keys says so."""
        return self.cold_plug_vfio if self.is_vfio_cold else self.hot_plug_vfio

    @property
    def is_vfio_cold(self) -> bool:
        """Whether they are there when the guest boots."""
        return self.cold_plug_vfio is not VfioPort.NO_PORT

    @property
    def may_grow(self) -> bool:
        """Whether a VM can have memory beside that of its boot."""
        return self.memory_slots > 0 and self.max_memory > self.default_memory


class QemuConfig(GrowingSection, frozen=True, kw_only=True, tag="qemu"):
    """``[hypervisor.qemu]``. ``vhost_user_vsock_daemon`` is ours: a vhost-device-vsock; empty if there is none."""

    path: str = "/usr/bin/qemu-system-x86_64"
    machine_type: str = "q35"
    default_bridges: int = 1
    pcie_root_port: int = 0
    block_device_aio: BlockAio = BlockAio.IO_URING
    block_device_cache_set: bool = False
    block_device_cache_direct: bool = False
    block_device_cache_noflush: bool = False
    seccompsandbox: str = ""
    extra_monitor_socket: ExtraMonitor = ExtraMonitor.NONE
    vhost_user_vsock_daemon: str = ""

    @property
    def has_root_ports_for_vfio(self) -> bool:
        """Whether it is so said."""
        return self.vfio_port is VfioPort.ROOT_PORT

    def with_root_ports(self, count: int) -> Self:
        """Return the section with at least so many root ports, if devices go there and as far as there can be."""
        if not self.has_root_ports_for_vfio:
            return self
        return msgspec.structs.replace(self, pcie_root_port=max(self.pcie_root_port, min(count, MAX_ROOT_PORTS)))


class ClhConfig(GrowingSection, frozen=True, kw_only=True, tag="clh"):
    """``[hypervisor.clh]``: Cloud Hypervisor. ``hypervisor_loglevel`` is how often ``-v`` is given, at most 3.

    ``default_bridges`` is how many PCI segments a VM has, each with a bus of 31 slots; upstream's VMs have two, always.
    ``disable_landlock`` is ours too: else a VMM opens only what its VM needs, where the kernel can enforce that.
    With ``enable_virtio_mem`` memory that came after the boot can go again; without, it comes by ACPI and stays.
    """

    path: str = "/usr/bin/cloud-hypervisor"
    default_bridges: int = 1
    enable_virtio_mem: bool = False
    virtio_fs_queue_size: int = 1024
    block_device_cache_set: bool = False
    block_device_cache_direct: bool = False
    disable_seccomp: bool = False
    disable_landlock: bool = False
    hypervisor_loglevel: int = 1


class FirecrackerConfig(HypervisorSection, frozen=True, kw_only=True, tag="firecracker"):
    """``[hypervisor.firecracker]``. Without a ``jailer_path`` Firecracker runs as root and sees the whole host.

    Disks are plugged with ``virtio-blk`` (PCI, Firecracker 1.16 and later); with ``virtio-mmio`` each takes the place
    of a placeholder that the VM was started with. ``placeholder_drives`` and ``read_only_placeholder_drives`` say how
    many there are of each kind; these two keys are ours, upstream always has eight that can be written.
    """

    path: str = "/usr/bin/firecracker"
    jailer_path: str = "/usr/bin/jailer"
    disable_block_device_use: bool = False
    block_device_driver: BlockDriver = BlockDriver.VIRTIO_MMIO
    placeholder_drives: int = 8
    read_only_placeholder_drives: int = 4


HypervisorConfig = QemuConfig | ClhConfig | FirecrackerConfig
HYPERVISORS = tuple(str(kind.__struct_config__.tag) for kind in (QemuConfig, ClhConfig, FirecrackerConfig))
"""The hypervisors' names, each also the last part of its VM manager's name on the bus."""
