"""PCI devices of the host that a guest may have whole, as the host's kernel shows them.

What the hardware can keep apart is an *IOMMU group*: one device, or several, of which the kernel gives a guest all or
none. So a group belongs to one sandbox, and nothing of the host may drive any device in it. Bridges stay the host's.

::

    /sys/bus/pci/devices/0000:3b:00.0/driver            -> …/vfio-pci
    /sys/bus/pci/devices/0000:3b:00.0/iommu_group       -> …/iommu_groups/12
    /sys/kernel/iommu_groups/12/devices/0000:3b:00.0

Sources: Documentation/driver-api/vfio.rst, Documentation/ABI/testing/sysfs-kernel-iommu_groups and
Documentation/ABI/testing/sysfs-bus-pci of Linux; PCI Code and ID Assignment Specification, base class 06h.
"""

from __future__ import annotations

import re
from pathlib import Path

from common.errors import NotFoundError, StateError, UnsupportedError, UsageError

_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")
"""Domain, bus, device, function."""
_BRIDGES = "0x06"
"""The beginning of a bridge's class."""


def group_of(address: str, sysfs: Path = Path("/sys")) -> str:
    """Return the IOMMU group of a device that a guest can have now, for example ``12``.

    Args:
        address: as the kernel writes it, for example ``0000:3b:00.0``.
        sysfs: where the kernel shows devices.

    Raises:
        UsageError: that is no address.
        NotFoundError: there is no such device.
        UnsupportedError: the host cannot keep it apart from others.
        StateError: it, or another one of its group, is in the host's own use.
    """
    if not _ADDRESS.fullmatch(address):
        raise UsageError(f"{address!r} is no PCI address", hint="for example 0000:3b:00.0; `lspci -D` lists them")
    device = sysfs / "bus/pci/devices" / address
    if not device.is_dir():
        raise NotFoundError(f"this host has no PCI device {address}", hint="`lspci -D` lists them")
    group = _target(device / "iommu_group")
    if not group:
        raise UnsupportedError(
            f"PCI device {address} is in no IOMMU group",
            hint="enable the IOMMU in the firmware, and in the kernel with intel_iommu=on or amd_iommu=on",
        )
    for other in sorted((sysfs / "kernel/iommu_groups" / group / "devices").iterdir()):
        _require_free(other, address, group)
    return group


def _require_free(device: Path, wanted: str, group: str) -> None:
    driver = _target(device / "driver")
    is_wanted = device.name == wanted
    if _is_of_vfio(driver) or (not is_wanted and (not driver or _is_bridge(device))):
        return
    what = f"PCI device {device.name}" + ("" if is_wanted else f", in IOMMU group {group} with {wanted},")
    raise StateError(
        f"{what} is driven by {driver or 'nothing'} and not by vfio-pci",
        hint=f"nothing of the host may use it: `driverctl set-override {device.name} vfio-pci`",
    )


def _is_of_vfio(driver: str) -> bool:
    """Return whether a driver is vfio-pci or a variant of it, such as mlx5_vfio_pci."""
    return driver.replace("-", "_").endswith("vfio_pci")


def _is_bridge(device: Path) -> bool:
    return (device / "class").read_text().startswith(_BRIDGES)


def _target(link: Path) -> str:
    """Return the last part of where a link leads, or nothing if there is none."""
    return link.readlink().name if link.is_symlink() else ""
