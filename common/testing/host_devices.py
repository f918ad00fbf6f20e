"""PCI devices of a host that has an IOMMU, as a directory that looks like what its kernel shows."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from common import paths
from common.testing.isolation import variable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GPU, SOUND, PORT, DISK = "0000:3b:00.0", "0000:3b:00.1", "0000:3a:01.0", "0000:01:00.0"
GROUP = "12"
NUMBER = (241, 3)
"""Of the character device of :data:`GROUP`."""
VFIO_NUMBER = (10, 196)
"""Of ``/dev/vfio/vfio`` (Documentation/admin-guide/devices.txt: 10 is for miscellaneous devices)."""


class HostDevices:
    """A kernel's view of PCI devices, which are made one by one.

    Attributes:
        sysfs: where it is.
    """

    def __init__(self, sysfs: Path) -> None:
        self.sysfs = sysfs

    def add(self, address: str, group: str = "", driver: str = "", kind: str = "0x030200") -> Path:
        """Add a device; return its directory.

        Args:
            address: its own.
            group: its IOMMU group, if it has one.
            driver: who drives it.
            kind: its class.
        """
        device = self.sysfs / "devices" / address
        device.mkdir(parents=True)
        (device / "class").write_text(f"{kind}\n")
        self._link(self.sysfs / "bus/pci/devices" / address, device)
        if driver:
            self.bind(address, driver)
        if group:
            members = self.sysfs / "kernel/iommu_groups" / group / "devices"
            self._link(members / address, device)
            self._link(device / "iommu_group", members.parent)
        return device

    def bind(self, address: str, driver: str) -> None:
        """Have a device driven by somebody else, or by nobody."""
        link = self.sysfs / "devices" / address / "driver"
        link.unlink(missing_ok=True)
        if driver:
            self._link(link, self.sysfs / "bus/pci/drivers" / driver)

    def add_node(self, major: int, minor: int, name: str) -> None:
        """Add a character device, by its name below ``/dev``."""
        directory = self.sysfs / f"dev/char/{major}:{minor}"
        directory.mkdir(parents=True)
        (directory / "uevent").write_text(f"MAJOR={major}\nMINOR={minor}\nDEVNAME={name}\n")

    def _link(self, link: Path, target: Path) -> None:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)


def a_workstation(sysfs: Path) -> HostDevices:
    """Return a GPU and its sound in one group, behind a port of the host, and a disk that the host uses."""
    made = HostDevices(sysfs)
    made.add(GPU, GROUP, "vfio-pci")
    made.add(SOUND, GROUP, "vfio-pci", "0x040300")
    made.add(PORT, GROUP, "pcieport", "0x060400")
    made.add(DISK, "7", "nvme", "0x010802")
    made.add_node(*NUMBER, f"vfio/{GROUP}")
    made.add_node(*VFIO_NUMBER, "vfio/vfio")
    return made


@contextmanager
def a_host_with_devices(sysfs: Path) -> Iterator[HostDevices]:
    """Have this process, and those that it starts, see the devices of :func:`a_workstation`."""
    with variable(paths.SYSFS_VARIABLE, str(sysfs)):
        yield a_workstation(sysfs)
