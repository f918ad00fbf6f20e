"""A root file system that the guest mounts itself, from disks, instead of the host from files.

containerd describes a root file system as mounts. If there is one only, of a file system that the guest has too, and it
lies on a block device (devmapper) or in a file that a loop device would make one (blockfile), the guest gets the device
or the file as a disk. If there are layers (:mod:`procs.shim.layers`) and all of them are like that, each is a disk, and
the guest joins them. ``disable_block_device_use`` turns that off; its default is upstream's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from common.protocols.agent import CONTAINERS_DIRECTORY, OVERLAY_DIRECTORY, Storage
from common.services.vmm import BlockSpec
from procs.shim import layers
from procs.shim.disk import Disk, is_block_device

if TYPE_CHECKING:
    from collections.abc import Sequence

    from common.config import BlockDriver, HypervisorSection
    from common.protocols.task import Mount
    from procs.shim.layers import Layers

_GUEST_FILE_SYSTEMS = frozenset(("ext4", "erofs", "xfs"))
_READ_ONLY_FILE_SYSTEMS = frozenset(("erofs",))
_LOOP = "loop"
_DEVICE = "device="
"""How the option of erofs begins that names another file with its data (Documentation/filesystems/erofs.rst)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Root:
    """A root file system that the guest mounts.

    Attributes:
        disks: what it is on.
        storages: what is made of them.
        path: where the guest has it.
    """

    disks: list[Disk]
    path: str
    storages: list[Storage] = field(default_factory=list)


def on_disks(rootfs: Sequence[Mount], container_id: str, config: HypervisorSection) -> Root | None:
    """Return the disks that mounts describe, or None if the host is to mount them.

    Raises:
        KataError: they ask for what nobody here can do.
    """
    stack = layers.of(rootfs)
    wanted = rootfs if stack is None else stack.below
    if config.disable_block_device_use or not wanted or not all(map(_is_disk, wanted)):
        return None
    directory, driver = f"{CONTAINERS_DIRECTORY}/{container_id}", config.block_device_driver
    path = f"{directory}/rootfs"
    if stack is not None:
        return _of_layers(stack, directory, path, driver)
    return Root(disks=[_disk(rootfs[0], path, driver)], path=path) if len(rootfs) == 1 else None


def _of_layers(stack: Layers, directory: str, path: str, driver: BlockDriver) -> Root | None:
    """Return layers that the guest joins, if nothing of the host is among them."""
    places = [f"{directory}/layers/{number}" for number in range(len(stack.below))]
    filled = stack.at(places)
    paths = [option.partition("=")[2] for option in filled.top.options]
    if filled.top.type != "overlay" or not all(path.startswith(f"{directory}/") for path in paths if "/" in path):
        return None
    joined = Storage(
        driver="overlayfs",
        driver_options=[f"{OVERLAY_DIRECTORY}={made}" for made in filled.directories],
        source=filled.top.source,
        fstype=filled.top.type,
        options=filled.top.options,
        mount_point=path,
    )
    disks = [_disk(mount, place, driver) for mount, place in zip(stack.below, places, strict=True)]
    return Root(disks=disks, path=path, storages=[joined])


def _disk(mount: Mount, mount_point: str, driver: BlockDriver) -> Disk:
    is_read_only = mount.type in _READ_ONLY_FILE_SYSTEMS or "ro" in mount.options
    return Disk(
        spec=BlockSpec(source=mount.source, is_read_only=is_read_only, driver=driver),
        fstype=mount.type,
        options=tuple(option for option in mount.options if option != _LOOP),
        mount_point=mount_point,
    )


def _is_disk(mount: Mount) -> bool:
    if mount.target or mount.type not in _GUEST_FILE_SYSTEMS or any(o.startswith(_DEVICE) for o in mount.options):
        return False
    is_image = _LOOP in mount.options or mount.type == "erofs"
    return is_block_device(mount.source) or (is_image and Path(mount.source).is_file())
