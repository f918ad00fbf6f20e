"""What of a container's OCI configuration goes to the guest. Pure: JSON in, JSON out.

The configuration is made for a container on the host. In the guest, the VM is the boundary, and some of it means
nothing there or does harm (the rules are upstream's, Kata Containers 4.1.0, ``kata_agent.go``, ``constrainGRPCSpec``;
but limits of processes and rules for character devices, which upstream drops too, hold in the guest):

- hooks are programs of the host (:mod:`procs.shim.hooks`);
- seccomp is off in the guest unless ``disable_guest_seccomp = false``; the guest has no AppArmor profiles and no
  SELinux policy;
- a device node is made by its number, which for a character device is the same everywhere; a block device's number
  would be another disk in the guest;
- rules for block devices go with their numbers, and so do block and network limits; the choice of CPUs is about the
  host;
- the guest has one network, one cgroup tree and one clock: those namespaces are not made again, and the paths of the
  others are the host's; the agent gives every container a pid namespace, and upstream's fails if it is told to twice;
- the cgroup path is the host's, in one of several forms.

A bind mount's source is a path of the host: it is shared, and the guest is told the path at which it finds it. Sources
in ``/proc``, ``/sys`` and ``/dev`` are meant to be the kernel's that the container runs on: those are the guest's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common.errors import UsageError
from common.protocols.agent import SHARE_MOUNT_POINT

_DROPPED_NAMESPACES = frozenset(("cgroup", "network", "pid", "time"))
_KEPT_RESOURCES = ("memory", "cpu", "pids", "hugepageLimits", "unified")
_GUESTS_OWN = ("/proc", "/sys", "/dev")
_BINDS = frozenset(("bind", "rbind"))

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMount:
    """A path of the host that a container wants to see.

    Attributes:
        name: its name in the container's part of the share, for example ``mounts/0``.
        source: the path on the host.
        is_recursive: whether mounts below the source are wanted too.
        is_readonly: whether the container may only read it.
    """

    name: str
    source: str
    is_recursive: bool
    is_readonly: bool


def for_guest(config: Json, container_id: str, *, is_seccomp_wanted: bool = False) -> tuple[Json, list[HostMount]]:
    """Return the configuration for the guest, and what of the host has to be shared for it.

    Args:
        config: the container's ``config.json``.
        container_id: its id.
        is_seccomp_wanted: whether a seccomp profile holds in the guest.

    Raises:
        UsageError: the configuration has no process.
    """
    if not isinstance(config.get("process"), dict):
        raise UsageError(f"the OCI configuration of container {container_id} has no process")
    cut = {key: value for key, value in config.items() if key != "hooks"}
    cut["root"] = {**(config.get("root") or {}), "path": f"{SHARE_MOUNT_POINT}/{container_id}/rootfs"}
    cut["process"] = process(config["process"])
    cut["linux"] = _linux(config.get("linux") or {}, container_id, is_seccomp_wanted=is_seccomp_wanted)
    cut["mounts"], shared = _mounts(config.get("mounts") or [], container_id)
    return cut, shared


def process(config: Json) -> Json:
    """Return a process, the container's own or an exec, without what the guest does not know."""
    return {key: value for key, value in config.items() if key not in ("apparmorProfile", "selinuxLabel")}


def _linux(linux: Json, container_id: str, *, is_seccomp_wanted: bool) -> Json:
    dropped = ("mountLabel",) if is_seccomp_wanted else ("mountLabel", "seccomp")
    cut = {key: value for key, value in linux.items() if key not in dropped}
    cut["devices"] = [device for device in linux.get("devices") or [] if device.get("type") != "b"]
    cut["cgroupsPath"] = f"/{container_id}"
    cut["namespaces"] = [
        {"type": namespace["type"]}
        for namespace in linux.get("namespaces") or []
        if namespace["type"] not in _DROPPED_NAMESPACES
    ]
    resources = linux.get("resources") or {}
    cut["resources"] = {**limits(resources), "devices": _device_rules(resources.get("devices") or [])}
    return cut


def _device_rules(rules: list[Json]) -> list[Json]:
    """Return the rules that mean the same in the guest. What JSON leaves out means any, the protocol's word is -1."""
    kept = [rule for rule in rules if rule.get("type") != "b" or rule.get("major") in (None, -1)]
    given = [{key: value for key, value in rule.items() if value is not None} for rule in kept]
    return [{"type": "a", "major": -1, "minor": -1, "access": "rwm", **rule} for rule in given]


def limits(resources: Json) -> Json:
    """Return the limits that mean something in the guest, and that may change (no device rules, as with runc)."""
    cut = {key: resources[key] for key in _KEPT_RESOURCES if resources.get(key)}
    if "cpu" in cut:
        cut["cpu"] = {key: value for key, value in cut["cpu"].items() if key not in ("cpus", "mems")}
    return cut


def _mounts(mounts: list[Json], container_id: str) -> tuple[list[Json], list[HostMount]]:
    told: list[Json] = []
    shared: list[HostMount] = []
    for mount in mounts:
        if not _is_of_host(mount):
            told.append(mount)
            continue
        options = mount.get("options") or []
        host = HostMount(
            name=f"mounts/{len(shared)}",
            source=mount["source"],
            is_recursive="rbind" in options,
            is_readonly="ro" in options,
        )
        shared.append(host)
        told.append({**mount, "source": f"{SHARE_MOUNT_POINT}/{container_id}/{host.name}"})
    return told, shared


def _is_of_host(mount: Json) -> bool:
    if mount.get("type") not in _BINDS and not _BINDS.intersection(mount.get("options") or []):
        return False
    source = str(mount.get("source", ""))
    return not any(source == own or source.startswith(f"{own}/") for own in _GUESTS_OWN)
