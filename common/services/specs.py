"""What can be plugged into a VM: one type a kind, told apart on the wire by ``kind``.

Each says in its own words what the managers need of it and what is the same for all kinds: where it fits
(``bus_kind``), what is behind it (``source``), how (``mode``), whether that is something that the host has once
(``is_claimed``), and whether a sandbox has it for itself then (``is_exclusive``).
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

import msgspec

from common.config.hypervisors import BlockDriver


class BusKind(StrEnum):
    """What fits into a hotplug bus."""

    PCI = "pci"
    PCIE = "pcie"
    SCSI = "scsi"
    MMIO = "mmio"
    CPU = "cpu"
    MEMORY = "memory"
    MMIO_READ_ONLY = "mmio-read-only"
    MMIO_NETWORK = "mmio-network"


class ShareSpec(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="share"):
    """A directory shared with the guest by virtio-fs.

    Attributes:
        source: host directory.
        tag: virtio-fs tag, at most 36 bytes (virtio 1.2, 5.11.4).
    """

    source: str
    tag: str

    bus_kind: ClassVar[BusKind] = BusKind.PCI
    is_claimed: ClassVar[bool] = False
    is_exclusive: ClassVar[bool] = False

    @property
    def mode(self) -> str:
        """How it is attached, in words that tell any two ways apart."""
        return f"with tag {self.tag}"


_BLOCK_BUSES = {
    BlockDriver.VIRTIO_BLK: (BusKind.PCI, BusKind.PCI),
    BlockDriver.VIRTIO_SCSI: (BusKind.SCSI, BusKind.SCSI),
    BlockDriver.VIRTIO_MMIO: (BusKind.MMIO, BusKind.MMIO_READ_ONLY),
}
"""The buses of a disk that can be written, and of one that cannot."""


class BlockSpec(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="block"):
    """A disk of the guest.

    Attributes:
        source: the host's block device, or a regular file with the disk's bytes and nothing else (raw).
        is_read_only: whether the guest may only read it; the file is then opened for reading only.
        driver: how the guest drives it.
    """

    source: str
    is_read_only: bool = False
    driver: BlockDriver = BlockDriver.VIRTIO_BLK

    is_claimed: ClassVar[bool] = True

    @property
    def bus_kind(self) -> BusKind:
        """The kind of bus that it fits into."""
        return _BLOCK_BUSES[self.driver][self.is_read_only]

    @property
    def mode(self) -> str:
        """How it is attached, in words that tell any two ways apart."""
        return f"{'read-only' if self.is_read_only else 'read-write'} by {self.driver}"

    @property
    def is_exclusive(self) -> bool:
        """Whether no other sandbox may have it: what is written, one writes alone."""
        return not self.is_read_only


class PmemSpec(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="pmem"):
    """A file that the guest has as persistent memory: it maps the host's pages and keeps no copy of them.

    Attributes:
        source: a regular file. Guests map in steps of 2 MiB (``SUBSECTION_SIZE``, include/linux/mmzone.h), so its size
            is a multiple of that.
        is_read_only: whether what the guest writes does not reach the file.
    """

    source: str
    is_read_only: bool = False

    bus_kind: ClassVar[BusKind] = BusKind.PCI
    is_claimed: ClassVar[bool] = True

    @property
    def mode(self) -> str:
        """How it is attached, in words that tell any two ways apart."""
        return f"{'read-only' if self.is_read_only else 'read-write'} as persistent memory"

    @property
    def is_exclusive(self) -> bool:
        """Whether no other sandbox may have it: what is written, one writes alone."""
        return not self.is_read_only


class VhostUserDiskSpec(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="vhost-user-blk"):
    """A disk of the guest that a program of the host serves, by vhost-user, from and to the guest's memory.

    What it is, how large and whether it can be written, is that program's to say, and so is its serial.

    Attributes:
        source: the program's Unix socket, on which it listens.
    """

    source: str

    bus_kind: ClassVar[BusKind] = BusKind.PCI
    is_claimed: ClassVar[bool] = True
    is_exclusive: ClassVar[bool] = True
    mode: ClassVar[str] = "by vhost-user"


class VfioSpec(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="vfio"):
    """A PCI device of the host that the guest has whole. Its IOMMU group belongs to one sandbox.

    Attributes:
        source: its address on the host, for example ``0000:3b:00.0``; it is bound to vfio-pci.
        is_express: whether it goes to a PCI Express root port, behind which a guest sees all of its configuration, and
            not to where virtio devices go.
    """

    source: str
    is_express: bool = False

    is_claimed: ClassVar[bool] = True
    is_exclusive: ClassVar[bool] = True

    @property
    def bus_kind(self) -> BusKind:
        """The kind of bus that it fits into."""
        return BusKind.PCIE if self.is_express else BusKind.PCI

    @property
    def mode(self) -> str:
        """How it is attached, in words that tell any two ways apart."""
        return f"by VFIO {'at a root port' if self.is_express else 'as PCI'}"


class VsockSpec(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="vsock"):
    """A socket device of the guest (virtio 1.2, 5.10) that ends in the host's kernel: vsock(7) for what runs in it.

    It is not the way to the guest's agent, which a VM has from its boot.

    Attributes:
        cid: the guest's address, which the host has once.
    """

    cid: int

    bus_kind: ClassVar[BusKind] = BusKind.PCI
    is_claimed: ClassVar[bool] = True
    is_exclusive: ClassVar[bool] = True
    mode: ClassVar[str] = "by the host's kernel"

    @property
    def source(self) -> str:
        """What is behind it, for people."""
        return f"vsock address {self.cid}"


class InterfaceKind(StrEnum):
    """What a network device of a guest is connected to on the host."""

    TAP = "tap"
    MACVTAP = "macvtap"


class NetworkSpec(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="network"):
    """A network device of the guest, on an interface of the host.

    Attributes:
        namespace: path of the network namespace that the interface is in, for example ``/var/run/netns/pod1``.
        interface: its name there. A tap is made if it is not there, and goes with the device then; a macvtap has to be.
        type: which of the two it is.
        mac: the address that the guest sees, six hexadecimal bytes with colons; empty for one of this attach and no
            other. A macvtap passes on what is for its own address, so that one is to be said.
    """

    namespace: str
    interface: str
    type: InterfaceKind = InterfaceKind.TAP
    mac: str = ""

    bus_kind: ClassVar[BusKind] = BusKind.PCI
    is_claimed: ClassVar[bool] = True
    is_exclusive: ClassVar[bool] = True

    @property
    def source(self) -> str:
        """What is behind it, for people."""
        return f"{self.namespace}:{self.interface}"

    @property
    def mode(self) -> str:
        """How it is attached, in words that tell any two ways apart."""
        return f"as {self.type} with {self.mac or 'a MAC of its own'}"

    def address(self, serial: str) -> str:
        """Return the MAC address that the guest sees, for an attach with this serial.

        One that is made up is unicast and locally administered (IEEE 802-2014, 8.4.4).
        """
        return self.mac or ":".join(["02", *(serial[-10:][at : at + 2] for at in range(0, 10, 2))])


class CpuSpec(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="cpu"):
    """A processor of the guest beside those that it booted with. The guest has to take it into use.

    Attributes:
        number: which of them, from 1: whoever asks again for the same one gets the same one.
    """

    number: int

    bus_kind: ClassVar[BusKind] = BusKind.CPU
    is_claimed: ClassVar[bool] = False
    is_exclusive: ClassVar[bool] = False
    mode: ClassVar[str] = ""

    @property
    def source(self) -> str:
        """What it is, for people."""
        return f"processor {self.number}"


class MemorySpec(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="memory"):
    """Memory of the guest beside that which it booted with. The guest has to take it into use.

    Attributes:
        number: which module, from 1: whoever asks again for the same one gets the same one.
        size_mib: how much. A guest adds and removes memory in blocks, on x86-64 of 128 MiB.
    """

    number: int
    size_mib: int

    bus_kind: ClassVar[BusKind] = BusKind.MEMORY
    is_claimed: ClassVar[bool] = False
    is_exclusive: ClassVar[bool] = False

    @property
    def source(self) -> str:
        """What it is, for people."""
        return f"memory {self.number}"

    @property
    def mode(self) -> str:
        """How it is attached, in words that tell any two ways apart."""
        return f"with {self.size_mib} MiB"


def bus_kinds(spec: DeviceSpec) -> tuple[BusKind, ...]:
    """Return the kinds of buses that a device fits into; a VM has one of them at most."""
    return (spec.bus_kind, BusKind.MMIO_NETWORK) if isinstance(spec, NetworkSpec) else (spec.bus_kind,)


_PINNING_S = 100.0


def extra_s(spec: DeviceSpec) -> float:
    """Return how much longer than another device one may take to be plugged, in seconds.

    With a device of the host that reaches the guest's memory the kernel pins all of that, page by page, before the
    hypervisor answers (``vfio_iommu_type1_dma_map`` of Linux): 512 MiB took 11 s on an emulated host.
    """
    return _PINNING_S if isinstance(spec, VfioSpec) else 0.0


DeviceSpec = (
    ShareSpec | BlockSpec | PmemSpec | VhostUserDiskSpec | VfioSpec | VsockSpec | NetworkSpec | CpuSpec | MemorySpec
)
