"""An NVMe disk of the host that nobody needs, to be lent to a guest whole: ``deploy/kvm_host.py --spare-disk`` has one.

Sources: Documentation/ABI/testing/sysfs-bus-pci of Linux (``driver_override``, ``unbind``, ``drivers_probe``).
"""

from __future__ import annotations

import os
import socket
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SERIAL = "pykata-spare-disk"
"""Of that disk and no other: what is on it is lost."""
_DEVICES = Path("/sys/bus/pci/devices")
_TIMEOUT_S = 60
# <linux/netlink.h>, and the group of lib/kobject_uevent.c
_NETLINK_KOBJECT_UEVENT = 15
_OF_THE_KERNEL = 1


class SpareDisk:
    """That disk.

    Attributes:
        address: of its PCI device.
        group: its IOMMU group.
    """

    def __init__(self, device: Path) -> None:
        self.address = device.name
        self.group = (device / "iommu_group").readlink().name
        self._device = device

    def write(self, data: bytes) -> None:
        """Have this at the beginning of the disk."""
        node = os.open(self._node(), os.O_WRONLY | os.O_SYNC)
        try:
            os.write(node, data.ljust(512))
        finally:
            os.close(node)

    def read(self, size: int) -> bytes:
        """Return what the disk begins with."""
        with self._node().open("rb") as node:
            return node.read(size)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """The disk as vfio-pci's, and then the host's again."""
        self._bind("vfio-pci")
        try:
            yield
        finally:
            self._bind("")

    def _bind(self, driver: str) -> None:
        (self._device / "driver_override").write_text(f"{driver}\n")
        (self._device / "driver/unbind").write_text(self.address)
        Path("/sys/bus/pci/drivers_probe").write_text(self.address)

    def _node(self) -> Path:
        """Return the disk's node; the driver looks for disks in the background, and the kernel tells what is new."""
        with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_KOBJECT_UEVENT) as news:
            news.bind((0, _OF_THE_KERNEL))
            news.settimeout(_TIMEOUT_S)
            while not (found := list(self._device.glob("nvme/nvme*/nvme*n1"))):
                news.recv(1)
        return Path("/dev") / found[0].name


def spare_disk() -> SpareDisk | None:
    """Return the host's spare disk, which says of itself that it is one, if there is an IOMMU before it."""
    for device in sorted(_DEVICES.iterdir()):
        serials = {file.read_text().strip() for file in device.glob("nvme/nvme*/serial")}
        if serials == {SERIAL} and (device / "iommu_group").exists():
            return SpareDisk(device)
    return None
