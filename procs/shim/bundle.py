"""A bundle: what its ``config.json`` and the request to create say, made into what the guest is told and shared."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UsageError
from common.protocols import oci, task
from procs.shim import spec

if TYPE_CHECKING:
    from procs.shim.spec import HostMount, Json


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A container that is to be created.

    Attributes:
        spec: what the guest is told.
        rootfs: the mounts that make its root file system, on the host.
        mounts: what else of the host it is to see.
    """

    spec: oci.Spec
    rootfs: list[task.Mount]
    mounts: list[HostMount]


def read(request: task.CreateTaskRequest) -> Wanted:
    """Read the bundle that a request names.

    Raises:
        UsageError: there is no configuration, or it is not valid.
    """
    config = _read_config(request.bundle)
    told, mounts = spec.for_guest(config, request.id)
    told["process"]["terminal"] = request.terminal
    try:
        message = oci.from_json(oci.Spec, told)
    except ValueError as err:
        raise UsageError(f"{request.bundle}/config.json: {err}") from err
    return Wanted(spec=message, rootfs=_rootfs(request, config), mounts=mounts)


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
