"""The devices of a sandbox's VM, as the shim gets them: plugged, used by the guest, confirmed; or aborted.

Nothing is detached while the VM is about to end: its end is the confirmed removal of all
(docs/adr/0009-vm-exit-is-the-confirmed-removal.md).
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from common import log
from common.errors import KataError
from common.services import device
from common.services.vmm import extra_s

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from common.bus.client import BusClient
    from common.services.device import Device
    from common.services.vmm import DeviceSpec, Vm

CALL_TIMEOUT_S = 20


class Devices:
    """Asks the device manager for the devices of one VM.

    Attributes:
        service: the device manager's bus name.
        in_use: what the guest was given and has taken into use, by id.
    """

    def __init__(self, bus: BusClient, vm: Vm) -> None:
        self.service = vm.device_manager
        self.in_use: dict[str, Device] = {}
        self._bus = bus
        self._vm = vm

    async def plug(self, spec: DeviceSpec, *, holder: str = "", use_s: float) -> Device:
        """Plug a device, for the guest to use.

        Args:
            spec: what to plug.
            holder: the container that uses it, or empty for the sandbox.
            use_s: how long it may take until the guest does.

        Raises:
            KataError: it cannot be plugged; nothing is left of it.
        """
        wish = device.Attach(
            sandbox_id=self._vm.sandbox_id,
            hypervisor=self._vm.hypervisor,
            version=self._vm.version,
            buses=self._vm.hotplug_buses,
            spec=spec,
            holder=holder,
            lease_s=use_s + CALL_TIMEOUT_S + extra_s(spec),
        )
        return await self._bus.call(self.service, device.ATTACH, wish, timeout_s=CALL_TIMEOUT_S + extra_s(spec))

    @asynccontextmanager
    async def taken_into_use(
        self, plugged: Device, *, holder: str = "", let_go: Callable[[Device], Awaitable[bool]] | None = None
    ) -> AsyncIterator[None]:
        """Have the guest take a plugged device into use: confirmed at the end of the ``with``, or given back.

        Args:
            plugged: which.
            holder: the container that uses it, or empty for the sandbox.
            let_go: has the guest let go of it, and says whether it has; asked where the guest goes first.
        """
        ref = device.DeviceRef(device_id=plugged.device_id, holder=holder)
        try:
            yield
        except BaseException:
            is_let_go = plugged.is_guest_first and let_go is not None and await let_go(plugged)
            await self._abort(device.Abort(device_id=plugged.device_id, holder=holder, is_let_go=is_let_go))
            raise
        confirmed = await self._bus.call(self.service, device.CONFIRM, ref, timeout_s=CALL_TIMEOUT_S)
        self.in_use[confirmed.device_id] = confirmed

    async def listed(self, *, timeout_s: float) -> set[str]:
        """Return the ids of the devices that the VM has.

        Raises:
            KataError: the device manager does not tell.
        """
        asked = device.ListDevices(sandbox_id=self._vm.sandbox_id)
        answer = await self._bus.call(self.service, device.LIST_DEVICES, asked, timeout_s=timeout_s)
        return {listed.device_id for listed in answer.devices}

    async def _abort(self, wish: device.Abort) -> None:
        try:
            await self._bus.call(self.service, device.ABORT, wish, timeout_s=CALL_TIMEOUT_S)
        except KataError as err:
            log.get().warning("attach not aborted, its lease will run out", device=wish.device_id, error=str(err))
