"""PCI devices of the host that a guest may have whole, as the host's kernel shows them.

A group (:mod:`common.linux.iommu`) belongs to one sandbox, and nothing of the host may drive any device in it. Bridges
stay the host's.
"""

from __future__ import annotations

import re
from pathlib import Path

from common import paths
from common.errors import NotFoundError, StateError, UnsupportedError, UsageError
from common.linux import iommu

_ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[01][0-9a-f]\.[0-7]")
"""Domain, bus, device, function."""


def group_of(address: str, sysfs: Path | None = None) -> str:
    """Return the IOMMU group of a device that a guest can have now, for example ``12``.

    Args:
        address: as the kernel writes it, for example ``0000:3b:00.0``.
        sysfs: where the kernel shows devices, if not where it always does.

    Raises:
        UsageError: that is no address.
        NotFoundError: there is no such device.
        UnsupportedError: the host cannot keep it apart from others.
        StateError: it, or another one of its group, is in the host's own use.
    """
    if not _ADDRESS.fullmatch(address):
        raise UsageError(f"{address!r} is no PCI address", hint="for example 0000:3b:00.0; `lspci -D` lists them")
    root = Path(paths.sysfs()) if sysfs is None else sysfs
    device = root / "bus/pci/devices" / address
    if not device.is_dir():
        raise NotFoundError(f"this host has no PCI device {address}", hint="`lspci -D` lists them")
    group = _target(device / "iommu_group")
    if not group:
        raise UnsupportedError(
            f"PCI device {address} is in no IOMMU group",
            hint="enable the IOMMU in the firmware, and in the kernel with intel_iommu=on or amd_iommu=on",
        )
    for other in iommu.members(group, root):
        _require_free(other, address, group)
    return group


def _require_free(device: Path, wanted: str, group: str) -> None:
    driver = _target(device / "driver")
    is_wanted = device.name == wanted
    if _is_of_vfio(driver) or (not is_wanted and (not driver or iommu.is_bridge(device))):
        return
    what = f"PCI device {device.name}" + ("" if is_wanted else f", in IOMMU group {group} with {wanted},")
    raise StateError(
        f"{what} is driven by {driver or 'nothing'} and not by vfio-pci",
        hint=f"nothing of the host may use it: `driverctl set-override {device.name} vfio-pci`",
    )


def _is_of_vfio(driver: str) -> bool:
    """Return whether a driver is vfio-pci or a variant of it, such as mlx5_vfio_pci."""
    return driver.replace("-", "_").endswith("vfio_pci")


def _target(link: Path) -> str:
    """Return the last part of where a link leads, or nothing if there is none."""
    return link.readlink().name if link.is_symlink() else ""
