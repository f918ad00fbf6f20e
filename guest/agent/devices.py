"""Disks that a container gets as device nodes, and the numbers by which they are known here.

A node is a storage of type ``bind``: the one in ``/dev``, mounted by itself. So it is waited for, and given back, as a
disk with a file system is. The host has two ways to ask for one:

- a *device* of the request has an entry in the specification, with the numbers that the host has for it. They become
  the guest's, in the entry and in the rules that name them, as upstream's agent does it (Kata Containers 4.1.0,
  src/agent/src/device, ``update_spec_devices``), and in limits of how fast they may be used, which upstream drops;
- a *storage* of type ``bind`` is what a mount of the specification shows in the container. No rule of the host can name
  it: what a container was given it may use.
"""

from __future__ import annotations

import posix

from common import status
from common.protocols.agent import CONTAINERS_DIRECTORY, Storage
from common.protocols.oci import LinuxDeviceCgroup
from guest.agent.rpc import RpcError
from guest.agent.storage import BIND

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.protocols import oci
    from common.protocols.agent import Device
    from common.protocols.oci import LinuxThrottleDevice

TYPES = ("blk", "mmioblk", "scsi")
"""Of disks; each is found as the storage driver of that name finds a disk."""


def as_storages(container_id: str, devices: list[Device], spec: oci.Spec) -> list[Storage]:
    """Return what is to be mounted for a container's devices to have nodes.

    Raises:
        RpcError: a device is of another type, or the specification has none at its path.
    """
    paths = {entry.path for entry in spec.linux.devices} if spec.linux else set()
    for device in devices:
        if device.type not in TYPES:
            raise RpcError(status.UNIMPLEMENTED, f"device {device.id!r} of type {device.type!r} is not supported")
        if device.container_path not in paths:
            text = f"device {device.id!r}: the specification has no device {device.container_path!r}"
            raise RpcError(status.INVALID_ARGUMENT, text)
    return [
        Storage(
            driver=device.type,
            driver_options=device.options,
            source=device.id,
            fstype=BIND,
            mount_point=f"{CONTAINERS_DIRECTORY}/{container_id}/devices/{number}",
        )
        for number, device in enumerate(devices)
    ]


def renumber(spec: oci.Spec, devices: list[Device], nodes: list[Storage]) -> None:
    """Give the entries of devices, and the rules and limits about them, the numbers of their nodes, which are mounted.

    Raises:
        OSError: there is no such node.
    """
    linux = spec.linux
    if linux is None:
        return
    at = {device.container_path: _numbers(node.mount_point) for device, node in zip(devices, nodes, strict=True)}
    here = {}
    for entry in linux.devices:
        if entry.path in at:
            here[entry.major, entry.minor] = at[entry.path]
            entry.type = "b"
            entry.major, entry.minor = at[entry.path]
    for named in _naming_disks(linux.resources) if linux.resources else ():
        named.major, named.minor = here.get((named.major, named.minor), (named.major, named.minor))


def allow(spec: oci.Spec, storages: list[Storage]) -> None:
    """Let a container use the nodes that it was given as storages, which are mounted.

    Where there are no rules, everything may be used already, and a rule would be the first that restricts.

    Raises:
        OSError: there is no such node.
    """
    rules = spec.linux.resources.devices if spec.linux and spec.linux.resources else []
    for storage in storages if rules else []:
        if storage.fstype == BIND:
            major, minor = _numbers(storage.mount_point)
            rules.append(LinuxDeviceCgroup(allow=True, type="b", major=major, minor=minor, access="rwm"))


def _naming_disks(resources: oci.LinuxResources) -> Iterator[LinuxDeviceCgroup | LinuxThrottleDevice]:
    yield from (rule for rule in resources.devices if rule.type == "b")
    if resources.block_io:
        yield from resources.block_io.throttle_read_bps_device
        yield from resources.block_io.throttle_write_bps_device
        yield from resources.block_io.throttle_read_iops_device
        yield from resources.block_io.throttle_write_iops_device


def _numbers(node: str) -> tuple[int, int]:
    number = posix.stat(node).st_rdev
    return posix.major(number), posix.minor(number)
