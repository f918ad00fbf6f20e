"""The device manager as a process, against a VM manager that misbehaves on demand.

The VM manager here is a real server on a real bus with a list of devices of its own: what it says is what is true.
"""

from __future__ import annotations

import asyncio
import functools
import shutil
import subprocess
import sys
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, ParamSpec

import pytest

from common import paths
from common.bus.client import BusClient
from common.bus.events import Publisher
from common.bus.server import BusServer
from common.bus.wire import Empty
from common.errors import (
    ExhaustedError,
    HypervisorError,
    InterruptedCallError,
    KataError,
    NotFoundError,
    StateError,
    UnavailableError,
)
from common.processes import ProcessIdentity
from common.services import device, vmm
from common.services.health import HEALTH

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

P = ParamSpec("P")

SANDBOX = "s1"
BUSES = ("port0", "port1")
SERVICE = vmm.service_name("qemu")


def in_event_loop(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 100))

    return run


@pytest.fixture(autouse=True)
def run_dir(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    directory = tempfile.mkdtemp(prefix="kt-", dir="/tmp")
    monkeypatch.setenv(paths.RUN_DIR_VARIABLE, directory)
    yield
    shutil.rmtree(directory)


class FakeVmManager:
    """Answers for ``vmm.qemu``.

    Attributes:
        present: the hypervisor's own list, id to bus.
        is_running: whether the sandbox's VM is listed.
        lets_go: whether a removal is confirmed at once; if not, ``confirm_removal`` does it.
        holds_add: if set, an add waits for it before it acts.
        add_error: raised by the next add, after it took effect if ``acts_first``.
        removals: ids that were asked to be removed, in order.
    """

    def __init__(self) -> None:
        self.present: dict[str, str] = {}
        self.is_running = True
        self.lets_go = True
        self.holds_add: asyncio.Event | None = None
        self.add_error: KataError | None = None
        self.acts_first = False
        self.removals: list[str] = []
        self._next = 1
        self._stack = AsyncExitStack()
        self._publisher: Publisher

    async def start(self) -> None:
        self._stack = AsyncExitStack()
        server = await self._stack.enter_async_context(BusServer(SERVICE))
        self._publisher = await self._stack.enter_async_context(Publisher(SERVICE))
        server.register(vmm.LIST_VMS, self._list)
        server.register(vmm.ADD_DEVICE, self._add)
        server.register(vmm.REMOVE_DEVICE, self._remove)
        server.register(vmm.LIST_PRESENT_DEVICES, self._present)

    async def stop(self) -> None:
        await self._stack.aclose()

    async def confirm_removal(self, hypervisor_id: str, *, is_told: bool = True) -> None:
        self.present.pop(hypervisor_id)
        if is_told:
            body = vmm.DeviceRemoved(sandbox_id=SANDBOX, hypervisor_id=hypervisor_id)
            await self._publisher.publish(vmm.DEVICE_REMOVED, body)

    async def end_vm(self) -> None:
        self.is_running = False
        self.present.clear()
        await self._publisher.publish(vmm.VM_EXITED, vmm.VmExited(sandbox_id=SANDBOX))

    async def _add(self, request: vmm.AddDevice) -> vmm.AddedDevice:
        if self.holds_add is not None:
            await self.holds_add.wait()
        error, self.add_error = self.add_error, None
        if error and not self.acts_first:
            raise error
        assert request.bus not in self.present.values(), "a second device on an occupied bus"
        hypervisor_id = f"share-{self._next}"
        self._next += 1
        self.present[hypervisor_id] = request.bus
        if error:
            raise error
        return vmm.AddedDevice(hypervisor_id=hypervisor_id, pci_path="04/00")

    async def _remove(self, request: vmm.RemoveDevice) -> Empty:
        if request.hypervisor_id not in self.present:
            raise NotFoundError(f"no {request.hypervisor_id}")
        self.removals.append(request.hypervisor_id)
        if self.lets_go:
            await self.confirm_removal(request.hypervisor_id)
        return Empty()

    async def _present(self, _: vmm.SandboxRef) -> vmm.PresentDevices:
        listed = (vmm.PresentDevice(hypervisor_id=name, bus=bus) for name, bus in self.present.items())
        return vmm.PresentDevices(devices=tuple(listed))

    async def _list(self, _: Empty) -> vmm.VmList:
        vm = vmm.Vm(
            sandbox_id=SANDBOX,
            hypervisor="qemu",
            version="0",
            accelerator="tcg",
            process=ProcessIdentity(pid=1, start_time=1, boot_id=""),
            agent_socket="",
            stream_sockets=(),
            console_log="",
            hotplug_buses=BUSES,
        )
        return vmm.VmList(vms=(vm,) if self.is_running else ())


class Stand:
    """A device manager's process, a fake VM manager, and calls to the former."""

    def __init__(self, bus: BusClient) -> None:
        self._bus = bus
        self.vms = FakeVmManager()
        self.process: subprocess.Popen[bytes]

    async def start(self) -> None:
        self.process = subprocess.Popen(  # noqa: ASYNC220 - returns at once
            [sys.executable, "-m", "procs.device_manager"], stdout=subprocess.DEVNULL
        )
        while True:
            try:
                await self._bus.call(device.SERVICE, HEALTH, Empty(), timeout_s=30)
            except (UnavailableError, InterruptedCallError):
                continue
            return

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    async def attach(self, tag: str = "t", call_id: str | None = None) -> device.Device:
        request = device.Attach(
            sandbox_id=SANDBOX, hypervisor="qemu", buses=BUSES, spec=vmm.ShareSpec(source="/x", tag=tag)
        )
        return await self._bus.call(device.SERVICE, device.ATTACH, request, timeout_s=30, call_id=call_id)

    async def confirm(self, attached: device.Device) -> device.Device:
        ref = device.DeviceRef(device_id=attached.device_id)
        return await self._bus.call(device.SERVICE, device.CONFIRM, ref, timeout_s=30)

    async def detach(self, attached: device.Device) -> None:
        await self._bus.call(
            device.SERVICE, device.DETACH, device.DeviceRef(device_id=attached.device_id), timeout_s=60
        )

    async def devices(self) -> dict[str, str]:
        listed = await self._bus.call(device.SERVICE, device.LIST_DEVICES, device.ListDevices(), timeout_s=30)
        return {item.hypervisor_id: item.state for item in listed.devices}

    async def wait_devices(self, wanted: dict[str, str]) -> None:
        """Wait until the table is as wanted; asking is the only way to see a table change."""
        while await self.devices() != wanted:  # noqa: ASYNC110 - another process's state
            await asyncio.sleep(0.02)


@asynccontextmanager
async def standing() -> AsyncIterator[Stand]:
    async with BusClient() as bus:
        stand = Stand(bus)
        await stand.vms.start()
        await stand.start()
        try:
            yield stand
        finally:
            stand.kill()
            await stand.vms.stop()


@in_event_loop
async def test_attach_confirm_detach() -> None:
    async with standing() as stand:
        plugged = await stand.attach()
        assert (plugged.state, plugged.hypervisor_id, plugged.bus, plugged.pci_path) == (
            "plugged",
            "share-1",
            "port0",
            "04/00",
        )
        assert (await stand.confirm(plugged)).state == "attached"
        await stand.detach(plugged)
        await stand.detach(plugged)
        assert await stand.devices() == {}
        assert stand.vms.present == {}
        with pytest.raises(NotFoundError):
            await stand.confirm(plugged)


@in_event_loop
async def test_accepted_is_not_removed() -> None:
    async with standing() as stand:
        stand.vms.lets_go = False
        first = await stand.attach("a")
        async with asyncio.TaskGroup() as tasks:
            detaching = tasks.create_task(stand.detach(first))
            await stand.wait_devices({"share-1": "detaching"})
            assert (await stand.attach("b")).bus == "port1", "the bus is taken until the removal is confirmed"
            with pytest.raises(ExhaustedError, match=r"2 in all \(1 detaching, 1 plugged\)"):
                await stand.attach("c")
            with pytest.raises(StateError, match="detaching and cannot be confirmed"):
                await stand.confirm(first)
            await stand.vms.confirm_removal("share-1")
            await detaching
        assert (await stand.attach("c")).bus == "port0"


@in_event_loop
async def test_a_refused_add_leaves_nothing() -> None:
    async with standing() as stand:
        stand.vms.add_error = HypervisorError("QEMU refused", hint="look")
        with pytest.raises(HypervisorError, match="QEMU refused"):
            await stand.attach()
        assert await stand.devices() == {}
        assert (await stand.attach()).bus == "port0"


@in_event_loop
async def test_an_answer_that_was_lost_is_the_same_answer() -> None:
    async with standing() as stand:
        first = await stand.attach(call_id="same")
        assert await stand.attach(call_id="same") == first
        stand.kill()
        await stand.start()
        assert await stand.attach(call_id="same") == first, "also by a successor that remembers no calls"
        assert stand.vms.present == {"share-1": "port0"}


@in_event_loop
async def test_killed_in_the_middle_of_a_removal_its_successor_finishes() -> None:
    async with standing() as stand:
        stand.vms.lets_go = False
        attached = await stand.attach()
        call = asyncio.gather(stand.detach(attached), return_exceptions=True)
        await stand.wait_devices({"share-1": "detaching"})
        stand.kill()
        await call
        await stand.start()
        while stand.vms.removals != ["share-1", "share-1"]:  # noqa: ASYNC110 - another process's doing
            await asyncio.sleep(0.02)  # the successor asks again
        await stand.vms.confirm_removal("share-1")
        await stand.wait_devices({})


@in_event_loop
async def test_an_add_that_acted_and_then_failed_is_undone() -> None:
    async with standing() as stand:
        stand.vms.add_error, stand.vms.acts_first = HypervisorError("late trouble"), True
        with pytest.raises(HypervisorError, match="late trouble"):
            await stand.attach()
        await stand.wait_devices({})
        assert stand.vms.present == {}
        assert stand.vms.removals == ["share-1"]
        assert (await stand.attach()).bus == "port0"


@in_event_loop
async def test_an_add_whose_service_dies_is_settled_when_it_is_back() -> None:
    async with standing() as stand:
        stand.vms.holds_add = asyncio.Event()
        call = asyncio.gather(stand.attach(), return_exceptions=True)
        await stand.wait_devices({"": "attaching"})
        await stand.vms.stop()
        (error,) = await call
        assert isinstance(error, KataError)
        stand.vms.holds_add = None
        stand.vms.present = {"share-1": "port0"}  # it had acted, and nobody heard
        await stand.vms.start()
        await stand.wait_devices({})
        assert stand.vms.present == {}


@in_event_loop
async def test_killed_while_attaching_its_successor_undoes() -> None:
    async with standing() as stand:
        stand.vms.holds_add = asyncio.Event()
        call = asyncio.gather(stand.attach(), return_exceptions=True)
        await stand.wait_devices({"": "attaching"})
        stand.kill()
        await call
        stand.vms.holds_add.set()
        await stand.start()
        await stand.wait_devices({})
        assert stand.vms.present == {}


@in_event_loop
async def test_a_removal_that_happened_unheard_is_noticed() -> None:
    async with standing() as stand:
        await stand.confirm(await stand.attach())
        stand.kill()
        await stand.vms.confirm_removal("share-1", is_told=False)
        await stand.start()
        await stand.wait_devices({})


@in_event_loop
async def test_a_vm_managers_restart_is_a_reason_to_compare() -> None:
    async with standing() as stand:
        await stand.confirm(await stand.attach())
        await stand.vms.stop()
        stand.vms.present.clear()
        stand.vms.is_running = False
        await stand.vms.start()
        await stand.wait_devices({})


@in_event_loop
async def test_the_end_of_the_vm_frees_everything() -> None:
    async with standing() as stand:
        stand.vms.lets_go = False
        await stand.confirm(await stand.attach("a"))
        await stand.attach("b")
        await stand.vms.end_vm()
        await stand.wait_devices({})


@in_event_loop
async def test_a_device_that_vanishes_is_forgotten() -> None:
    async with standing() as stand:
        await stand.confirm(await stand.attach())
        await stand.vms.confirm_removal("share-1")
        await stand.wait_devices({})


@in_event_loop
async def test_a_guest_that_never_lets_go_is_quarantined_until_it_does() -> None:
    async with standing() as stand:
        stand.vms.lets_go = False
        attached = await stand.attach()
        with pytest.raises(HypervisorError, match="quarantined and keeps port0"):
            await stand.detach(attached)
        assert await stand.devices() == {"share-1": "quarantined"}
        assert (await stand.attach("b")).bus == "port1"
        await stand.vms.confirm_removal("share-1")
        await stand.wait_devices({"share-2": "plugged"})


@in_event_loop
async def test_a_vm_manager_that_is_down_is_said() -> None:
    async with standing() as stand:
        await stand.vms.stop()
        with pytest.raises(UnavailableError, match=r"vmm\.qemu is down"):
            await stand.attach()
        await stand.vms.start()
        assert (await stand.attach()).bus == "port0"
