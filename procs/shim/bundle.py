"""A bundle: what its ``config.json`` and the request to create say, made into what the guest is told and shared."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UsageError
from common.protocols import oci, task
from procs.shim import disk, spec, vfio
from procs.shim.rootfs import on_disks

if TYPE_CHECKING:
    from common.config import HypervisorConfig, KataConfig
    from common.protocols.agent import Storage
    from common.services.vmm import DeviceSpec
    from procs.shim.copies import Copy
    from procs.shim.disk import Disk, Node
    from procs.shim.spec import HostMount, Json
    from procs.shim.vfio import Group


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A container that is to be created.

    Attributes:
        spec: what the guest is told.
        hooks: what is executed on the host.
        disks: what the guest mounts itself; perhaps its root file system is on some of them.
        nodes: disks that it has a device node of.
        groups: IOMMU groups whose devices its guest gets.
        storages: what the guest makes of what it has mounted.
        rootfs: the mounts that make its root file system on the host, unless that is on disks.
        mounts: what else of the host it is to see.
        copies: what of that the guest gets as copies.
    """

    spec: oci.Spec
    hooks: oci.Hooks
    disks: list[Disk]
    nodes: list[Node]
    groups: list[Group]
    storages: list[Storage]
    rootfs: list[task.Mount]
    mounts: list[HostMount]
    copies: list[Copy] = field(default_factory=list)

    def devices(self) -> list[DeviceSpec]:
        """Return what is to be plugged for it, each once."""
        disks = [disk.spec for disk in self.disks] + [node.spec for node in self.nodes]
        return list(dict.fromkeys([*disks, *(function for group in self.groups for function in group.functions)]))


def read(request: task.CreateTaskRequest, settings: KataConfig) -> Wanted:
    """Read the bundle that a request names.

    Args:
        request: the request.
        settings: whether a seccomp profile holds in the guest, and whether it gets disks.

    Raises:
        UsageError: there is no configuration, or it is not valid.
        NotFoundError: the host has not the device that it names.
        UnsupportedError: guests get no device like that.
    """
    config = _read_config(request.bundle)
    is_seccomp_wanted = not settings.runtime.disable_guest_seccomp
    cut = spec.for_guest(
        config,
        request.id,
        is_seccomp_wanted=is_seccomp_wanted,
        is_disk=disk.is_block_device,
        vfio_name=vfio.name_of,
    )
    cut.config["process"]["terminal"] = request.terminal
    try:
        message = oci.from_json(oci.Spec, cut.config)
        hooks = oci.from_json(oci.Hooks, config.get("hooks") or {}, "$.hooks")
    except ValueError as err:
        raise UsageError(f"{request.bundle}/config.json: {err}") from err
    driver = settings.hypervisor.block_device_driver
    disks = [disk.of_volume(volume, request.id, driver) for volume in cut.volumes]
    nodes = [disk.of_device(device, driver) for device in cut.devices]
    rootfs = _rootfs(request, config)
    root = on_disks(rootfs, request.id, settings.hypervisor)
    if root is not None and message.root is not None:
        message.root.path, rootfs, disks = root.path, [], [*root.disks, *disks]
    return Wanted(
        spec=message,
        hooks=hooks,
        disks=disks,
        nodes=nodes,
        groups=[vfio.of_group(group, settings.hypervisor) for group in cut.groups],
        storages=root.storages if root else [],
        rootfs=rootfs,
        mounts=cut.mounts,
    )


def read_groups(bundle: str, settings: HypervisorConfig) -> list[Group]:
    """Read which IOMMU groups a container is given, before its Create comes.

    Raises:
        UsageError, NotFoundError, UnsupportedError: see :func:`read`.
    """
    found, _ = spec.groups(_read_config(bundle).get("linux") or {}, vfio.name_of)
    return [vfio.of_group(group, settings) for group in found]


def read_process(request: task.ExecProcessRequest) -> oci.Process:
    """Read the process of a request to execute.

    Raises:
        UsageError: it is not an OCI process.
    """
    try:
        process = oci.from_json(oci.Process, spec.process(json.loads(request.spec.value if request.spec else b"")))
    except (ValueError, AttributeError) as err:
        raise UsageError(f"exec {request.exec_id}: its process is not valid: {err}") from err
    process.terminal = request.terminal
    return process


def read_limits(request: task.UpdateTaskRequest) -> oci.LinuxResources:
    """Read the limits of a request to update.

    Raises:
        UsageError: they are not OCI's resources of Linux.
    """
    given = request.resources or task.Any()
    if not given.type_url.endswith("/LinuxResources"):
        raise UsageError(f"update of {request.id}: invalid resources type {given.type_url!r}")
    try:
        return oci.from_json(oci.LinuxResources, spec.limits(json.loads(given.value)))
    except (ValueError, AttributeError) as err:
        raise UsageError(f"update of {request.id}: its resources are not valid: {err}") from err


def _read_config(bundle: str) -> Json:
    path = Path(bundle, "config.json")
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as err:
        raise UsageError(f"cannot read the OCI configuration {path}: {err}") from err
    if not isinstance(config, dict):
        raise UsageError(f"the OCI configuration {path} is not a JSON object")
    return config


def _rootfs(request: task.CreateTaskRequest, config: Json) -> list[task.Mount]:
    """Return the mounts of the root file system; without any, containerd means the configuration's own directory."""
    if request.rootfs:
        return request.rootfs
    source = str(Path(request.bundle, (config.get("root") or {}).get("path", "rootfs")))
    return [task.Mount(type="bind", source=source, target="", options=["rbind"])]
