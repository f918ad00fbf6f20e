"""Network devices of a VM: each an interface of the host that QEMU has open, and a virtio-net device on it.

The interface is opened in the sandbox's network namespace and handed to QEMU, which never enters that namespace itself
(``getfd`` takes a descriptor that came beside it, SCM_RIGHTS). A device that is gone leaves its end on the host open
until ``netdev_del``: only then is the interface nobody's, and a tap that was made for it goes.

QMP has no question for the ends on the host; the monitor for people has one.

Source: qapi/net.json and net/net.c (``print_net_client``) of QEMU 7.2.
"""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING

from common.errors import HypervisorError
from common.services.vmm import NetworkSpec
from procs.vmm_manager.drivers import interfaces
from procs.vmm_manager.drivers.qemu.backends import Backend

if TYPE_CHECKING:
    from procs.vmm_manager.drivers.qemu.qmp import Qmp
    from procs.vmm_manager.record import DeviceRecord

_END = re.compile(r"^(?: \\ )?(nic-\d+): index=\d+,type=tap", re.MULTILINE)


class Nics(Backend):
    """The id of a device is also its end's on the host."""

    prefix = "nic-"

    def __init__(self, qmp: Qmp) -> None:
        self._qmp = qmp

    async def make(self, device_id: str, device: DeviceRecord) -> dict[str, object]:
        """Open the interface and have QEMU take it.

        Raises:
            NotFoundError: there is no such namespace or interface.
            UsageError: it is not of that kind, or in use.
            HypervisorError: QEMU refused.
        """
        spec = device.spec
        assert isinstance(spec, NetworkSpec)
        async with interfaces.opened(spec) as fd:
            await self._qmp.send(fd, device_id)
        try:
            await self._qmp.execute("netdev_add", type="tap", id=device_id, fd=device_id)
        except HypervisorError:
            with suppress(HypervisorError):  # it may have been taken out of QEMU's list of descriptors already
                await self._qmp.execute("closefd", fdname=device_id)
            raise
        return {
            "driver": "virtio-net-pci",
            "disable-legacy": "on",
            "netdev": device_id,
            "mac": spec.address(device.serial),
        }

    async def unmake(self, device_id: str) -> None:
        """Have QEMU close the interface."""
        if device_id in await self.made():
            await self._qmp.execute("netdev_del", id=device_id)

    async def made(self) -> set[str]:
        """Return the ends that QEMU has open."""
        answer = await self._qmp.execute("human-monitor-command", **{"command-line": "info network"})
        return set(_END.findall(str(answer).replace("\r", "")))
