"""The host's side of file sharing: what virtiofsd exports to the guest.

::

    sandboxes/<id>/mounts/<container>/rootfs      mounts are made here; shared, a peer group of its own
    sandboxes/<id>/mounts/<container>/mounts/<n>  what the container sees of the host
    sandboxes/<id>/share/                         the same, read-only and a slave: what virtiofsd exports
    sandboxes/<id>/layers/<container>/<n>         what a root file system of layers is made of, which no guest sees

virtiofsd lives in a mount namespace that it made when it started; a mount made later reaches it by propagation. The
guest must not write where we make mount points, or a link of its making would lead a mount of ours to a place of its
choice: so it sees the tree through ``share/``, in which only the mounts themselves may be writable.

``mounts/`` is made private before it is made shared: a clone of a shared mount joins its peer group, and every mount
below would appear in the original as well. Mounts are made in the host's mount namespace, in threads: unmounting an
overlay writes back what is dirty.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from common import paths
from common.errors import UnsupportedError, UsageError
from common.linux import loop, mounts
from common.protocols.task import Mount
from procs.shim import layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from procs.shim.layers import Layers
    from procs.shim.spec import HostMount

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_LOOP = "loop"
"""The option of mount(8) that means a loop device for the source, which is a file."""


def prepare(sandbox_id: str) -> None:
    """Make ``mounts/`` and ``share/``."""
    inside, exported = paths.mounts_dir(sandbox_id), paths.share_dir(sandbox_id)
    for directory in (inside, exported):
        Path(directory).mkdir(mode=0o700)
    mounts.mount(inside, inside, flags=mounts.MS_BIND)
    mounts.set_propagation(inside, mounts.MS_PRIVATE)
    mounts.set_propagation(inside, mounts.MS_SHARED)
    mounts.mount(inside, exported, flags=mounts.MS_BIND | mounts.MS_RDONLY)
    mounts.set_propagation(exported, mounts.MS_SLAVE)


async def add_container(sandbox_id: str, container_id: str, rootfs: Sequence[Mount], host: Sequence[HostMount]) -> None:
    """Mount a container's root file system, and what it sees of the host, where the guest finds them.

    Raises:
        UsageError: something cannot be mounted; it names what. Nothing of the container stays mounted.
    """
    directory, below = (Path(place(sandbox_id), container_id) for place in (paths.mounts_dir, paths.layers_dir))
    try:
        await asyncio.to_thread(_mount_root, directory / "rootfs", rootfs, below)
        await asyncio.to_thread(_mount_host, directory, host)
    except BaseException:
        for made in (directory, below):
            await asyncio.to_thread(mounts.unmount_below, str(made))
        raise


def _mount_root(root: Path, rootfs: Sequence[Mount], below: Path) -> None:
    root.mkdir(parents=True)
    stack = layers.of(rootfs)
    if stack is None:
        for mount in rootfs:
            _mount_one(mount, root)
        return
    places = [below / str(number) for number in range(len(stack.below))]
    for mount, place in zip(stack.below, places, strict=True):
        place.mkdir(parents=True)
        _mount_one(mount, place)
    with ExitStack() as held:
        _mount_one(_joined(stack.at([str(place) for place in places]), places, held), root)


def _joined(stack: Layers, places: Sequence[Path], held: ExitStack) -> Mount:
    """Return the mount that joins layers, with the directories in them held open.

    A layer that is written may have been a guest's own disk before, so a link in it must lead nowhere.
    """
    made = {path: _hold(Path(path), places, held) for path in stack.directories}

    def safe(path: str) -> str:
        if path not in made and any(path.startswith(f"{place}/") for place in places):
            raise UnsupportedError(f"{path} is in a layer of the root file system, and not to be made there")
        return made.get(path, path)

    options = [option.partition("=") for option in stack.top.options]
    return Mount(
        type=stack.top.type,
        source=safe(stack.top.source),
        target="",
        options=[f"{name}{equals}{safe(value)}" for name, equals, value in options],
    )


def _hold(path: Path, places: Sequence[Path], held: ExitStack) -> str:
    """Make a directory in a layer if it is not there; return a path of it that follows no link."""
    if path.parent not in places:
        raise UnsupportedError(f"directory {path} of the root file system is not in one of its layers")
    layer = os.open(path.parent, _DIRECTORY)
    held.callback(os.close, layer)
    try:
        with suppress(FileExistsError):
            os.mkdir(path.name, layers.DIRECTORY_MODE, dir_fd=layer)
        directory = os.open(path.name, _DIRECTORY, dir_fd=layer)
    except OSError as err:
        raise UsageError(f"cannot make directory {path} of the root file system: {err.strerror}") from err
    held.callback(os.close, directory)
    return f"/proc/self/fd/{directory}"


def _mount_one(mount: Mount, place: Path) -> None:
    if mount.target:
        raise UnsupportedError(f"mount of {mount.source} below the root file system, at {mount.target}")
    flags, data = mounts.parse_options(mount.options)
    _mount(mount.source, place, mount.type, flags, data)


def _mount_host(directory: Path, host: Sequence[HostMount]) -> None:
    for wanted in host:
        target = directory / wanted.name
        _make_mount_point(Path(wanted.source), target)
        flags = (mounts.MS_REC if wanted.is_recursive else 0) | (mounts.MS_RDONLY if wanted.is_readonly else 0)
        _mount(wanted.source, target, "bind", flags, "")


def _make_mount_point(source: Path, target: Path) -> None:
    """Make a directory for a directory and an empty file for all else, since that is what a bind mount wants."""
    target.parent.mkdir(exist_ok=True)
    if source.is_dir():
        target.mkdir()
    else:
        target.touch()


def _mount(source: str, target: Path, fstype: str, flags: int, data: str) -> None:
    if fstype in ("bind", "rbind"):
        flags |= mounts.MS_BIND
    try:
        if _LOOP in data.split(","):
            others = ",".join(option for option in data.split(",") if option != _LOOP)
            with loop.device(source, is_read_only=bool(flags & mounts.MS_RDONLY)) as node:
                mounts.mount(node, str(target), fstype, flags, others)
        else:
            mounts.mount(source, str(target), fstype, flags, data)
    except OSError as err:
        raise UsageError(
            f"cannot mount {fstype} {source} ({data or 'no options'}) on {target}: {err.strerror}",
            hint="the kernel's log (dmesg) may say more",
        ) from err
