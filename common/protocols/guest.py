"""Kata's agent protocol, service ``grpc.AgentService``: what is asked of the guest as a whole, not of a container.

Field numbers and names are those of ``agent.proto`` of Kata Containers 4.1.0 (src/libs/protocols/protos). Imported when
one of these calls comes, which with our shim none does.
"""

from __future__ import annotations

from common.protobuf import Message, boolean, bytes_, int_, message, messages, repeated, string, uint
from common.protocols.agent import Storage


class SetGuestDateTimeRequest(Message):
    """``SetGuestDateTime``: seconds and microseconds since the epoch."""

    sec: int = int_(1)
    usec: int = int_(2)


class ReseedRandomDevRequest(Message):
    """``ReseedRandomDev``: entropy of the host's. The field has the number 2, and nothing has 1."""

    data: bytes = bytes_(2)


class OnlineCPUMemRequest(Message):
    """``OnlineCPUMem``: use processors and memory that were plugged. Returns when they are there."""

    wait: bool = boolean(1)
    nb_cpus: int = uint(2)
    cpu_only: bool = boolean(3)


class MemHotplugByProbeRequest(Message):
    """``MemHotplugByProbe``: addresses of memory that the guest's kernel was not told of."""

    addresses: list[int] = repeated(uint(1))


class CopyFileRequest(Message):
    """``CopyFile``: a piece of a file, or a directory or symbolic link, as the type in ``file_mode`` says.

    Attributes:
        path: where, below ``/run/kata-containers``.
        file_size: of the whole file. It is there under its name when so much has come.
        file_mode: ``st_mode``, type included.
        dir_mode: of the directories above it that are made.
        uid: owner.
        gid: group.
        offset: where the piece belongs.
        data: the piece; of a symbolic link, what it holds.
    """

    path: str = string(1)
    file_size: int = int_(2)
    file_mode: int = uint(3)
    dir_mode: int = uint(4)
    uid: int = int_(5)
    gid: int = int_(6)
    offset: int = int_(7)
    data: bytes = bytes_(8)


class UpdateEphemeralMountsRequest(Message):
    """``UpdateEphemeralMounts``: file systems in the guest's memory that get other options, such as a size."""

    storages: list[Storage] = messages(1, Storage)


class VolumeStatsRequest(Message):
    """``GetVolumeStats``: of the file system that a path of the guest is in."""

    volume_guest_path: str = string(1)


BYTES, INODES = 1, 2
"""``VolumeUsage.unit``."""


class VolumeUsage(Message):
    """How much of something a file system has."""

    available: int = uint(1)
    total: int = uint(2)
    used: int = uint(3)
    unit: int = int_(4)


class VolumeCondition(Message):
    """Whether a volume is in order."""

    abnormal: bool = boolean(1)
    message: str = string(2)


class VolumeStatsResponse(Message):
    """``GetVolumeStats``."""

    usage: list[VolumeUsage] = messages(1, VolumeUsage)
    volume_condition: VolumeCondition | None = message(2, VolumeCondition)


class Metrics(Message):
    """``GetMetrics``, in Prometheus' text format."""

    metrics: str = string(1)
