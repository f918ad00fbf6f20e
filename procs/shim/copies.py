"""What a guest gets of the host where the hypervisor shares no directories: copies, made before the container is.

That is enough for what most containers see of the host: ``/etc/resolv.conf``, ``/etc/hosts``, secrets. A copy is not
the file: what the container writes there stays in the guest, and what the host changes later does not come. So a
directory is copied only if the container may not write to it; and both are small, since they become the guest's memory.
Everything else is refused in words. Upstream copies in the same place (Kata Containers 4.1.0, ``fs_share_linux.go``),
and leaves out without an error what it does not copy.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UnsupportedError, UsageError
from common.protocols.agent import SHARE_MOUNT_POINT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from procs.shim.bundle import Wanted
    from procs.shim.spec import HostMount

MAX_BYTES = 1 << 20
"""Of all that one container gets copied."""
MAX_FILES = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """A file, directory or symbolic link for the guest.

    Attributes:
        path: where the guest has it.
        mode: ``st_mode``.
        uid: its owner.
        gid: its group.
        data: what is in the file, or what the link holds.
    """

    path: str
    mode: int
    uid: int
    gid: int
    data: bytes


def with_copies(wanted: Wanted, container_id: str, hypervisor: str) -> Wanted:
    """Return a container that is to be created with what is to be copied for it.

    Raises:
        UnsupportedError: it wants more of the host than copies.
        UsageError: something cannot be read.
    """
    if wanted.rootfs:
        raise UnsupportedError(
            f"the root file system of {container_id} is a directory of the host, which {hypervisor} cannot share",
            hint="use a snapshotter whose root file systems are block devices or image files: devmapper, blockfile, "
            "erofs with its `default_size`",
        )
    found: list[Copy] = []
    for mount in wanted.mounts:
        _require_copyable(mount, hypervisor)
        try:
            for copy in _copies(Path(mount.source), f"{SHARE_MOUNT_POINT}/{container_id}/{mount.name}"):
                found.append(copy)
                _require_small(found, mount)
        except OSError as err:
            raise UsageError(f"cannot read mount source {mount.source}: {err.strerror}") from err
    return replace(wanted, copies=found)


def _require_copyable(mount: HostMount, hypervisor: str) -> None:
    source = Path(mount.source)
    if source.is_file() or (source.is_dir() and mount.is_readonly):
        return
    what = "a directory that the container may write to" if source.is_dir() else "neither a file nor a directory"
    raise UnsupportedError(
        f"mount source {mount.source} is {what}: {hypervisor} shares nothing with its guest, and this cannot be copied",
        hint="mount it read-only (`options=ro`) if a copy will do, or run the container under QEMU or Cloud Hypervisor",
    )


def _require_small(copies: list[Copy], mount: HostMount) -> None:
    size = sum(len(copy.data) for copy in copies)
    if size > MAX_BYTES or len(copies) > MAX_FILES:
        raise UnsupportedError(
            f"mount source {mount.source} is too large to be copied into the guest: at most {MAX_BYTES} bytes in "
            f"{MAX_FILES} files",
            hint="put it on a disk, or run the container under QEMU or Cloud Hypervisor",
        )


def _copies(source: Path, path: str) -> Iterator[Copy]:
    """Yield a file or directory and all that is in it; what is above comes first."""
    found = source.stat()
    yield _copy(source, path, found)
    if stat.S_ISDIR(found.st_mode):
        yield from _inside(source, path)


def _inside(directory: Path, path: str) -> Iterator[Copy]:
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        found = entry.stat(follow_symlinks=False)
        if stat.S_IFMT(found.st_mode) in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
            yield _copy(Path(entry.path), f"{path}/{entry.name}", found)
        if entry.is_dir(follow_symlinks=False):
            yield from _inside(Path(entry.path), f"{path}/{entry.name}")


def _copy(source: Path, path: str, found: os.stat_result) -> Copy:
    data = b""
    if stat.S_ISLNK(found.st_mode):
        data = os.fsencode(source.readlink())
    elif stat.S_ISREG(found.st_mode):
        with source.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    return Copy(path=path, mode=found.st_mode, uid=found.st_uid, gid=found.st_gid, data=data)
