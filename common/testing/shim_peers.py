"""What a shim talks to, faked: the VM manager, the device manager, and containerd's events.

Each is a real server on a real bus or socket in the test's event loop; a VM is a process that sleeps, with a
:class:`common.testing.fake_guest.FakeGuest` behind its sockets.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from common import paths
from common.bus.wire import Empty
from common.errors import HypervisorError
from common.linux import cgroup, identity
from common.processes import ProcessIdentity
from common.protocols import events, task
from common.services import device, vmm
from common.testing.fake_channel import FakeHybrid, FakeSerial
from common.testing.fake_guest import FakeGuest
from common.ttrpc.server import TtrpcServer

if TYPE_CHECKING:
    from contextlib import AsyncExitStack

    from common.bus.events import Publisher
    from common.bus.server import BusServer
    from common.errors import KataError


class FakeVmManager:
    """``vmm.qemu`` with VMs that are sleeping processes.

    Attributes:
        guest: the guest of the VM, once there is one.
        wish: the last request for a VM.
        calls: verbs that were asked, in order.
        error: what to answer to ``create_vm`` instead of doing it.
        destroy_error: the same for ``destroy_vm``.
        has_vm: set when a VM was created.
        console: what the guest has printed.
        is_guest_silent: whether the agent of the next VM never answers.
        channel: what the next VM has for a channel.
        features: what the next VM's agent says that it can do, if not what ours does.
    """

    def __init__(self, group: AsyncExitStack) -> None:
        self.guest: FakeGuest | None = None
        self.wish: vmm.CreateVm
        self.process: asyncio.subprocess.Process | None = None
        self.calls: list[str] = []
        self.request_ids: list[str] = []
        self.error: KataError | None = None
        self.destroy_error: KataError | None = None
        self.has_vm = asyncio.Event()
        self.console = ""
        self.is_guest_silent = False
        self.channel: type[FakeSerial | FakeHybrid] = FakeSerial
        self.features: list[str] | None = None
        self._stack = group
        self._vm: vmm.Vm | None = None

    def register(self, server: BusServer) -> None:
        """Answer the verbs that a shim asks."""
        server.register(vmm.CREATE_VM, self._create)
        server.register(vmm.DESCRIBE_VM, self._describe)
        server.register(vmm.DESTROY_VM, self._destroy)
        server.register(vmm.RESUME_VM, self._resume)

    async def end_vm(self) -> None:
        """Kill the VMM and with it the guest."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        if self.guest is not None:
            self.guest.power_off()

    async def _create(self, request: vmm.CreateVm) -> vmm.Vm:
        self.calls.append("create_vm")
        self.wish = request
        if self.error:
            raise self.error
        directory = paths.vm_dir(request.sandbox_id)
        await asyncio.to_thread(Path(directory).mkdir)
        self.guest = await self._stack.enter_async_context(FakeGuest(self.channel(Path(directory))))
        self.guest.channel.is_silent = self.is_guest_silent
        if self.features is not None:
            self.guest.features = self.features
        self.process = await asyncio.create_subprocess_exec("sleep", "1000", start_new_session=True)
        _put_into_cgroup(self.process.pid, request.sandbox_id)
        self._vm = vmm.Vm(
            sandbox_id=request.sandbox_id,
            hypervisor=request.config.name,
            version="0",
            accelerator="tcg",
            process=ProcessIdentity(
                pid=self.process.pid,
                start_time=identity.start_time(self.process.pid),
                boot_id=identity.boot_id(),
            ),
            channel=self.guest.channel.where,
            console_log=f"{directory}/console.log",
            hotplug_buses=(vmm.HotplugBus(name="bus0", kind=vmm.BusKind.PCI, slots=1),),
        )
        self.has_vm.set()
        return self._vm

    async def _describe(self, request: vmm.SandboxRef) -> vmm.VmStatus:
        self.calls.append("describe_vm")
        if self._vm is None or self.process is None:
            raise HypervisorError(f"no VM of {request.sandbox_id}")
        is_running = self.process.returncode is None
        return vmm.VmStatus(
            vm=self._vm, is_running=is_running, runstate="running", console_tail=self.console, log_tail=""
        )

    async def _resume(self, _: vmm.SandboxRef) -> Empty:
        self.calls.append("resume_vm")
        return Empty()

    async def _destroy(self, request: vmm.SandboxRef) -> Empty:
        self.calls.append("destroy_vm")
        if self.destroy_error:
            raise self.destroy_error
        await self.end_vm()
        shutil.rmtree(paths.vm_dir(request.sandbox_id), ignore_errors=True)
        cgroup.kill(request.sandbox_id)
        return Empty()


class FakeDeviceManager:
    """``device``: remembers what it was asked; ``has_confirmed`` is set by the first ``confirm``.

    Attributes:
        error: what to answer to the next ``attach`` instead of doing it.
        publisher: tells the shim's what becomes of devices.
        present: what was confirmed and is not lost.
        is_guest_first: whether what is plugged is of a hypervisor that takes devices without asking.
        aborted: what was asked of ``abort``.
    """

    publisher: Publisher

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.has_confirmed = asyncio.Event()
        self.attached: list[device.Attach] = []
        self.error: KataError | None = None
        self.present: list[device.Device] = []
        self.is_guest_first = False
        self.aborted: list[device.Abort] = []

    def register(self, server: BusServer) -> None:
        """Answer the verbs that a shim asks."""
        server.register(device.LIST_DEVICES, self._list)
        server.register(device.ATTACH, self._attach)
        server.register(device.CONFIRM, self._confirm)
        server.register(device.ABORT, self._abort)

    async def _attach(self, request: device.Attach) -> device.Device:
        self.calls.append("attach")
        self.attached.append(request)
        if self.error:
            raise self.error
        return self._device(request)

    async def _confirm(self, _: device.DeviceRef) -> device.Device:
        self.calls.append("confirm")
        self.has_confirmed.set()
        self.present.append(self._device(self.attached[-1]))
        return self.present[-1]

    async def _list(self, _: device.ListDevices) -> device.DeviceList:
        return device.DeviceList(devices=tuple(self.present))

    async def _abort(self, request: device.Abort) -> Empty:
        self.calls.append("abort")
        self.aborted.append(request)
        return Empty()

    def _device(self, request: device.Attach) -> device.Device:
        return device.Device(
            device_id=f"d{len(self.attached)}",
            sandbox_id=request.sandbox_id,
            hypervisor=request.hypervisor,
            hypervisor_id="share-1",
            bus=request.buses[0].name,
            slot=0,
            guest_path="02/00",
            is_guest_first=self.is_guest_first,
            state="plugged",
            since=0.0,
            spec=request.spec,
            holders=(device.Holder(name=request.holder, since=0.0),),
        )


class FakeContainerd:
    """Takes events, as containerd does on ``$TTRPC_ADDRESS``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.envelopes: list[events.Envelope] = []
        self.changed = asyncio.Condition()

    async def listen(self, group: asyncio.TaskGroup) -> None:
        """Begin to take events."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        listener.listen()
        listener.setblocking(False)
        methods = {(events.SERVICE, events.FORWARD): (events.ForwardRequest, self._forward)}
        self._server = TtrpcServer(methods, group)
        await self._server.listen(listener)

    async def stop(self) -> None:
        """Stop taking events, and drop who is connected."""
        self._server.close()
        self.path.unlink()

    async def wait_topics(self, count: int) -> list[str]:
        """Wait until so many events have come; return the topics of all."""
        async with self.changed:
            await self.changed.wait_for(lambda: len(self.envelopes) >= count)
        return [envelope.topic for envelope in self.envelopes]

    async def wait_topic(self, topic: str) -> None:
        """Wait until an event of a topic has come."""
        async with self.changed:
            await self.changed.wait_for(lambda: any(envelope.topic == topic for envelope in self.envelopes))

    async def _forward(self, request: events.ForwardRequest) -> task.Empty:
        async with self.changed:
            if request.envelope is not None:
                self.envelopes.append(request.envelope)
            self.changed.notify_all()
        return task.Empty()


def _put_into_cgroup(pid: int, sandbox_id: str) -> None:
    Path(cgroup.create(sandbox_id), "cgroup.procs").write_text(str(pid))
