"""``CopyFile``: files of the host in the guest's copy of the shared directory, where there is no share.

A path is walked part by part from that directory, and no part may be a symbolic link or ``..``: what was copied before
cannot lead out of it. A file comes in pieces and has its name when it is whole.
"""

from __future__ import annotations

import posix

from common import status
from common.protocols.agent import SHARE_MOUNT_POINT, Empty
from guest.agent.files import make_directories
from guest.agent.rpc import RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from common.protocols.guest import CopyFileRequest
    from guest.agent.rpc import Call

_TYPE, _DIRECTORY, _LINK, _REGULAR = 0o170000, 0o040000, 0o120000, 0o100000
_OPEN_DIRECTORY = posix.O_RDONLY | posix.O_DIRECTORY | posix.O_NOFOLLOW | posix.O_CLOEXEC
_MODE = 0o7777


def copy_file(request: CopyFileRequest, _call: Call) -> Empty:
    """Make a directory or a symbolic link, or write a piece of a file.

    Raises:
        RpcError: the path is not below the shared directory, or the kernel refuses.
    """
    *above, name = _parts(request.path)
    try:
        parent = _open_parent(above, request)
        try:
            _make(request, parent, name)
        finally:
            posix.close(parent)
    except OSError as err:
        raise RpcError(status.INTERNAL, f"cannot copy to {request.path}: {err.strerror}") from err
    return Empty()


def _parts(path: str) -> list[str]:
    root, _, rest = path.partition(f"{SHARE_MOUNT_POINT}/")
    parts = rest.split("/")
    if root or not {"", ".", ".."}.isdisjoint(parts):
        raise RpcError(status.INVALID_ARGUMENT, f"{path!r} is not a path below {SHARE_MOUNT_POINT}")
    return parts


def _open_parent(parts: list[str], request: CopyFileRequest) -> int:
    """Open the directory that is named, making what is missing."""
    make_directories(SHARE_MOUNT_POINT)
    directory = posix.open(SHARE_MOUNT_POINT, _OPEN_DIRECTORY)
    for part in parts:
        try:
            _make_directory(request, directory, part, request.dir_mode)
            below = posix.open(part, _OPEN_DIRECTORY, dir_fd=directory)
        finally:
            posix.close(directory)
        directory = below
    return directory


def _make(request: CopyFileRequest, parent: int, name: str) -> None:
    kind = request.file_mode & _TYPE
    if kind == _DIRECTORY:
        _make_directory(request, parent, name, request.file_mode)
        return
    if request.offset == 0:
        _remove(parent, name)
    if kind == _LINK:
        posix.symlink(request.data, name, dir_fd=parent)
        posix.chown(name, request.uid, request.gid, dir_fd=parent, follow_symlinks=False)
    elif kind in (0, _REGULAR):
        _write(request, parent, name)
    else:
        raise RpcError(status.INVALID_ARGUMENT, f"{request.path} is of a type that is not copied ({kind:#o})")


def _make_directory(request: CopyFileRequest, parent: int, name: str, mode: int) -> None:
    """Make a directory; one that is there stays as it is."""
    try:
        posix.mkdir(name, mode & 0o777, dir_fd=parent)
    except FileExistsError:
        return
    posix.chown(name, request.uid, request.gid, dir_fd=parent, follow_symlinks=False)


def _remove(parent: int, name: str) -> None:
    try:
        posix.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return


def _write(request: CopyFileRequest, parent: int, name: str) -> None:
    end = request.offset + len(request.data)
    if request.offset < 0 or end > request.file_size:
        raise RpcError(
            status.INVALID_ARGUMENT,
            f"{request.path}: bytes {request.offset} to {end} of a file of {request.file_size}",
        )
    partial = f".{name}.part"
    flags = posix.O_WRONLY | posix.O_CREAT | posix.O_NOFOLLOW | posix.O_CLOEXEC
    file = posix.open(partial, flags | (0 if request.offset else posix.O_TRUNC), 0o600, dir_fd=parent)
    try:
        at = request.offset
        while at < end:
            at += posix.pwrite(file, request.data[at - request.offset :], at)
        is_whole = posix.fstat(file).st_size == request.file_size
        if is_whole:
            posix.fchown(file, request.uid, request.gid)
            posix.fchmod(file, request.file_mode & _MODE)
    finally:
        posix.close(file)
    if is_whole:
        posix.rename(partial, name, src_dir_fd=parent, dst_dir_fd=parent)
