"""``configuration.toml``: upstream's sections and keys, as far as this version uses them.

Source of names and defaults: Kata Containers 4.1.0, ``configuration-qemu.toml.in``; ours differs in
``block_device_driver``, whose default there is ``virtio-scsi``: a controller and three modules more. A key that this
version does not use is reported as a warning and ignored, as upstream does; a value of the wrong type is an error that
names the file, the key, what was found and what is wanted.
"""

from __future__ import annotations

import os
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from common.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

MIN_MEMORY_MIB = 256

DEFAULT_PATHS = (
    "/etc/kata-containers/configuration.toml",
    "/usr/share/defaults/kata-containers/configuration.toml",
)


MAX_ROOT_PORTS = 16
"""Each takes address space and time at boot; the limit is upstream's."""


class BlockDriver(StrEnum):
    """``block_device_driver``: how a guest drives a disk."""

    VIRTIO_BLK = "virtio-blk"
    VIRTIO_SCSI = "virtio-scsi"


class BlockAio(StrEnum):
    """``block_device_aio``: how QEMU does a disk's input and output."""

    THREADS = "threads"
    NATIVE = "native"
    IO_URING = "io_uring"


class ExtraMonitor(StrEnum):
    """``extra_monitor_socket``: a second monitor of QEMU for people, beside ours; only with ``enable_debug``."""

    NONE = ""
    HMP = "hmp"
    QMP = "qmp"
    QMP_PRETTY = "qmp-pretty"


class QemuConfig(msgspec.Struct, frozen=True, kw_only=True):
    """``[hypervisor.qemu]``."""

    path: str = "/usr/bin/qemu-system-x86_64"
    kernel: str = "/usr/share/kata-containers/vmlinux.container"
    initrd: str = ""
    kernel_params: str = ""
    machine_type: str = "q35"
    default_vcpus: int = 1
    default_memory: int = 2048
    virtio_fs_daemon: str = "/usr/libexec/virtiofsd"
    virtio_fs_cache: str = "auto"
    virtio_fs_extra_args: tuple[str, ...] = ()
    default_bridges: int = 1
    pcie_root_port: int = 0
    disable_block_device_use: bool = True
    block_device_driver: BlockDriver = BlockDriver.VIRTIO_BLK
    block_device_aio: BlockAio = BlockAio.IO_URING
    block_device_cache_set: bool = False
    block_device_cache_direct: bool = False
    block_device_cache_noflush: bool = False
    seccompsandbox: str = ""
    guest_hook_path: str = ""
    enable_debug: bool = False
    extra_monitor_socket: ExtraMonitor = ExtraMonitor.NONE


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """``[agent.kata]``. ``dial_timeout`` in seconds: from the VM's start until its agent answers."""

    dial_timeout: int = 45
    enable_debug: bool = False


class RuntimeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """``[runtime]``. ``create_container_timeout`` in seconds."""

    enable_debug: bool = False
    disable_guest_seccomp: bool = True
    create_container_timeout: int = 60


class _Hypervisors(msgspec.Struct, frozen=True, kw_only=True):
    qemu: QemuConfig


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
        qemu: ``[hypervisor.qemu]``.
        agent: ``[agent.kata]``.
        runtime: ``[runtime]``.
        ignored: keys of the file that this version does not use, for a warning.
    """

    source: str
    qemu: QemuConfig
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
        qemu=parsed.hypervisor.qemu,
        agent=parsed.agent.kata,
        runtime=parsed.runtime,
        ignored=tuple(_unused(plain, _File)),
    )
    _check(config)
    return config


def _unused(plain: dict[str, object], kind: type[msgspec.Struct], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of keys that no field reads."""
    known = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in plain.items():
        inner = known.get(key)
        if inner is None:
            yield prefix + key
        elif isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, msgspec.Struct):
            yield from _unused(value, inner, f"{prefix}{key}.")


def _check(config: KataConfig) -> None:
    """Refuse what cannot work, before anything is started."""
    qemu = config.qemu
    files = {"path": qemu.path, "kernel": qemu.kernel, "initrd": qemu.initrd, "virtio_fs_daemon": qemu.virtio_fs_daemon}
    for key, value in files.items():
        if not Path(value).is_file():
            raise UsageError(
                f"configuration {config.source}: hypervisor.qemu.{key} = {value!r} is not a file",
                hint="`make image` builds the guest's kernel and initrd; QEMU and virtiofsd are Debian packages",
            )
    if qemu.machine_type != "q35":
        raise UsageError(
            f"configuration {config.source}: hypervisor.qemu.machine_type = {qemu.machine_type!r} is not supported",
            hint='set it to "q35"',
        )
    if qemu.default_memory < MIN_MEMORY_MIB:
        raise UsageError(
            f"configuration {config.source}: hypervisor.qemu.default_memory = {qemu.default_memory} MiB is too small",
            hint=f"at least {MIN_MEMORY_MIB} MiB",
        )
    if not 0 <= qemu.pcie_root_port <= MAX_ROOT_PORTS:
        raise UsageError(
            f"configuration {config.source}: hypervisor.qemu.pcie_root_port = {qemu.pcie_root_port} is not possible",
            hint=f"0 to {MAX_ROOT_PORTS}; `default_bridges` gives 30 slots a bridge",
        )
    if not 1 <= qemu.default_vcpus <= (os.cpu_count() or 1):
        raise UsageError(
            f"configuration {config.source}: hypervisor.qemu.default_vcpus = {qemu.default_vcpus} is not possible here",
            hint=f"this host has {os.cpu_count()} CPUs",
        )
