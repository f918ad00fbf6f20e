"""Volumes: how full a file system is, and other sizes for those in the guest's memory."""

from __future__ import annotations

import posix

from common import status
from common.mount_options import parse_options
from common.protocols.agent import Empty
from common.protocols.guest import (
    BYTES,
    INODES,
    UpdateEphemeralMountsRequest,
    VolumeCondition,
    VolumeStatsRequest,
    VolumeStatsResponse,
    VolumeUsage,
)
from guest.agent import kernel
from guest.agent.rpc import RpcError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from guest.agent.rpc import Call


def get_stats(request: VolumeStatsRequest, _call: Call) -> VolumeStatsResponse:
    """Say how full it is."""
    path = request.volume_guest_path
    try:
        found = posix.statvfs(path)
    except OSError as err:
        raise RpcError(status.NOT_FOUND, f"volume {path}: {err.strerror}") from err
    size = found.f_frsize
    return VolumeStatsResponse(
        usage=[
            _usage(BYTES, found.f_bavail * size, found.f_blocks * size, found.f_bfree * size),
            _usage(INODES, found.f_favail, found.f_files, found.f_ffree),
        ],
        volume_condition=VolumeCondition(),
    )


def update_ephemeral(request: UpdateEphemeralMountsRequest, _call: Call) -> Empty:
    """Mount them again with the options that are told; others are left alone, as upstream's agent does."""
    for storage in request.storages:
        if storage.driver != "ephemeral":
            continue
        flags, data = parse_options(storage.options)
        try:
            kernel.mount(storage.source, storage.mount_point, storage.fstype, flags | kernel.MS_REMOUNT, data)
        except OSError as err:
            raise RpcError(status.INTERNAL, f"cannot mount {storage.mount_point} again: {err.strerror}") from err
    return Empty()


def _usage(unit: int, available: int, total: int, free: int) -> VolumeUsage:
    return VolumeUsage(unit=unit, available=available, total=total, used=total - free)
