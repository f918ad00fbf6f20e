"""Disks of the guest for a container: what it mounts of them, and what the agent is told.

A block device of the host that is bound to a place in the container, or that it has a device node of, is always a disk
(docs/adr/0022-a-block-device-is-a-disk.md). Its root file system may be on disks as well (:mod:`procs.shim.rootfs`).
Where the guest finds a disk it is told in two ways, as upstream does: a *storage* is mounted, perhaps the node by
itself, and a *device* gives its numbers to what the specification says of it.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.config import BlockDriver
from common.errors import NotFoundError
from common.protocols import agent
from common.protocols.agent import CONTAINERS_DIRECTORY, Storage
from common.services.vmm import BlockSpec

if TYPE_CHECKING:
    from common.services.device import Device
    from procs.shim.spec import HostDevice, HostMount

_NODE = "bind"

_STORAGES = {
    BlockDriver.VIRTIO_BLK: "blk",
    BlockDriver.VIRTIO_SCSI: "scsi",
    BlockDriver.VIRTIO_MMIO: "mmioblk",
}
"""What upstream's agent calls a storage, or a device, on such a disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk that the guest mounts.

    Attributes:
        spec: the device.
        fstype: its file system, or ``bind`` for its node.
        options: how it is mounted.
        mount_point: where the guest has it.
    """

    spec: BlockSpec
    fstype: str
    options: tuple[str, ...]
    mount_point: str

    def storage(self, plugged: Device) -> Storage:
        """Return what the agent is told of it."""
        return Storage(
            driver=_STORAGES[self.spec.driver],
            driver_options=_options(plugged),
            source=plugged.guest_path,
            fstype=self.fstype,
            options=list(self.options),
            mount_point=self.mount_point,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A disk that a container has a device node of.

    Attributes:
        spec: the device.
        path: the node in the container.
    """

    spec: BlockSpec
    path: str

    def device(self, plugged: Device) -> agent.Device:
        """Return what the agent is told of it."""
        return agent.Device(
            id=plugged.guest_path,
            type=_STORAGES[self.spec.driver],
            container_path=self.path,
            options=_options(plugged),
        )


def released(plugged: Device) -> Storage | None:
    """Return what the agent is told to let go of a disk; None of what is no disk."""
    if not isinstance(plugged.spec, BlockSpec):
        return None
    return Storage(
        driver=_STORAGES[plugged.spec.driver],
        driver_options=_options(plugged),
        source=plugged.guest_path,
        fstype=_NODE,
        mount_point=CONTAINERS_DIRECTORY,
    )


def of_volume(volume: HostMount, container_id: str, driver: BlockDriver) -> Disk:
    """Return the disk of a block device that a container sees at the place of a mount."""
    return Disk(
        spec=BlockSpec(source=volume.source, is_read_only=volume.is_readonly, driver=driver),
        fstype=_NODE,
        options=(_NODE,),
        mount_point=f"{CONTAINERS_DIRECTORY}/{container_id}/{volume.name}",
    )


def of_device(device: HostDevice, driver: BlockDriver) -> Node:
    """Return the disk of a block device that a container has a node of.

    Raises:
        NotFoundError: the host has no such device.
    """
    source = _source(device)
    return Node(spec=BlockSpec(source=source, is_read_only=device.is_readonly, driver=driver), path=device.path)


def is_block_device(path: str) -> bool:
    """Return whether a path of the host leads to a block device."""
    try:
        return stat.S_ISBLK(Path(path).stat().st_mode)
    except OSError:
        return False  # who is to use it will say so


def _source(device: HostDevice) -> str:
    """Return the node of the host's device with a number, as sysfs names it (Documentation/ABI/testing/sysfs-dev)."""
    entry = Path(f"/sys/dev/block/{device.major}:{device.minor}/uevent")
    try:
        properties = dict(line.split("=", 1) for line in entry.read_text().splitlines())
    except OSError as err:
        raise NotFoundError(
            f"device {device.path}: the host has no block device {device.major}:{device.minor}",
            hint="check that it still exists on the host",
        ) from err
    return f"/dev/{properties['DEVNAME']}"


def _options(plugged: Device) -> list[str]:
    return (plugged.storage_options or f"serial={plugged.serial}").split(",")
