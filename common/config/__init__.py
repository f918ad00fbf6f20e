"""``configuration.toml``: upstream's sections and keys, as far as this version uses them.

``hypervisors`` has the sections ``[hypervisor.X]``, ``checks`` what is refused of them; here are the others, and the
file as a whole. Source of names and defaults: Kata Containers 4.1.0. Exactly one ``[hypervisor.X]`` is there, as in
upstream's files, and decides which hypervisor it is. A key that this version does not use is reported as a warning and
ignored, as upstream does; a value of the wrong type is an error that names the file, the key, what was found and what
is wanted.
"""

from __future__ import annotations

import tomllib
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import msgspec

from common.config.checks import check
from common.config.hypervisors import (
    HYPERVISORS,
    BlockAio,
    BlockDriver,
    ClhConfig,
    ExtraMonitor,
    FirecrackerConfig,
    HypervisorConfig,
    HypervisorSection,
    QemuConfig,
    VfioPort,
    VirtioFsSection,
)
from common.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "HYPERVISORS",
    "AgentConfig",
    "BlockAio",
    "BlockDriver",
    "ClhConfig",
    "ExtraMonitor",
    "FirecrackerConfig",
    "HypervisorConfig",
    "HypervisorSection",
    "KataConfig",
    "QemuConfig",
    "RuntimeConfig",
    "VfioMode",
    "VfioPort",
    "VirtioFsSection",
    "find",
    "load",
]

DEFAULT_PATHS = (
    "/etc/kata-containers/configuration.toml",
    "/usr/share/defaults/kata-containers/configuration.toml",
)


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """``[agent.kata]``. ``dial_timeout`` in seconds: from the VM's start until its agent answers."""

    dial_timeout: int = 45
    enable_debug: bool = False


class VfioMode(StrEnum):
    """``vfio_mode``: who drives a device of the host, the guest's kernel or the container by VFIO."""

    GUEST_KERNEL = "guest-kernel"
    VFIO = "vfio"


class RuntimeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """``[runtime]``. ``create_container_timeout`` in seconds."""

    enable_debug: bool = False
    disable_guest_seccomp: bool = True
    create_container_timeout: int = 60
    vfio_mode: VfioMode = VfioMode.GUEST_KERNEL


class _Hypervisors(msgspec.Struct, frozen=True, kw_only=True):
    qemu: QemuConfig | None = None
    clh: ClhConfig | None = None
    firecracker: FirecrackerConfig | None = None


class _Agents(msgspec.Struct, frozen=True, kw_only=True):
    kata: AgentConfig = AgentConfig()


class _File(msgspec.Struct, frozen=True, kw_only=True):
    """The file as a whole; its field names are the sections' names."""

    hypervisor: _Hypervisors
    agent: _Agents = _Agents()
    runtime: RuntimeConfig = RuntimeConfig()


class KataConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A whole configuration.

    Attributes:
        source: the file it was read from.
        hypervisor: the one ``[hypervisor.X]``.
        agent: ``[agent.kata]``.
        runtime: ``[runtime]``.
        ignored: keys of the file that this version does not use, for a warning.
    """

    source: str
    hypervisor: HypervisorConfig
    agent: AgentConfig
    runtime: RuntimeConfig
    ignored: tuple[str, ...]


def find(wanted: str = "") -> str:
    """Return the configuration file to use.

    Args:
        wanted: what the caller asked for (``ConfigPath`` of the runtime options, or ``KATA_CONF_FILE``); it wins.

    Raises:
        UsageError: there is none.
    """
    candidates = (wanted,) if wanted else DEFAULT_PATHS
    for candidate in candidates:
        if Path(candidate).is_file():
            return candidate
    raise UsageError(
        f"cannot find usable config file ({', '.join(candidates)})",
        hint="create one of them, or name yours with `ctr run --runtime-config-path` or ConfigPath in containerd",
    )


def load(path: str) -> KataConfig:
    """Read and check a configuration file.

    Raises:
        UsageError: it cannot be read or parsed, or a value is not usable.
    """
    try:
        plain = tomllib.loads(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as err:
        raise UsageError(f"cannot read configuration {path}: {err}") from err
    except tomllib.TOMLDecodeError as err:
        raise UsageError(f"configuration {path} is not valid TOML: {err}", hint="correct the file there") from err
    try:
        parsed = msgspec.convert(plain, _File)
    except msgspec.ValidationError as err:
        raise UsageError(f"configuration {path}: {err}", hint="`$` is the file; correct the key there") from err
    config = KataConfig(
        source=path,
        hypervisor=_chosen(parsed.hypervisor, list(plain["hypervisor"]), path),
        agent=parsed.agent.kata,
        runtime=parsed.runtime,
        ignored=tuple(_unused(plain, _File)),
    )
    check(config.hypervisor, path)
    if config.runtime.vfio_mode is VfioMode.VFIO:
        raise UsageError(
            f"configuration {path}: runtime.vfio_mode = {config.runtime.vfio_mode.value!r} is not supported: guests "
            "have no IOMMU, and a container could reach all of the guest's memory by the device",
            hint=f'set it to "{VfioMode.GUEST_KERNEL}": the guest\'s kernel drives devices of the host',
        )
    return config


def _chosen(sections: _Hypervisors, named: list[str], path: str) -> HypervisorConfig:
    """Return the one section that the file names."""
    known: list[HypervisorConfig | None] = [getattr(sections, name, None) for name in named]
    if len(known) != 1 or known[0] is None:
        raise UsageError(
            f"configuration {path} has {' and '.join(f'[hypervisor.{name}]' for name in named) or 'no [hypervisor.…]'}",
            hint=f"exactly one of {', '.join(f'[hypervisor.{name}]' for name in HYPERVISORS)} says which VM it is",
        )
    return known[0]


def _unused(plain: dict[str, object], kind: type[msgspec.Struct], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of keys that no field reads."""
    known = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in plain.items():
        if key not in known:
            yield prefix + key
            continue
        for inner in (known[key], *get_args(known[key])):
            if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, msgspec.Struct):
                yield from _unused(value, inner, f"{prefix}{key}.")
