"""PCI devices of the host that a container is given whole, by the device node of their IOMMU group.

``ctr run --device /dev/vfio/12``, Docker's ``--device`` and Kubernetes' device plugins give a container the node of a
group. Its guest gets all devices of that group, each for itself, and its agent is told of each as upstream's is:
``vfio-pci-gk``, driven by the guest's kernel. The node itself means nothing there, and the container has none
(docs/adr/0032-a-containers-iommu-groups.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common import paths
from common.config import VfioPort
from common.errors import NotFoundError, UnsupportedError
from common.linux import iommu
from common.protocols import agent
from common.services.vmm import VfioSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from common.config import HypervisorConfig
    from common.services.device import Device
    from common.services.vmm import DeviceSpec
    from procs.shim.spec import HostGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """An IOMMU group that a guest gets.

    Attributes:
        name: its number on the host.
        path: its node in the container, as the host's configuration has it.
        functions: its devices.
    """

    name: str
    path: str
    functions: tuple[VfioSpec, ...]

    def device(self, plugged: Mapping[DeviceSpec, Device]) -> agent.Device:
        """Return what the agent is told of it: where the guest has which device of the host."""
        return agent.Device(
            id=self.name,
            type=agent.GUEST_DRIVEN,
            container_path=self.path,
            options=[f"{function.source}={plugged[function].guest_path}" for function in self.functions],
        )


def name_of(major: int, minor: int) -> str:
    """Return what a character device of the host is called below ``/dev/vfio``, or nothing if it is not there."""
    return iommu.vfio_name(major, minor, Path(paths.sysfs()))


def of_group(wanted: HostGroup, config: HypervisorConfig) -> Group:
    """Return the group that a device node stands for.

    Raises:
        UnsupportedError: the configuration gives guests no devices of the host, or it is no group that could be given.
        NotFoundError: the host has no such group.
    """
    if config.vfio_port is VfioPort.NO_PORT:
        raise UnsupportedError(
            f"device {wanted.path} of the host is asked for, and the configuration gives guests none",
            hint="hot_plug_vfio of [hypervisor.qemu] or [hypervisor.clh] says where in a VM they go",
        )
    if not wanted.name.isdigit():
        raise UnsupportedError(
            f"device {wanted.path} is the host's /dev/vfio/{wanted.name}, which cannot be handed to a guest",
            hint="name the group of a device behind an IOMMU, /dev/vfio/NUMBER",
        )
    try:
        members = iommu.members(wanted.name, Path(paths.sysfs()))
    except FileNotFoundError as err:
        raise NotFoundError(
            f"device {wanted.path}: the host has no IOMMU group {wanted.name}", hint="check that it still exists"
        ) from err
    functions = [member.name for member in members if not iommu.is_bridge(member)]
    is_express = config.has_root_ports_for_vfio
    return Group(
        name=wanted.name,
        path=wanted.path,
        functions=tuple(VfioSpec(source=address, is_express=is_express) for address in functions),
    )
