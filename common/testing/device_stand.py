"""A device manager under test: the real program, on a real bus, against a VM manager that misbehaves on demand.

The VM manager here is a real server on a real bus with a list of devices of its own: what it says is what is true.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from common import paths, shards, trace
from common.bus.client import BusClient
from common.bus.events import Publisher, Received, Resync, Subscriber
from common.bus.server import BusServer
from common.bus.wire import Empty, Event
from common.errors import (
    AlreadyExistsError,
    DeadlineError,
    InterruptedCallError,
    KataError,
    NotFoundError,
    UnavailableError,
)
from common.processes import ProcessIdentity
from common.services import device, vmm
from common.services.channel import HybridVsock
from common.services.health import HEALTH, Health
from common.testing.isolation import run_dir

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


REMOVAL_TIMEOUT_S = 1.0
"""How long the guests of these tests may take to let a device go."""
SANDBOX = "s1"
BUSES = tuple(vmm.HotplugBus(name=f"port{number}", kind=vmm.BusKind.PCI, slots=1) for number in range(2))
SERVICE = vmm.service_name("qemu")


def share(name: str) -> vmm.ShareSpec:
    """Return what describes a share of a directory in the run directory, and make the directory."""
    source = Path(paths.run_dir()) / name
    source.mkdir(exist_ok=True)
    return vmm.ShareSpec(source=str(source), tag=name)


class FakeVmManager:
    """Answers for ``vmm.qemu``.

    Attributes:
        present: the hypervisor's own list, by id.
        is_running: whether the sandbox's VM is listed.
        is_compared: set whenever the device manager has asked for the list of VMs.
        lets_go: whether a removal is confirmed at once; if not, ``confirm_removal`` does it.
        holds_add: if set, an add waits for it before it acts.
        add_error: raised by the next add, after it took effect if ``acts_first``.
        removal_error: raised by every request for a removal.
        removals: ids that were asked to be removed, in order.
    """

    def __init__(self) -> None:
        self.present: dict[str, vmm.PresentDevice] = {}
        self.is_running = True
        self.is_compared = asyncio.Event()
        self.lets_go = True
        self.holds_add: asyncio.Event | None = None
        self.add_error: KataError | None = None
        self.acts_first = False
        self.removal_error: KataError | None = None
        self.removals: list[str] = []
        self._next = 1
        self._stack = AsyncExitStack()
        self._publisher: Publisher

    async def start(self) -> None:
        """Answer calls."""
        self._stack = AsyncExitStack()
        server = await self._stack.enter_async_context(BusServer(SERVICE))
        self._publisher = await self._stack.enter_async_context(Publisher(SERVICE))
        server.register(vmm.LIST_VMS, self._list)
        server.register(vmm.ADD_DEVICE, self._add)
        server.register(vmm.REMOVE_DEVICE, self._remove)
        server.register(vmm.LIST_PRESENT_DEVICES, self._present)

    @property
    def holders(self) -> dict[str, str]:
        """The bus of each device that is present."""
        return {hypervisor_id: device.bus for hypervisor_id, device in self.present.items()}

    def take(self, hypervisor_id: str, *, bus: str, slot: int, serial: str, spec: vmm.DeviceSpec | None = None) -> None:
        """Have the hypervisor take a device."""
        self.present[hypervisor_id] = vmm.PresentDevice(
            hypervisor_id=hypervisor_id, bus=bus, slot=slot, serial=serial, guest_path="04/00", spec=spec
        )

    async def stop(self) -> None:
        """Answer no more."""
        await self._stack.aclose()

    async def confirm_removal(self, hypervisor_id: str, *, is_told: bool = True) -> None:
        """Have the guest let a device go; the device manager hears of it or does not."""
        self.present.pop(hypervisor_id)
        if is_told:
            body = vmm.DeviceRemoved(sandbox_id=SANDBOX, hypervisor_id=hypervisor_id)
            await self._publisher.publish(vmm.DEVICE_REMOVED, body, audience=shards.FIRST)

    async def publish_nonsense(self) -> None:
        """Publish an event whose body is not of its type."""
        await self._publisher.publish(Event(vmm.VM_EXITED.topic, Empty), Empty(), audience=shards.FIRST)

    async def end_vm(self) -> None:
        """Have the VM end."""
        self.is_running = False
        self.present.clear()
        await self._publisher.publish(vmm.VM_EXITED, vmm.VmExited(sandbox_id=SANDBOX), audience=shards.FIRST)

    async def _add(self, request: vmm.AddDevice) -> vmm.AddedDevice:
        self._require_vm()
        if self.holds_add is not None:
            await self.holds_add.wait()
        error, self.add_error = self.add_error, None
        if error and not self.acts_first:
            raise error
        if (request.bus, request.slot) in {(present.bus, present.slot) for present in self.present.values()}:
            raise AlreadyExistsError(f"{request.bus} is occupied")
        hypervisor_id = f"share-{self._next}"
        self._next += 1
        self.take(hypervisor_id, bus=request.bus, slot=request.slot, serial=request.serial, spec=request.spec)
        if error:
            raise error
        return vmm.AddedDevice(hypervisor_id=hypervisor_id, guest_path="04/00")

    async def _remove(self, request: vmm.RemoveDevice) -> Empty:
        if request.hypervisor_id not in self.present:
            raise NotFoundError(f"no {request.hypervisor_id}")
        if self.removal_error:
            raise self.removal_error
        self.removals.append(request.hypervisor_id)
        if self.lets_go:
            await self.confirm_removal(request.hypervisor_id)
        return Empty()

    def _require_vm(self) -> None:
        if not self.is_running:
            raise NotFoundError(f"sandbox {SANDBOX} has no running VM")

    async def _present(self, _: vmm.SandboxRef) -> vmm.PresentDevices:
        self._require_vm()
        return vmm.PresentDevices(devices=tuple(self.present.values()))

    async def _list(self, _: Empty) -> vmm.VmList:
        self.is_compared.set()
        vm = vmm.Vm(
            sandbox_id=SANDBOX,
            hypervisor="qemu",
            version="0",
            accelerator="tcg",
            process=ProcessIdentity(pid=1, start_time=1, boot_id=""),
            channel=HybridVsock(socket=""),
            console_log="",
            hotplug_buses=BUSES,
        )
        return vmm.VmList(vms=(vm,) if self.is_running else ())


class DeviceManager:
    """A device manager's process, and calls to it on behalf of one sandbox.

    Args:
        bus: leads there.
        sandbox_id: on whose behalf.
        buses: of the sandbox's VM.
        shard: which shard it is.
        shards_of: how many there are.
        removal_timeout_s: how long the guest may take to let a device go.

    Attributes:
        service: its bus name.
        process: it, once it is started.
    """

    def __init__(
        self,
        bus: BusClient,
        sandbox_id: str,
        buses: tuple[vmm.HotplugBus, ...],
        *,
        shard: int = 0,
        shards_of: int = 1,
        removal_timeout_s: float = REMOVAL_TIMEOUT_S,
        hypervisor: str = "qemu",
        version: str = "7.2.22",
    ) -> None:
        self.service = shards.service_name(shard)
        self._shard = f"{shard}/{shards_of}"
        self._bus = bus
        self._sandbox_id = sandbox_id
        self._buses = buses
        self._hypervisor = hypervisor
        self._version = version
        self._removal_timeout_s = removal_timeout_s
        self.process: subprocess.Popen[bytes]
        self._news: Subscriber

    def spawn(self, *, fatal: str = "") -> None:
        """Start a device manager that ends at a point of its code, as :mod:`common.trace` names them."""
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "procs.device_manager"),
                f"--shard={self._shard}",
                f"--removal-timeout={self._removal_timeout_s}",
            ],
            stdout=subprocess.DEVNULL,
            env={**os.environ, trace.VARIABLE: fatal},
        )

    async def start(self, *, fatal: str = "") -> None:
        """Start a device manager and wait until it answers; see :meth:`spawn`."""
        self.spawn(fatal=fatal)
        while True:
            try:
                await self.health()
            except (UnavailableError, InterruptedCallError, DeadlineError):  # it imports slowly on a slow host
                continue
            return

    async def heard(self, event: Event[device.Device]) -> device.Device:
        """Wait until the device manager publishes an event; :meth:`listening` has to be entered before."""
        async for item in self._news:
            if isinstance(item, Received) and (body := item.body_of(event)) is not None:
                return body
        raise AssertionError(event.topic)

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Hear from here on what the device manager publishes."""
        async with Subscriber({self.service: self._sandbox_id}) as self._news:
            assert isinstance(await anext(self._news), Resync)
            yield

    def kill(self) -> None:
        """Kill the device manager."""
        self.process.kill()
        self.process.wait()

    async def attach(
        self, name: str = "a", *, spec: vmm.DeviceSpec | None = None, holder: str = "", call_id: str | None = None
    ) -> device.Device:
        """Call ``attach``, for a share of the directory of that name unless told otherwise."""
        request = device.Attach(
            sandbox_id=self._sandbox_id,
            hypervisor=self._hypervisor,
            version=self._version,
            buses=self._buses,
            spec=spec or share(name),
            holder=holder,
        )
        return await self._bus.call(self.service, device.ATTACH, request, timeout_s=30, call_id=call_id)

    async def confirm(self, attached: device.Device, holder: str = "") -> device.Device:
        """Call ``confirm``."""
        return await self.confirm_id(attached.device_id, holder)

    async def confirm_id(self, device_id: str, holder: str = "") -> device.Device:
        """Call ``confirm`` for a device that may not exist."""
        ref = device.DeviceRef(device_id=device_id, holder=holder)
        return await self._bus.call(self.service, device.CONFIRM, ref, timeout_s=30)

    async def detach(self, attached: device.Device, holder: str = "", call_id: str | None = None) -> None:
        """Call ``detach``."""
        ref = device.DeviceRef(device_id=attached.device_id, holder=holder)
        await self._bus.call(self.service, device.DETACH, ref, timeout_s=60, call_id=call_id)

    async def abort(self, attached: device.Device, *, is_let_go: bool) -> None:
        """Call ``abort``."""
        wish = device.Abort(device_id=attached.device_id, is_let_go=is_let_go)
        await self._bus.call(self.service, device.ABORT, wish, timeout_s=60)

    async def story(self, device_id: str) -> list[str]:
        """Call ``tell_story``; return what happened, in words."""
        request = device.TellStory(device_id=device_id)
        told = await self._bus.call(self.service, device.TELL_STORY, request, timeout_s=30)
        return [chapter.event for chapter in told.chapters]

    async def list(self) -> tuple[device.Device, ...]:
        """Call ``list_devices``."""
        listed = await self._bus.call(self.service, device.LIST_DEVICES, device.ListDevices(), timeout_s=30)
        return listed.devices

    async def health(self) -> Health:
        """Call ``health``."""
        return await self._bus.call(self.service, HEALTH, Empty(), timeout_s=30)

    async def devices(self) -> dict[str, str]:
        """Return each device's state by the hypervisor's id."""
        return {item.hypervisor_id: item.state for item in await self.list()}

    async def wait_devices(self, wanted: dict[str, str]) -> None:
        """Wait until the table is as wanted; asking is the only way to see a table change."""
        while await self.devices() != wanted:  # noqa: ASYNC110 - another process's state
            await asyncio.sleep(0.02)


class Stand(DeviceManager):
    """A device manager whose VM manager is fake."""

    def __init__(self, bus: BusClient) -> None:
        super().__init__(bus, SANDBOX, BUSES)
        self.vms = FakeVmManager()


@asynccontextmanager
async def standing() -> AsyncIterator[Stand]:
    """Provide a device manager's process and its VM manager."""
    with run_dir():
        async with BusClient() as bus:
            stand = Stand(bus)
            await stand.vms.start()
            await stand.start()
            try:
                yield stand
            finally:
                stand.kill()
                await stand.vms.stop()
