"""What is refused of a ``[hypervisor.X]`` before anything is started, though it has the right type."""

from __future__ import annotations

import os
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from common.config.hypervisors import (
    MAX_ROOT_PORTS,
    BlockDriver,
    ClhConfig,
    FirecrackerConfig,
    GrowingSection,
    HypervisorSection,
    QemuConfig,
    VfioPort,
    VirtioFsSection,
)
from common.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

MIN_MEMORY_MIB = 256
MAX_PLACEHOLDERS = 15
"""Firecracker has interrupts for 17 devices on x86 (1.15 and later; before, 18); vsock and entropy take two."""

MAX_SEGMENTS = 96
"""``MAX_NUM_PCI_SEGMENTS`` (vmm/src/vm_config.rs of Cloud Hypervisor)."""

_MAX_LOGLEVEL = 3

_QEMU_PORTS = (VfioPort.NO_PORT, VfioPort.BRIDGE_PORT, VfioPort.ROOT_PORT)
_VFIO_PORTS: Mapping[type[GrowingSection], tuple[tuple[VfioPort, ...], tuple[VfioPort, ...]]] = MappingProxyType(
    {
        QemuConfig: (_QEMU_PORTS, _QEMU_PORTS),
        ClhConfig: ((VfioPort.NO_PORT, VfioPort.ROOT_PORT), (VfioPort.NO_PORT,)),
    }
)
"""Where devices of the host can go, hot and cold. VMs of Cloud Hypervisor have no bridges: slots are a root bus's."""


class Problem(NamedTuple):
    """A value that is not usable: of which key, why, and what would be."""

    key: str
    why: str
    hint: str


def check(section: HypervisorSection, source: str) -> None:
    """Refuse what cannot work.

    Args:
        section: which is checked.
        source: the file that it is from.

    Raises:
        UsageError: the first problem that was found.
    """
    for kind, find in _RULES:
        if not isinstance(section, kind):
            continue
        for problem in find(section):
            value = msgspec.to_builtins(getattr(section, problem.key))
            raise UsageError(
                f"configuration {source}: hypervisor.{section.name}.{problem.key} = {value!r} {problem.why}",
                hint=problem.hint,
            )


def _files(*keys: str) -> Callable[[Any], Iterator[Problem]]:
    def find(section: HypervisorSection) -> Iterator[Problem]:
        for key in keys:
            if not Path(getattr(section, key)).is_file():
                yield Problem(
                    key,
                    "is not a file",
                    "`make image` builds the guest's kernel and initrd; QEMU and virtiofsd are Debian packages, "
                    "Cloud Hypervisor and Firecracker are to be installed by you",
                )

    return find


def _sizes(section: HypervisorSection) -> Iterator[Problem]:
    if section.default_memory < MIN_MEMORY_MIB:
        yield Problem("default_memory", "MiB is too small", f"at least {MIN_MEMORY_MIB} MiB")
    if not 1 <= section.default_vcpus <= (os.cpu_count() or 1):
        yield Problem("default_vcpus", "is not possible here", f"this host has {os.cpu_count()} CPUs")


def _qemu(section: QemuConfig) -> Iterator[Problem]:
    if section.machine_type != "q35":
        yield Problem("machine_type", "is not supported", 'set it to "q35"')
    if not 0 <= section.pcie_root_port <= MAX_ROOT_PORTS:
        hint = f"0 to {MAX_ROOT_PORTS}; `default_bridges` gives 30 slots a bridge"
        yield Problem("pcie_root_port", "is not possible", hint)
    if section.vhost_user_vsock_daemon and not Path(section.vhost_user_vsock_daemon).is_file():
        hint = "install a vhost-device-vsock there, or leave the path empty to do without"
        yield Problem("vhost_user_vsock_daemon", "is not a file", hint)


def _vfio(section: GrowingSection) -> Iterator[Problem]:
    hot, cold = section.hot_plug_vfio, section.cold_plug_vfio
    if VfioPort.NO_PORT not in (hot, cold):
        yield Problem("cold_plug_vfio", f"with hot_plug_vfio = {hot.value!r} says it twice", "set one of the two")
    hot_ports, cold_ports = _VFIO_PORTS[type(section)]
    for key, port, can in (("hot_plug_vfio", hot, hot_ports), ("cold_plug_vfio", cold, cold_ports)):
        if port not in can:
            yield Problem(key, "is not supported", f"set it to {' or '.join(repr(each.value) for each in can)}")
    if isinstance(section, QemuConfig) and hot is VfioPort.ROOT_PORT and not section.pcie_root_port:
        hint = f"set pcie_root_port to 1 to {MAX_ROOT_PORTS}: each takes one device"
        yield Problem("hot_plug_vfio", "needs a root port", hint)


def _clh(section: ClhConfig) -> Iterator[Problem]:
    if section.block_device_driver is not BlockDriver.VIRTIO_BLK:
        yield Problem("block_device_driver", "is not supported", f'set it to "{BlockDriver.VIRTIO_BLK}"')
    if not 0 <= section.hypervisor_loglevel <= _MAX_LOGLEVEL:
        yield Problem("hypervisor_loglevel", "is not possible", f"0 to {_MAX_LOGLEVEL}")
    if not 1 <= section.default_bridges <= MAX_SEGMENTS:
        yield Problem("default_bridges", "is not possible", f"1 to {MAX_SEGMENTS} PCI segments, each with 31 slots")
    size = section.virtio_fs_queue_size
    if not 0 < size <= 1024 or size & (size - 1):
        yield Problem("virtio_fs_queue_size", "is not possible", "a power of two, at most 1024")


def _drives_qemu(section: QemuConfig) -> Iterator[Problem]:
    if section.block_device_driver is BlockDriver.VIRTIO_MMIO:
        yield Problem("block_device_driver", "is not supported", 'set it to "virtio-blk" or "virtio-scsi"')


def _firecracker(section: FirecrackerConfig) -> Iterator[Problem]:
    if section.jailer_path and not Path(section.jailer_path).is_file():
        hint = "install Firecracker's jailer there, or leave the path empty to run without one"
        yield Problem("jailer_path", "is not a file", hint)
    if "firecracker" not in Path(section.path).name:
        yield Problem("path", "will be refused", "the jailer wants a file whose name contains `firecracker`")
    if section.disable_block_device_use:
        hint = "set it to false: Firecracker shares no directories, so a root file system must be a disk"
        yield Problem("disable_block_device_use", "leaves no way to give a guest its root file system", hint)
    if section.block_device_driver is BlockDriver.VIRTIO_SCSI:
        yield Problem("block_device_driver", "is not supported", 'set it to "virtio-mmio" or "virtio-blk"')
    if min(section.placeholder_drives, section.read_only_placeholder_drives) < 0:
        yield Problem("placeholder_drives", "is not possible", "neither kind of placeholder can be fewer than none")
    if section.placeholder_drives + section.read_only_placeholder_drives > MAX_PLACEHOLDERS:
        hint = f"together with read_only_placeholder_drives at most {MAX_PLACEHOLDERS}"
        yield Problem("placeholder_drives", "is not possible", hint)


_RULES: tuple[tuple[type[HypervisorSection], Callable[[Any], Iterator[Problem]]], ...] = (
    (HypervisorSection, _files("path", "kernel", "initrd")),
    (VirtioFsSection, _files("virtio_fs_daemon")),
    (HypervisorSection, _sizes),
    (QemuConfig, _qemu),
    (QemuConfig, _drives_qemu),
    (GrowingSection, _vfio),
    (ClhConfig, _clh),
    (FirecrackerConfig, _firecracker),
)
