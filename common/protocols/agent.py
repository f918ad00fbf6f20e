"""Kata's agent protocol: service ``grpc.AgentService``, as far as this version speaks it, and all of ``health``.

Field numbers and names are those of ``agent.proto`` of Kata Containers 4.1.0 (src/libs/protocols/protos). Shared by the
shim and the guest's agent. A request that says nothing is :class:`Empty`.
"""

# ruff: noqa: PLC0414  # an alias of the same name is how a re-export is declared

from __future__ import annotations

from common.protobuf import Message, boolean, bytes_, int_, message, messages, repeated, string, uint
from common.protocols.health import AGENT_SERVICE as AGENT_SERVICE
from common.protocols.health import HEALTH_SERVICE as HEALTH_SERVICE
from common.protocols.health import SERVING as SERVING
from common.protocols.health import CheckRequest as CheckRequest
from common.protocols.health import HealthCheckResponse as HealthCheckResponse
from common.protocols.health import VersionCheckResponse as VersionCheckResponse
from common.protocols.oci import LinuxResources, Process, Spec

STREAM_PORTS_FEATURE = "stream-ports"
"""In ``extra_features``: the agent takes the stream numbers of ``common.channel``. Without it streams are calls."""

DISK_LIMITS_FEATURE = "disk-limits"
"""In ``extra_features``: limits of how fast a disk may be used name it by the number that the host has for it. Another
agent would set them for another disk, or fail."""

STREAMS_SERVICE = "pykata.Streams"
"""A service of our own agent's; what it is for says ``common.channel``."""

RELEASE_DISKS_FEATURE = "release-disks"
"""In ``extra_features``: the agent answers ``ReleaseDisks``."""

GUEST_DRIVEN = "vfio-pci-gk"
"""Type of a :class:`Device`: an IOMMU group of the host, whose devices the guest's kernel drives."""

SHARE_TAG = "kataShared"
CONTAINERS_DIRECTORY = "/run/kata-containers"
"""Where the guest mounts what is one container's alone: ``<container>/rootfs``."""

SHARE_MOUNT_POINT = "/run/kata-containers/shared/containers"
"""Where the guest mounts the directory that the sandbox's host side shares; ``<container>/rootfs`` is below it."""


OVERLAY_DIRECTORY = "io.katacontainers.volume.overlayfs.create_directory"
"""A driver option of storages of the driver ``overlayfs``: a directory that it needs."""


class Empty(Message):
    """``google.protobuf.Empty``, and requests without fields."""


class TakenRequest(Message):
    """``Taken`` of the service ``pykata.Streams``.

    Attributes:
        stream: its number.
        size: bytes of it that the host has handed on since it said so last.
    """

    stream: int = uint(1)
    size: int = uint(2)


class Storage(Message):
    """Something to mount in the guest."""

    driver: str = string(1)
    driver_options: list[str] = repeated(string(2))
    source: str = string(3)
    fstype: str = string(4)
    options: list[str] = repeated(string(5))
    mount_point: str = string(6)


class Device(Message):
    """A disk of the guest that a container gets as a device node, or devices of the host that the guest has.

    Attributes:
        id: where it is, as in a :class:`Storage` of the driver that is named like its type; or the group's number.
        type: ``blk``, ``scsi`` or ``mmioblk``; or :data:`GUEST_DRIVEN`.
        vm_path: its node in the guest, where the host knows it.
        container_path: its node in the container, which the specification has with the numbers of the host; of a group
            it has none.
        options: what a storage has for driver options, at which upstream's agent does not look; of a group, its
            devices, each as ``<address on the host>=<PCI path in the guest>``, as upstream has them.
    """

    id: str = string(1)
    type: str = string(2)
    vm_path: str = string(3)
    container_path: str = string(4)
    options: list[str] = repeated(string(5))


class KernelModule(Message):
    """A module for the guest's kernel, and its parameters as ``name=value``."""

    name: str = string(1)
    parameters: list[str] = repeated(string(2))


class CreateSandboxRequest(Message):
    """``CreateSandbox``.

    Attributes:
        hostname: the guest's name.
        dns: lines of the guest's ``resolv.conf``.
        storages: what all containers share.
        sandbox_id: whose guest it is.
        guest_hook_path: where the image has hooks, or empty.
        kernel_modules: what to load first.
    """

    hostname: str = string(1)
    dns: list[str] = repeated(string(2))
    storages: list[Storage] = messages(3, Storage)
    sandbox_id: str = string(5)
    guest_hook_path: str = string(6)
    kernel_modules: list[KernelModule] = messages(7, KernelModule)


class CreateContainerRequest(Message):
    """``CreateContainer``. The ports are stream numbers of ``common.channel``."""

    container_id: str = string(1)
    exec_id: str = string(2)
    devices: list[Device] = messages(4, Device)
    storages: list[Storage] = messages(5, Storage)
    oci: Spec | None = message(6, Spec)
    stdin_port: int = uint(9)
    stdout_port: int = uint(10)
    stderr_port: int = uint(11)


class ReleaseDisksRequest(Message):
    """``ReleaseDisks``, which upstream's agent does not have: let go of disks that are no container's after all.

    Attributes:
        disks: which, by driver, driver options and source.
    """

    disks: list[Storage] = messages(1, Storage)


class ContainerRequest(Message):
    """Names a container: ``StartContainer``, ``PauseContainer``, ``ResumeContainer``, ``StatsContainer``."""

    container_id: str = string(1)


class RemoveContainerRequest(Message):
    """``RemoveContainer``. ``timeout`` in seconds, 0 for none."""

    container_id: str = string(1)
    timeout: int = uint(2)


class UpdateContainerRequest(Message):
    """``UpdateContainer``. What ``resources`` does not mention stays as it is."""

    container_id: str = string(1)
    resources: LinuxResources | None = message(2, LinuxResources)


class OomEvent(Message):
    """The answer of ``GetOOMEvent``, which comes when a container has run out of memory."""

    container_id: str = string(1)


class ExecProcessRequest(Message):
    """``ExecProcess``, which starts a process at once. Ports as in :class:`CreateContainerRequest`."""

    container_id: str = string(1)
    exec_id: str = string(2)
    process: Process | None = message(4, Process)
    stdin_port: int = uint(5)
    stdout_port: int = uint(6)
    stderr_port: int = uint(7)


class SignalProcessRequest(Message):
    """``SignalProcess``. ``exec_id`` empty: every process of the container; the container's id: its first process."""

    container_id: str = string(1)
    exec_id: str = string(2)
    signal: int = uint(3)


class WaitProcessRequest(Message):
    """``WaitProcess``, answered when the process has ended and its output has been handed on."""

    container_id: str = string(1)
    exec_id: str = string(2)


class WaitProcessResponse(Message):
    """``status`` is the exit code, or 128 and the signal that killed it."""

    status: int = int_(1)


class WriteStreamRequest(Message):
    """``WriteStdin``. No data is the end of the stream, as with ``CloseStdin``."""

    container_id: str = string(1)
    exec_id: str = string(2)
    data: bytes = bytes_(3)


class WriteStreamResponse(Message):
    """``WriteStdin``: how much was written."""

    len: int = uint(1)


class ReadStreamRequest(Message):
    """``ReadStdout`` and ``ReadStderr``: at most ``len`` bytes; answered when there are some, or at the end."""

    container_id: str = string(1)
    exec_id: str = string(2)
    len: int = uint(3)


class ReadStreamResponse(Message):
    """``ReadStdout`` and ``ReadStderr``. No data is the end of the stream."""

    data: bytes = bytes_(1)


class CloseStdinRequest(Message):
    """``CloseStdin``."""

    container_id: str = string(1)
    exec_id: str = string(2)


class TtyWinResizeRequest(Message):
    """``TtyWinResize``."""

    container_id: str = string(1)
    exec_id: str = string(2)
    row: int = uint(3)
    column: int = uint(4)


class GuestDetailsRequest(Message):
    """``GetGuestDetails``: which of the optional answers are wanted."""

    mem_block_size: bool = boolean(1)
    mem_hotplug_probe: bool = boolean(2)


class AgentDetails(Message):
    """What an agent is and can do."""

    version: str = string(1)
    init_daemon: bool = boolean(2)
    device_handlers: list[str] = repeated(string(3))
    storage_handlers: list[str] = repeated(string(4))
    supports_seccomp: bool = boolean(5)
    extra_features: list[str] = repeated(string(6))


class GuestDetailsResponse(Message):
    """``GetGuestDetails``."""

    mem_block_size_bytes: int = uint(1)
    agent_details: AgentDetails | None = message(2, AgentDetails)
    support_mem_hotplug_probe: bool = boolean(3)
