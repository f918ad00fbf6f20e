"""What is special about each kind of device that is hot-plugged into a Cloud Hypervisor VM; ``devices`` has the rest.

=================  =================  =======================  =====================================================
kind               is asked for by    is known in ``vm.info``  stands on
=================  =================  =======================  =====================================================
share              ``vm.add-fs``      by its socket            a virtiofsd
disk               ``vm.add-disk``    by its serial            a file or block device
vhost-user disk    ``vm.add-disk``    by its serial            a program's socket
persistent memory  ``vm.add-pmem``    by its file's path       a file
host's device      ``vm.add-device``  by its path              a PCI device in sysfs
network device     ``vm.add-net``     by its MAC address       a tap or macvtap, whose descriptor goes beside the
                                                               request
=================  =================  =======================  =====================================================

Files, sockets of programs and devices of the host are a sandbox's once at most (the device manager sees to it), so they
tell an attach from all others as well as a serial does.

Cloud Hypervisor closes an interface's descriptor when the device is gone, and the one that came, of which that is a
duplicate, when the removal is asked for.

Source: ``vmm/src/vm_config.rs`` and ``vmm/src/api/http/http_endpoint.rs`` of v53.0.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ClassVar

from common.services.vmm import BlockSpec, NetworkSpec, PmemSpec, ShareSpec, VhostUserDiskSpec, extra_s
from procs.vmm_manager.drivers import interfaces
from procs.vmm_manager.drivers.cloud_hypervisor import requests
from procs.vmm_manager.drivers.cloud_hypervisor.api import TIMEOUT_S
from procs.vmm_manager.drivers.sources import file_size, is_block_device

if TYPE_CHECKING:
    from collections.abc import Mapping

    from common.config import ClhConfig
    from procs.vmm_manager.drivers.cloud_hypervisor.api import Api
    from procs.vmm_manager.drivers.cloud_hypervisor.confinement import Confinement
    from procs.vmm_manager.drivers.daemons import Daemons
    from procs.vmm_manager.record import DeviceRecord


class Kind:
    """One kind of device, as it is if it stands on nothing that has to be started, watched or removed.

    Attributes:
        prefix: what our names of its devices begin with.
        section: where ``vm.info`` has their configurations.
        mark: the field there that tells an attach from all others.
    """

    prefix: ClassVar[str]
    section: ClassVar[str]
    mark: ClassVar[str]

    def __init__(self, config: ClhConfig, api: Api) -> None:
        self._config = config
        self._api = api

    def marked(self, name: str, device: DeviceRecord) -> str:
        """Return what the mark of a device is."""
        raise NotImplementedError

    async def plug(self, name: str, device: DeviceRecord, place: Mapping[str, int]) -> Any:  # noqa: ANN401 - JSON
        """Have a device plugged; return Cloud Hypervisor's answer.

        Args:
            name: ours for it.
            device: it.
            place: what is to be added to the request.

        Raises:
            KataError, OSError: it was not, or it is not known whether it was.
        """
        raise NotImplementedError

    def said(self, _name: str, _device: DeviceRecord) -> str:
        """Return what a failure's message should add to Cloud Hypervisor's own words."""
        return ""

    async def clear(self, _name: str, *, is_ejected: bool) -> None:
        """Be done with what a device stood on, which Cloud Hypervisor has let go of if the device was ejected."""

    def adopt(self, _name: str) -> None:
        """Go on with what an earlier manager started."""


class Share(Kind):
    """Shared directories; the daemon's socket bears our name of the device."""

    prefix = "share-"
    section = "fs"
    mark = "socket"

    def __init__(self, config: ClhConfig, api: Api, daemons: Daemons) -> None:
        super().__init__(config, api)
        self._daemons = daemons

    def marked(self, name: str, _device: DeviceRecord) -> str:
        """See :class:`Kind`."""
        return name

    async def plug(self, name: str, device: DeviceRecord, place: Mapping[str, int]) -> Any:  # noqa: ANN401 - JSON
        """See :class:`Kind`."""
        assert isinstance(device.spec, ShareSpec)
        self._daemons.start(name)
        body = requests.share(device.spec.tag, name, self._config)
        return await self._api.put("vm.add-fs", {**body, **place})

    def said(self, name: str, _device: DeviceRecord) -> str:
        """See :class:`Kind`."""
        return self._daemons.said(name)

    async def clear(self, name: str, *, is_ejected: bool) -> None:
        """See :class:`Kind`."""
        await self._daemons.end(name, ends_by_itself=is_ejected)
        self._daemons.clear(name)

    def adopt(self, name: str) -> None:
        """See :class:`Kind`."""
        self._daemons.adopt(name)


class _File(Kind):
    """Devices on a file or block device, which is shown to Cloud Hypervisor while it opens it (``confinement``)."""

    def __init__(self, config: ClhConfig, api: Api, confinement: Confinement) -> None:
        super().__init__(config, api)
        self._confinement = confinement

    def said(self, name: str, device: DeviceRecord) -> str:
        """See :class:`Kind`."""
        return self._confinement.said(name, device.spec.source)

    async def clear(self, name: str, *, is_ejected: bool) -> None:
        """See :class:`Kind`."""
        await asyncio.to_thread(self._confinement.hide, name)


class Disk(_File):
    """Disks."""

    prefix = "disk-"
    section = "disks"
    mark = "serial"

    def marked(self, _name: str, device: DeviceRecord) -> str:
        """See :class:`Kind`."""
        return device.serial

    async def plug(self, name: str, device: DeviceRecord, place: Mapping[str, int]) -> Any:  # noqa: ANN401 - JSON
        """See :class:`Kind`."""
        assert isinstance(device.spec, BlockSpec)
        await asyncio.to_thread(is_block_device, device.spec.source)
        with self._confinement.shown(name, device.spec.source) as path:
            body = requests.disk(path, device.spec, device.serial, self._config)
            return await self._api.put("vm.add-disk", {**body, **place})


class VhostUserDisk(Kind):
    """Disks that programs serve. What they answer as a serial is theirs; the configuration has ours."""

    prefix = "vhost-user-disk-"
    section = "disks"
    mark = "serial"

    def marked(self, _name: str, device: DeviceRecord) -> str:
        """See :class:`Kind`."""
        return device.serial

    async def plug(self, _name: str, device: DeviceRecord, place: Mapping[str, int]) -> Any:  # noqa: ANN401 - JSON
        """See :class:`Kind`."""
        assert isinstance(device.spec, VhostUserDiskSpec)
        body = requests.vhost_user_disk(device.spec.source, device.serial)
        return await self._api.put("vm.add-disk", {**body, **place})


class Pmem(_File):
    """Files that a guest maps."""

    prefix = "pmem-"
    section = "pmem"
    mark = "file"

    def marked(self, name: str, device: DeviceRecord) -> str:
        """See :class:`Kind`."""
        return self._confinement.path(name, device.spec.source)

    async def plug(self, name: str, device: DeviceRecord, place: Mapping[str, int]) -> Any:  # noqa: ANN401 - JSON
        """See :class:`Kind`."""
        assert isinstance(device.spec, PmemSpec)
        file_size(device.spec.source)
        with self._confinement.shown(name, device.spec.source) as path:
            return await self._api.put("vm.add-pmem", {**requests.pmem(path, device.spec), **place})


class Vfio(Kind):
    """PCI devices of the host."""

    prefix = "vfio-"
    section = "devices"
    mark = "path"

    def marked(self, _name: str, device: DeviceRecord) -> str:
        """See :class:`Kind`."""
        return str(requests.host_device(device.spec.source)["path"])

    async def plug(self, _name: str, device: DeviceRecord, place: Mapping[str, int]) -> Any:  # noqa: ANN401 - JSON
        """See :class:`Kind`."""
        body = {**requests.host_device(device.spec.source), **place}
        return await self._api.put("vm.add-device", body, timeout_s=TIMEOUT_S + extra_s(device.spec))


class Nic(Kind):
    """Network devices."""

    prefix = "nic-"
    section = "net"
    mark = "mac"

    def marked(self, _name: str, device: DeviceRecord) -> str:
        """See :class:`Kind`."""
        assert isinstance(device.spec, NetworkSpec)
        return device.spec.address(device.serial).lower()

    async def plug(self, name: str, device: DeviceRecord, place: Mapping[str, int]) -> Any:  # noqa: ANN401 - JSON
        """See :class:`Kind`."""
        assert isinstance(device.spec, NetworkSpec)
        async with interfaces.opened(device.spec) as fd:
            body = requests.nic(self.marked(name, device))
            return await self._api.put("vm.add-net", {**body, **place}, fds=[fd])
