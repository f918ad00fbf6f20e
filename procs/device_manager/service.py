"""The device manager's verbs (``common.services.device``): wishes become steps, and the caller waits for their outcome.

A caller that repeats a call, to us or to our successor, finds the device as its first call left it: an attach finds the
row of its source, a detach finds the row gone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.bus.wire import Empty
from common.errors import HypervisorError, NotFoundError, UsageError
from common.services import device as contract
from procs.device_manager.states import LEAVING, USABLE, State

if TYPE_CHECKING:
    from collections.abc import Iterable

    from common.bus.server import BusServer
    from common.services.device import Device
    from procs.device_manager.journal import Journal
    from procs.device_manager.lives import Lives
    from procs.device_manager.measures import Measures


class DeviceService:
    """Answers callers.

    Args:
        lives: what the wishes are put to.
        journal: tells stories.
        measures: keeps account.
        hypervisors: whose VM managers there are.
    """

    def __init__(
        self,
        lives: Lives,
        journal: Journal,
        measures: Measures,
        hypervisors: Iterable[str],
    ) -> None:
        self._lives = lives
        self._table = lives.table
        self._journal = journal
        self._measures = measures
        self._hypervisors = tuple(hypervisors)

    def register(self, server: BusServer) -> None:
        """Register every verb."""
        server.register(contract.ATTACH, self.attach)
        server.register(contract.CONFIRM, self.confirm)
        server.register(contract.ABORT, self.abort)
        server.register(contract.DETACH, self.detach)
        server.register(contract.LIST_DEVICES, self.list_devices)
        server.register(contract.TELL_STORY, self.tell_story)

    async def attach(self, request: contract.Attach) -> Device:
        """Plug a device, or add a holder to it; either is undone unless it is confirmed within its lease.

        Raises:
            UsageError: the source is of no use, or there is no such hypervisor.
            NotFoundError: there is no such source, or no such VM.
            AlreadyExistsError: the source is in use in a way that allows no second one.
            ExhaustedError: every place is taken.
            KataError: what the VM manager answered; what may be left of the device is undone.
        """
        if request.hypervisor not in self._hypervisors:
            raise UsageError(
                f"no VM manager for hypervisor {request.hypervisor!r}", hint=f"there is {', '.join(self._hypervisors)}"
            )
        with self._measures.timed("attach", request.hypervisor, contract.kind_of(request.spec)):
            backing = await self._lives.look(request.spec)
            await self._lives.settle(request.sandbox_id)
            while (held := self._table.holding(request, backing)) is not None and held.state in LEAVING:
                await self._wait_gone(held.device_id)
            if held is not None:
                device = self._lives.begin(self._table.hold(held.device_id, request))
            else:
                device = self._lives.begin(self._table.begin(request, backing))
            return await self._plugged(device.device_id, request.sandbox_id)

    async def confirm(self, request: contract.DeviceRef) -> Device:
        """Note that the guest of a holder uses a device."""
        return self._lives.begin(self._table.confirm(request.device_id, request.holder))

    async def detach(self, request: contract.DeviceRef) -> Empty:
        """Take a holder away, and with the last one the device; returns when the hypervisor has confirmed that.

        A device or a holder that is gone is fine.

        Raises:
            HypervisorError: the guest did not let go in time; the device is quarantined.
            StateError: it has been quarantined before.
            KataError: the VM manager is away; the removal goes on when it is back.
        """
        await self._give_back(request.device_id, request.holder, is_let_go=True)
        return Empty()

    async def abort(self, request: contract.Abort) -> Empty:
        """Give a device up that its holder cannot use; returns as :meth:`detach` does.

        Where the guest goes first and its word is missing, the device stays, quarantined, until that comes.

        Raises:
            HypervisorError: as of :meth:`detach`.
            StateError: as of :meth:`detach`.
            KataError: as of :meth:`detach`.
        """
        await self._give_back(request.device_id, request.holder, is_let_go=request.is_let_go)
        return Empty()

    async def list_devices(self, request: contract.ListDevices) -> contract.DeviceList:
        """Return the devices of one sandbox, or all."""
        devices = self._table.of(request.sandbox_id) if request.sandbox_id else self._table
        return contract.DeviceList(devices=tuple(devices))

    async def tell_story(self, request: contract.TellStory) -> contract.Story:
        """Return what happened to a device.

        Raises:
            NotFoundError: nothing is known of it.
        """
        story = self._journal.story(request.device_id)
        if story is None:
            raise NotFoundError(
                f"nothing is known of a device {request.device_id!r}",
                hint="`kata-runtime devices` lists what there is; what is long gone is forgotten",
            )
        return story

    async def _give_back(self, device_id: str, holder: str, *, is_let_go: bool) -> None:
        """Take a holder away, and see the device to its end if that was the last one."""
        device = self._table.get(device_id)
        if device is None:
            return
        with self._measures.timed("detach", device.hypervisor, device.kind):
            now, failure = await self._lives.wait_while(device_id, (State.ATTACHING,))
            if now is not None and now.state == State.ATTACHING and failure is not None:
                raise failure
            if now is not None:
                released = self._lives.begin(self._table.release(device_id, holder, is_let_go=is_let_go))
                if released.state != State.QUARANTINED:
                    await self._wait_gone(device_id)

    async def _plugged(self, device_id: str, sandbox_id: str) -> Device:
        """Return a device once it is plugged."""
        device, failure = await self._lives.wait_while(device_id, (State.ATTACHING,))
        if device is None or device.state not in USABLE:
            raise failure or NotFoundError(f"the VM of sandbox {sandbox_id} ended before its device was plugged")
        return device

    async def _wait_gone(self, device_id: str) -> None:
        """Wait for the confirmed removal of a device that is on its way out."""
        device, failure = await self._lives.wait_while(device_id, LEAVING)
        if device is not None and device.state == State.QUARANTINED:
            raise HypervisorError(
                f"the guest did not let {device.hypervisor_id} go in time; "
                f"it is quarantined and keeps slot {device.slot} of {device.bus}",
                hint="it is freed by a late confirmation or the end of the sandbox",
            )
        if device is not None and failure is not None:
            raise failure
