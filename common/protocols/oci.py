"""The OCI runtime specification twice: as messages of Kata's agent protocol, and as the JSON of ``config.json``.

Field numbers: ``oci.proto`` of Kata Containers 4.1.0. JSON: https://github.com/opencontainers/runtime-spec 1.0,
``config.md`` and ``config-linux.md``. What is not declared here does not enter the guest: network limits and weights of
block I/O are about devices of the host. ``unified`` is ours: upstream's protocol has no such field, so its number is
far away.

The two differ where a number is optional: JSON knows "absent", proto3 only zero. :func:`to_json` therefore leaves out
zeros and empty values, except where OCI requires the key (:data:`_REQUIRED`). Shared by the shim and the agent.
"""

from __future__ import annotations

from common.protobuf import Message, boolean, int_, message, messages, repeated, string, string_map, uint

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeVar

    from common.protobuf import Field

    M = TypeVar("M", bound=Message)


class Box(Message):
    """Size of a console in characters."""

    height: int = uint(1)
    width: int = uint(2)


class User(Message):
    """Who a process runs as."""

    uid: int = uint(1)
    gid: int = uint(2)
    additional_gids: list[int] = repeated(uint(3))
    username: str = string(4)


class LinuxCapabilities(Message):
    """Capability sets by name, for example ``CAP_CHOWN``."""

    bounding: list[str] = repeated(string(1))
    effective: list[str] = repeated(string(2))
    inheritable: list[str] = repeated(string(3))
    permitted: list[str] = repeated(string(4))
    ambient: list[str] = repeated(string(5))


class POSIXRlimit(Message):
    """One limit, for example of ``RLIMIT_NOFILE``."""

    type: str = string(1)
    hard: int = uint(2)
    soft: int = uint(3)


class Process(Message):
    """What runs in a container."""

    terminal: bool = boolean(1)
    console_size: Box | None = message(2, Box)
    user: User | None = message(3, User)
    args: list[str] = repeated(string(4))
    env: list[str] = repeated(string(5))
    cwd: str = string(6)
    capabilities: LinuxCapabilities | None = message(7, LinuxCapabilities)
    rlimits: list[POSIXRlimit] = messages(8, POSIXRlimit)
    no_new_privileges: bool = boolean(9)
    apparmor_profile: str = string(10)
    oom_score_adj: int = int_(11)
    selinux_label: str = string(12)


class Root(Message):
    """The root file system; ``path`` is the guest's."""

    path: str = string(1)
    readonly: bool = boolean(2)


class Mount(Message):
    """A mount inside the container."""

    destination: str = string(1)
    source: str = string(2)
    type: str = string(3)
    options: list[str] = repeated(string(4))


class LinuxIDMapping(Message):
    """A range of ids of a user namespace."""

    host_id: int = uint(1)
    container_id: int = uint(2)
    size: int = uint(3)


class LinuxNamespace(Message):
    """A namespace to make, or to join if there is a path."""

    type: str = string(1)
    path: str = string(2)


class LinuxDevice(Message):
    """A device node inside the container."""

    path: str = string(1)
    type: str = string(2)
    major: int = int_(3)
    minor: int = int_(4)
    file_mode: int = uint(5)
    uid: int = uint(6)
    gid: int = uint(7)


class LinuxMemory(Message):
    """Limits in bytes; -1 is none."""

    limit: int = int_(1)
    reservation: int = int_(2)
    swap: int = int_(3)
    kernel: int = int_(4)
    kernel_tcp: int = int_(5)
    swappiness: int = uint(6)
    disable_oom_killer: bool = boolean(7)


class LinuxCPU(Message):
    """Shares, and quota and period in microseconds."""

    shares: int = uint(1)
    quota: int = int_(2)
    period: int = uint(3)
    realtime_runtime: int = int_(4)
    realtime_period: int = uint(5)
    cpus: str = string(6)
    mems: str = string(7)


class LinuxPids(Message):
    """How many processes and threads there may be; -1 is any number."""

    limit: int = int_(1)


class LinuxDeviceCgroup(Message):
    """Which devices may be used, in the order of the rules; for a number, -1 is any."""

    allow: bool = boolean(1)
    type: str = string(2)
    major: int = int_(3)
    minor: int = int_(4)
    access: str = string(5)


class LinuxHugepageLimit(Message):
    """Limit of huge pages of one size (``2MB``), in bytes."""

    page_size: str = string(1)
    limit: int = uint(2)


class LinuxThrottleDevice(Message):
    """Limit of one block device: bytes or operations a second."""

    major: int = int_(1)
    minor: int = int_(2)
    rate: int = uint(3)


class LinuxBlockIO(Message):
    """How fast block devices may be used."""

    throttle_read_bps_device: list[LinuxThrottleDevice] = messages(4, LinuxThrottleDevice)
    throttle_write_bps_device: list[LinuxThrottleDevice] = messages(5, LinuxThrottleDevice)
    throttle_read_iops_device: list[LinuxThrottleDevice] = messages(6, LinuxThrottleDevice)
    throttle_write_iops_device: list[LinuxThrottleDevice] = messages(7, LinuxThrottleDevice)


class LinuxResources(Message):
    """Limits of a container's cgroup; ``unified`` are files of cgroup v2 and what to write into them."""

    devices: list[LinuxDeviceCgroup] = messages(1, LinuxDeviceCgroup)
    memory: LinuxMemory | None = message(2, LinuxMemory)
    cpu: LinuxCPU | None = message(3, LinuxCPU)
    pids: LinuxPids | None = message(4, LinuxPids)
    block_io: LinuxBlockIO | None = message(5, LinuxBlockIO)
    hugepage_limits: list[LinuxHugepageLimit] = messages(6, LinuxHugepageLimit)
    unified: dict[str, str] = string_map(1000)


class LinuxSeccompArg(Message):
    """A condition on one argument of a system call."""

    index: int = uint(1)
    value: int = uint(2)
    value_two: int = uint(3)
    op: str = string(4)


class LinuxSyscall(Message):
    """What happens at some system calls; ``errno_ret`` 0 is the default, EPERM."""

    names: list[str] = repeated(string(1))
    action: str = string(2)
    errno_ret: int = uint(3)
    args: list[LinuxSeccompArg] = messages(4, LinuxSeccompArg)


class LinuxSeccomp(Message):
    """Which system calls are allowed."""

    default_action: str = string(1)
    architectures: list[str] = repeated(string(2))
    flags: list[str] = repeated(string(3))
    syscalls: list[LinuxSyscall] = messages(4, LinuxSyscall)


class Linux(Message):
    """What only Linux has."""

    uid_mappings: list[LinuxIDMapping] = messages(1, LinuxIDMapping)
    gid_mappings: list[LinuxIDMapping] = messages(2, LinuxIDMapping)
    sysctl: dict[str, str] = string_map(3)
    resources: LinuxResources | None = message(4, LinuxResources)
    cgroups_path: str = string(5)
    namespaces: list[LinuxNamespace] = messages(6, LinuxNamespace)
    devices: list[LinuxDevice] = messages(7, LinuxDevice)
    seccomp: LinuxSeccomp | None = message(8, LinuxSeccomp)
    rootfs_propagation: str = string(9)
    masked_paths: list[str] = repeated(string(10))
    readonly_paths: list[str] = repeated(string(11))
    mount_label: str = string(12)


class Hook(Message):
    """A program that is executed at a point in a container's life; ``timeout`` in seconds, 0 for none."""

    path: str = string(1)
    args: list[str] = repeated(string(2))
    env: list[str] = repeated(string(3))
    timeout: int = int_(4)


class Hooks(Message):
    """Hooks by when they run."""

    prestart: list[Hook] = messages(1, Hook)
    poststart: list[Hook] = messages(2, Hook)
    poststop: list[Hook] = messages(3, Hook)
    create_runtime: list[Hook] = messages(4, Hook)
    create_container: list[Hook] = messages(5, Hook)
    start_container: list[Hook] = messages(6, Hook)


class Spec(Message):
    """A container."""

    oci_version: str = string(1)
    process: Process | None = message(2, Process)
    root: Root | None = message(3, Root)
    hostname: str = string(4)
    mounts: list[Mount] = messages(5, Mount)
    hooks: Hooks | None = message(6, Hooks)
    annotations: dict[str, str] = string_map(7)
    linux: Linux | None = message(8, Linux)


_JSON_NAMES = {
    "host_id": "hostID",
    "container_id": "containerID",
    "kernel_tcp": "kernelTCP",
    "disable_oom_killer": "disableOOMKiller",
    "block_io": "blockIO",
    "throttle_read_iops_device": "throttleReadIOPSDevice",
    "throttle_write_iops_device": "throttleWriteIOPSDevice",
}
"""JSON keys that are not the field's name in camel case."""

_REQUIRED = frozenset(
    (
        *("oci_version", "terminal", "uid", "gid", "cwd", "hard", "soft", "host_id", "container_id", "size"),
        *("index", "value", "op", "action", "default_action", "allow", "major", "minor", "rate"),
    )
)
"""Fields whose key OCI requires, also with a value that is zero or empty."""

_TYPES: dict[str, type] = {"string": str, "bool": bool, "uint": int, "int": int}


def from_json(cls: type[M], obj: object, path: str = "$") -> M:
    """Return the message that decoded JSON describes; keys that it does not declare are ignored.

    Args:
        cls: which message.
        obj: what ``json.loads`` returned.
        path: where in the document ``obj`` is, for the error.

    Raises:
        ValueError: a value has the wrong type; the text names its place.
    """
    plain = _checked(obj, dict, path)
    values = {}
    for field in cls.fields():
        name = _json_name(field.name)
        if plain.get(name) is not None:
            values[field.name] = _value_from_json(field, plain[name], f"{path}.{name}")
    return cls(**values)


def to_json(source: Message) -> dict[str, Any]:
    """Return what ``json.dumps`` takes, in the order of the fields."""
    return {
        _json_name(name): _value_to_json(value) for name, value in vars(source).items() if value or name in _REQUIRED
    }


def _json_name(name: str) -> str:
    if "_" not in name:
        return name
    first, *others = name.split("_")
    return _JSON_NAMES.get(name) or first + "".join(word.capitalize() for word in others)


def _value_from_json(field: Field, value: object, path: str) -> object:
    if field.kind == "map":
        return {key: _checked(item, str, f"{path}.{key}") for key, item in _checked(value, dict, path).items()}
    if field.repeated:
        items = _checked(value, list, path)
        return [_item_from_json(field, item, f"{path}[{index}]") for index, item in enumerate(items)]
    return _item_from_json(field, value, path)


def _item_from_json(field: Field, value: object, path: str) -> object:
    if field.message is not None:
        return from_json(field.message, value, path)
    return _checked(value, _TYPES[field.kind], path)


def _checked(value: object, wanted: type, path: str) -> Any:  # noqa: ANN401  # its type is `wanted`
    if type(value) is not wanted:
        raise ValueError(f"{path} is {value!r:.40}; it must be of type {wanted.__name__}")
    return value


def _value_to_json(value: object) -> object:
    if isinstance(value, list):
        return [_value_to_json(item) for item in value]
    return to_json(value) if isinstance(value, Message) else value
