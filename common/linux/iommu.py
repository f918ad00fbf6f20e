"""IOMMU groups of PCI devices, as the kernel shows them.

What the hardware can keep apart is an *IOMMU group*: one device, or several, of which the kernel gives a program all or
none. Who has the group's character device has its devices.

::

    /sys/bus/pci/devices/0000:3b:00.0/driver            -> …/vfio-pci
    /sys/bus/pci/devices/0000:3b:00.0/iommu_group       -> …/iommu_groups/12
    /sys/kernel/iommu_groups/12/devices/0000:3b:00.0
    /sys/dev/char/241:0/uevent                          DEVNAME=vfio/12

Sources: Documentation/driver-api/vfio.rst, Documentation/ABI/testing/sysfs-kernel-iommu_groups,
Documentation/ABI/testing/sysfs-bus-pci and Documentation/ABI/testing/sysfs-dev of Linux; PCI Code and ID Assignment
Specification, base class 06h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

VFIO = "vfio/"
"""How the names of VFIO's character devices begin, below ``/dev``; behind it is a group, or ``vfio`` itself."""
_BRIDGES = "0x06"
"""The beginning of a bridge's class."""


def vfio_name(major: int, minor: int, sysfs: Path) -> str:
    """Return what a character device is called below ``/dev/vfio``, for example ``12``; nothing if it is not there."""
    try:
        lines = (sysfs / f"dev/char/{major}:{minor}/uevent").read_text().splitlines()
    except OSError:
        return ""
    name = dict(line.split("=", 1) for line in lines if "=" in line).get("DEVNAME", "")
    return name.removeprefix(VFIO) if name.startswith(VFIO) else ""


def members(group: str, sysfs: Path) -> list[Path]:
    """Return the directories of a group's devices, by their addresses.

    Raises:
        FileNotFoundError: there is no such group.
    """
    return sorted((sysfs / "kernel/iommu_groups" / group / "devices").iterdir())


def is_bridge(device: Path) -> bool:
    """Return whether the device of a directory is a bridge."""
    return (device / "class").read_text().startswith(_BRIDGES)
