"""What of a container's OCI configuration goes to the guest. Pure: JSON in, JSON out.

The configuration is made for a container on the host. In the guest, the VM is the boundary, and some of it means
nothing there or does harm (the rules are upstream's, Kata Containers 4.1.0, ``kata_agent.go``, ``constrainGRPCSpec``;
but limits of processes and rules for character devices, which upstream drops too, hold in the guest):

- hooks are programs of the host (:mod:`procs.shim.hooks`);
- seccomp is off in the guest unless ``disable_guest_seccomp = false``; the guest has no AppArmor profiles and no
  SELinux policy;
- a device node is made by its number, which for a character device is the same everywhere; a block device becomes a
  disk of the guest, whose agent exchanges the number, there and in the rules. That is for a device that a rule allows
  by its number, as ``--device`` and Kubernetes do: of a privileged container all disks of the host are listed;
- the node of an IOMMU group, as VFIO has it, stands for devices that the guest gets; neither it nor ``/dev/vfio/vfio``
  means anything there. Again only what a rule allows by its number counts (:mod:`procs.shim.vfio`);
- limits of how fast such a disk may be used go with it; rules and limits for other disks go with their numbers, as do
  weights of block I/O and network limits; the choice of CPUs is about the host;
- the guest has one network, one cgroup tree and one clock: those namespaces are not made again, and the paths of the
  others are the host's; the agent gives every container a pid namespace, and upstream's fails if it is told to twice;
- the cgroup path is the host's, in one of several forms.

A bind mount's source is a path of the host: it is shared, and the guest is told the path at which it finds it. A block
device becomes a disk of the guest instead, whose node is there. Other sources in ``/proc``, ``/sys`` and ``/dev`` are
meant to be the kernel's that the container runs on: those are the guest's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.errors import UsageError
from common.protocols.agent import CONTAINERS_DIRECTORY, SHARE_MOUNT_POINT

if TYPE_CHECKING:
    from collections.abc import Callable

_DROPPED_NAMESPACES = frozenset(("cgroup", "network", "pid", "time"))
_KEPT_RESOURCES = ("memory", "cpu", "pids", "hugepageLimits", "unified")
_THROTTLES = ("throttleReadBpsDevice", "throttleWriteBpsDevice", "throttleReadIOPSDevice", "throttleWriteIOPSDevice")
_GUESTS_OWN = ("/proc", "/sys", "/dev")
_BINDS = frozenset(("bind", "rbind"))
_CHARACTER_DEVICES = ("c", "u")
_VFIO_ITSELF = "vfio"
"""The one node of VFIO that is not a group's: by it a program manages those that it has."""
_SHARED, _VOLUMES = "mounts", "volumes"
_PLACES = {_SHARED: SHARE_MOUNT_POINT, _VOLUMES: CONTAINERS_DIRECTORY}
"""Below what the guest has what a mount shows, by its kind: ``<container>/<kind>/<n>``."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMount:
    """A path of the host that a container wants to see.

    Attributes:
        name: its name in the container's part of the share, for example ``mounts/0``; or, of a block device, among what
            is the container's alone.
        source: the path on the host.
        is_recursive: whether mounts below the source are wanted too.
        is_readonly: whether the container may only read it.
    """

    name: str
    source: str
    is_recursive: bool
    is_readonly: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HostDevice:
    """A block device of the host that a container has a device node of.

    Attributes:
        path: the node in the container.
        major: its number on the host.
        minor: its number on the host.
        is_readonly: whether the container may only read it.
    """

    path: str
    major: int
    minor: int
    is_readonly: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class HostGroup:
    """A device node of VFIO that a container is given.

    Attributes:
        path: the node in the container.
        name: what it is called on the host, below ``/dev/vfio``: an IOMMU group's number.
    """

    path: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ForGuest:
    """What a configuration is made into.

    Attributes:
        config: what the guest is told.
        mounts: what of the host is shared for it.
        volumes: block devices that it sees at the place of a mount.
        devices: block devices that it has a node of.
        groups: nodes of VFIO that it is given.
    """

    config: Json
    mounts: list[HostMount]
    volumes: list[HostMount]
    devices: list[HostDevice]
    groups: list[HostGroup]


def for_guest(
    config: Json,
    container_id: str,
    *,
    is_seccomp_wanted: bool = False,
    is_disk: Callable[[str], bool],
    vfio_name: Callable[[int, int], str],
) -> ForGuest:
    """Return the configuration for the guest, and what of the host it needs.

    Args:
        config: the container's ``config.json``.
        container_id: its id.
        is_seccomp_wanted: whether a seccomp profile holds in the guest.
        is_disk: tells whether a path is a block device.
        vfio_name: tells by its number what a character device is called below ``/dev/vfio``, if it is there.

    Raises:
        UsageError: the configuration has no process.
    """
    if not isinstance(config.get("process"), dict):
        raise UsageError(f"the OCI configuration of container {container_id} has no process")
    cut = {key: value for key, value in config.items() if key != "hooks"}
    cut["root"] = {**(config.get("root") or {}), "path": f"{SHARE_MOUNT_POINT}/{container_id}/rootfs"}
    cut["process"] = process(config["process"])
    linux = config.get("linux") or {}
    devices = _block_devices(linux)
    given, without_vfio = groups(linux, vfio_name)
    cut["linux"] = _linux(without_vfio, container_id, devices, is_seccomp_wanted=is_seccomp_wanted)
    cut["mounts"], shared, volumes = _mounts(config.get("mounts") or [], container_id, is_disk)
    return ForGuest(config=cut, mounts=shared, volumes=volumes, devices=devices, groups=given)


def process(config: Json) -> Json:
    """Return a process, the container's own or an exec, without what the guest does not know."""
    return {key: value for key, value in config.items() if key not in ("apparmorProfile", "selinuxLabel")}


def _block_devices(linux: Json) -> list[HostDevice]:
    """Return the block devices that a rule allows by their number."""
    access = _allowed(linux, "b")
    return [
        HostDevice(path=entry["path"], major=number[0], minor=number[1], is_readonly="w" not in access[number])
        for entry in linux.get("devices") or []
        if entry.get("type") == "b" and (number := _number(entry)) in access
    ]


def groups(linux: Json, vfio_name: Callable[[int, int], str]) -> tuple[list[HostGroup], Json]:
    """Return the nodes of VFIO that a rule allows by their number, and the rest without any such node or rule.

    Args:
        linux: that part of a ``config.json``.
        vfio_name: see :func:`for_guest`.
    """
    nodes = linux.get("devices") or []
    named = {
        number: name
        for node in nodes
        if node.get("type") in _CHARACTER_DEVICES and (name := vfio_name(*(number := _number(node))))
    }
    if not named:
        return [], linux
    access = _allowed(linux, *_CHARACTER_DEVICES)
    given = [node for node in nodes if node.get("type") in _CHARACTER_DEVICES and _number(node) in named]
    resources = linux.get("resources") or {}
    rules = [rule for rule in resources.get("devices") or [] if rule.get("type") == "b" or _number(rule) not in named]
    found = [
        HostGroup(path=node["path"], name=named[_number(node)])
        for node in given
        if _number(node) in access and named[_number(node)] != _VFIO_ITSELF
    ]
    left = [node for node in nodes if node not in given]
    return found, {**linux, "devices": left, "resources": {**resources, "devices": rules}}


def _allowed(linux: Json, *types: str) -> dict[tuple[Any, Any], str]:
    """Return the numbers of devices that a rule allows, each with how they may be used."""
    rules = (linux.get("resources") or {}).get("devices") or []
    return {_number(rule): rule.get("access", "") for rule in rules if rule.get("allow") and rule.get("type") in types}


def _number(named: Json) -> tuple[Any, Any]:
    return named.get("major"), named.get("minor")


def _linux(linux: Json, container_id: str, disks: list[HostDevice], *, is_seccomp_wanted: bool) -> Json:
    dropped = ("mountLabel",) if is_seccomp_wanted else ("mountLabel", "seccomp")
    cut = {key: value for key, value in linux.items() if key not in dropped}
    plugged = {disk.path for disk in disks}
    nodes = linux.get("devices") or []
    cut["devices"] = [node for node in nodes if node.get("type") != "b" or node["path"] in plugged]
    cut["cgroupsPath"] = f"/{container_id}"
    cut["namespaces"] = [
        {"type": namespace["type"]}
        for namespace in linux.get("namespaces") or []
        if namespace["type"] not in _DROPPED_NAMESPACES
    ]
    resources = linux.get("resources") or {}
    cut["resources"] = {**limits(resources), "devices": _device_rules(resources.get("devices") or [], disks)}
    if throttles := _throttles(resources.get("blockIO") or {}, disks):
        cut["resources"]["blockIO"] = throttles
    return cut


def _device_rules(rules: list[Json], disks: list[HostDevice]) -> list[Json]:
    """Return the rules that mean something in the guest. What JSON leaves out means any, the protocol's word is -1."""
    numbers = {(disk.major, disk.minor) for disk in disks}
    kept = [
        rule
        for rule in rules
        if rule.get("type") != "b"
        or rule.get("major") in (None, -1)
        or (rule.get("major"), rule.get("minor")) in numbers
    ]
    given = [{key: value for key, value in rule.items() if value is not None} for rule in kept]
    return [{"type": "a", "major": -1, "minor": -1, "access": "rwm", **rule} for rule in given]


def _throttles(block_io: Json, disks: list[HostDevice]) -> Json:
    """Return the limits of how fast disks may be used, as far as the guest has them."""
    numbers = {(disk.major, disk.minor) for disk in disks}
    of_disks = {
        name: [limit for limit in block_io.get(name) or [] if (limit.get("major"), limit.get("minor")) in numbers]
        for name in _THROTTLES
    }
    return {name: kept for name, kept in of_disks.items() if kept}


def limits(resources: Json) -> Json:
    """Return the limits that mean something in the guest, and that may change (no device rules, as with runc)."""
    cut = {key: resources[key] for key in _KEPT_RESOURCES if resources.get(key)}
    if "cpu" in cut:
        cut["cpu"] = {key: value for key, value in cut["cpu"].items() if key not in ("cpus", "mems")}
    return cut


def _mounts(
    mounts: list[Json], container_id: str, is_disk: Callable[[str], bool]
) -> tuple[list[Json], list[HostMount], list[HostMount]]:
    """Return what the guest is told of mounts, what is shared for them, and the block devices among them."""
    told: list[Json] = []
    found: dict[str, list[HostMount]] = {kind: [] for kind in _PLACES}
    for mount in mounts:
        kind = _kind(mount, is_disk)
        if not kind:
            told.append(mount)
            continue
        options = mount.get("options") or []
        host = HostMount(
            name=f"{kind}/{len(found[kind])}",
            source=mount["source"],
            is_recursive="rbind" in options,
            is_readonly="ro" in options,
        )
        found[kind].append(host)
        told.append({**mount, "source": f"{_PLACES[kind]}/{container_id}/{host.name}"})
    return told, found[_SHARED], found[_VOLUMES]


def _kind(mount: Json, is_disk: Callable[[str], bool]) -> str:
    """Return what kind of thing of the host a mount shows; empty if it is the guest's own."""
    if mount.get("type") not in _BINDS and not _BINDS.intersection(mount.get("options") or []):
        return ""
    source = str(mount.get("source", ""))
    if is_disk(source):
        return _VOLUMES
    is_guests_own = any(source == own or source.startswith(f"{own}/") for own in _GUESTS_OWN)
    return "" if is_guests_own else _SHARED
