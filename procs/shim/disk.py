"""A root file system that the guest mounts itself, from a disk, instead of the host from a file.

containerd describes a root file system as mounts. If there is one only, of a file system that the guest has too, and it
lies on a block device (devmapper, zvols) or in a file that a loop device would make one (blockfile, erofs), the guest
gets the device or the file as a disk. ``disable_block_device_use`` turns that off; its default is upstream's.
"""

from __future__ import annotations

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.config import BlockDriver
from common.protocols.agent import CONTAINERS_DIRECTORY, Storage
from common.services.vmm import BlockSpec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from common.config import HypervisorSection
    from common.protocols.task import Mount
    from common.services.device import Device

_GUEST_FILE_SYSTEMS = frozenset(("ext4", "erofs", "xfs"))
_LOOP = "loop"
_READ_ONLY_FILE_SYSTEMS = frozenset(("erofs",))

_STORAGES = {
    BlockDriver.VIRTIO_BLK: "blk",
    BlockDriver.VIRTIO_SCSI: "scsi",
    BlockDriver.VIRTIO_MMIO: "mmioblk",
}
"""What upstream's agent calls the storage on such a disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """A disk that holds a container's root file system.

    Attributes:
        spec: the device.
        fstype: its file system.
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
            driver_options=(plugged.storage_options or f"serial={plugged.serial}").split(","),
            source=plugged.guest_path,
            fstype=self.fstype,
            options=list(self.options),
            mount_point=self.mount_point,
        )


def of(rootfs: Sequence[Mount], container_id: str, config: HypervisorSection) -> Disk | None:
    """Return the disk that these mounts describe, or None if the host is to mount them."""
    if config.disable_block_device_use or len(rootfs) != 1:
        return None
    (mount,) = rootfs
    if mount.target or mount.type not in _GUEST_FILE_SYSTEMS or not _is_disk(mount):
        return None
    is_read_only = mount.type in _READ_ONLY_FILE_SYSTEMS or "ro" in mount.options
    return Disk(
        spec=BlockSpec(source=mount.source, is_read_only=is_read_only, driver=config.block_device_driver),
        fstype=mount.type,
        options=tuple(option for option in mount.options if option != _LOOP),
        mount_point=f"{CONTAINERS_DIRECTORY}/{container_id}/rootfs",
    )


def _is_disk(mount: Mount) -> bool:
    try:
        mode = Path(mount.source).stat().st_mode
    except OSError:
        return False  # who is to mount it will say so
    return stat.S_ISBLK(mode) or (stat.S_ISREG(mode) and (_LOOP in mount.options or mount.type == "erofs"))
