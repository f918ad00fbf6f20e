"""A shim under test: the real program and its real process, between fakes of all that it talks to.

The stand runs in the test's event loop and is the VM manager (whose VM is a process that sleeps, with a
:class:`common.testing.fake_guest.FakeGuest` behind its sockets), the device manager, and containerd: it executes
``start`` and ``delete`` in a bundle, calls the Task API, and takes events. All of it is in one directory.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import toml

from common import paths
from common.bus.server import BusServer
from common.bus.wire import Empty
from common.errors import HypervisorError, KataError
from common.linux import cgroup, identity, mounts
from common.processes import ProcessIdentity
from common.protocols import events, task
from common.services import device, vmm
from common.testing.fake_guest import FakeGuest
from common.ttrpc.client import TtrpcClient
from common.ttrpc.server import TtrpcServer

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from common.protobuf import Message

M = TypeVar("M", bound="Message")
T = TypeVar("T")

NAMESPACE = "test"
RUN_DIR_VARIABLE = paths.RUN_DIR_VARIABLE
CALL_TIMEOUT_S = 60


class FakeVmManager:
    """``vmm.qemu`` with VMs that are sleeping processes.

    Attributes:
        guest: the guest of the VM, once there is one.
        calls: verbs that were asked, in order.
        error: what to answer to ``create_vm`` instead of doing it.
        destroy_error: the same for ``destroy_vm``.
        has_vm: set when a VM was created.
        console: what the guest has printed.
        is_guest_silent: whether the agent of the next VM never answers.
    """

    def __init__(self, group: contextlib.AsyncExitStack) -> None:
        self.guest: FakeGuest | None = None
        self.process: asyncio.subprocess.Process | None = None
        self.calls: list[str] = []
        self.request_ids: list[str] = []
        self.error: KataError | None = None
        self.destroy_error: KataError | None = None
        self.has_vm = asyncio.Event()
        self.console = ""
        self.is_guest_silent = False
        self._stack = group
        self._vm: vmm.Vm | None = None

    def register(self, server: BusServer) -> None:
        """Answer the verbs that a shim asks."""
        server.register(vmm.CREATE_VM, self._create)
        server.register(vmm.DESCRIBE_VM, self._describe)
        server.register(vmm.DESTROY_VM, self._destroy)

    async def end_vm(self) -> None:
        """Kill the VMM and with it the guest."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        if self.guest is not None:
            self.guest.power_off()

    async def _create(self, request: vmm.CreateVm) -> vmm.Vm:
        self.calls.append("create_vm")
        if self.error:
            raise self.error
        directory = paths.vm_dir(request.sandbox_id)
        await asyncio.to_thread(Path(directory).mkdir)
        self.guest = await self._stack.enter_async_context(FakeGuest(Path(directory)))
        self.guest.is_silent = self.is_guest_silent
        self.process = await asyncio.create_subprocess_exec("sleep", "1000", start_new_session=True)
        _put_into_cgroup(self.process.pid, request.sandbox_id)
        self._vm = vmm.Vm(
            sandbox_id=request.sandbox_id,
            hypervisor="qemu",
            version="0",
            accelerator="tcg",
            process=ProcessIdentity(
                pid=self.process.pid,
                start_time=identity.start_time(self.process.pid),
                boot_id=identity.boot_id(),
            ),
            agent_socket=self.guest.agent_socket,
            stream_sockets=self.guest.stream_sockets,
            console_log=f"{directory}/console.log",
            hotplug_buses=("bus0",),
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

    async def _destroy(self, request: vmm.SandboxRef) -> Empty:
        self.calls.append("destroy_vm")
        if self.destroy_error:
            raise self.destroy_error
        await self.end_vm()
        shutil.rmtree(paths.vm_dir(request.sandbox_id), ignore_errors=True)
        cgroup.kill(request.sandbox_id)
        return Empty()


class FakeDeviceManager:
    """``device``: remembers what it was asked; ``has_confirmed`` is set by the first ``confirm``."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.has_confirmed = asyncio.Event()
        self.attached: list[device.Attach] = []

    def register(self, server: BusServer) -> None:
        """Answer the verbs that a shim asks."""
        server.register(device.ATTACH, self._attach)
        server.register(device.CONFIRM, self._confirm)
        server.register(device.ABORT, self._abort)

    async def _attach(self, request: device.Attach) -> device.Device:
        self.calls.append("attach")
        self.attached.append(request)
        return self._device(request)

    async def _confirm(self, _: device.DeviceRef) -> device.Device:
        self.calls.append("confirm")
        self.has_confirmed.set()
        return self._device(self.attached[-1])

    async def _abort(self, _: device.DeviceRef) -> Empty:
        self.calls.append("abort")
        return Empty()

    def _device(self, request: device.Attach) -> device.Device:
        return device.Device(
            device_id="d1",
            sandbox_id=request.sandbox_id,
            hypervisor=request.hypervisor,
            hypervisor_id="share-1",
            bus=request.buses[0],
            pci_path="02/00",
            state="plugged",
            spec=request.spec,
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

    async def _forward(self, request: events.ForwardRequest) -> task.Empty:
        async with self.changed:
            if request.envelope is not None:
                self.envelopes.append(request.envelope)
            self.changed.notify_all()
        return task.Empty()


class ShimStand:
    """One sandbox's surroundings; an async context manager that leaves nothing behind.

    Attributes:
        id: the container's and sandbox's id.
        root: the directory of everything.
        vms: the VM manager.
        devices: the device manager.
        containerd: takes events.
    """

    def __init__(self) -> None:
        self.id = f"c{secrets.token_hex(6)}"
        self.root = Path(tempfile.mkdtemp(prefix="kt-", dir="/tmp"))  # a short path, for sockets
        self.bundle = self.root / "bundle"
        self.rootfs = self.root / "rootfs"
        self.config = self.root / "configuration.toml"
        self._stack = contextlib.AsyncExitStack()
        self.vms = FakeVmManager(self._stack)
        self.devices = FakeDeviceManager()
        self.containerd = FakeContainerd(self.root / "containerd.sock.ttrpc")
        self._group = asyncio.TaskGroup()
        self._log: int | None = None
        self._clients: list[TtrpcClient] = []
        self._environment = os.environ.get(RUN_DIR_VARIABLE)

    async def __aenter__(self) -> Self:
        os.environ[RUN_DIR_VARIABLE] = str(self.root / "run")
        await self._stack.__aenter__()
        await self._stack.enter_async_context(self._group)
        await self.containerd.listen(self._group)
        manager, devices = BusServer(vmm.service_name("qemu")), BusServer(device.SERVICE)
        self.vms.register(manager)
        self.devices.register(devices)
        await self._stack.enter_async_context(manager)
        await self._stack.enter_async_context(devices)
        self._write_files()
        return self

    async def __aexit__(self, *exc: object) -> None:
        try:
            for client in self._clients:
                client.close()
            await self.delete()
            await self.vms.end_vm()
            await self.containerd.stop()
            await self._stack.__aexit__(None, None, None)
        finally:
            self._remove_files()

    def _remove_files(self) -> None:
        if self._log is not None:
            os.close(self._log)
        mounts.unmount_below(str(self.root))
        shutil.rmtree(self.root)
        if self._environment is None:
            del os.environ[RUN_DIR_VARIABLE]
        else:
            os.environ[RUN_DIR_VARIABLE] = self._environment

    @property
    def socket_path(self) -> Path:
        """The shim's socket, as ``start`` wrote it into the bundle."""
        return Path((self.bundle / "address").read_text().removeprefix("unix://"))

    @property
    def sandbox_dir(self) -> Path:
        """The sandbox's directory."""
        return Path(paths.sandbox_dir(self.id))

    @property
    def shim_pid(self) -> int:
        """The shim's process."""
        return int((self.bundle / "shim.pid").read_text())

    def spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run something beside the test."""
        return self._group.create_task(work)

    async def restart_containerd(self) -> None:
        """Stop taking events, drop the connections, and begin again."""
        await self.containerd.stop()
        await self.containerd.listen(self._group)

    def log(self) -> str:
        """Return what the shim has logged and was not read yet."""
        if self._log is None:
            return ""
        try:
            return os.read(self._log, 1 << 20).decode()
        except BlockingIOError:
            return ""

    def write_config(self, **agent: int) -> None:
        """Write ``configuration.toml``, with keys of ``[agent.kata]``."""
        files = ("path", "kernel", "initrd", "virtio_fs_daemon")
        qemu = dict.fromkeys(files, "/bin/true")
        self.config.write_text(toml.dumps({"hypervisor": {"qemu": qemu}, "agent": {"kata": agent}}))

    def fifo(self, name: str) -> str:
        """Make a FIFO and return its path."""
        path = self.root / name
        os.mkfifo(path)
        return str(path)

    async def run(self, action: str, *, options: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        """Execute the shim's program in the bundle, as containerd does."""
        if options is None:
            named = task.RuntimeOptions(config_path=str(self.config))
            options = task.Any(type_url=task.RuntimeOptions.TYPE_URL, value=named.encode()).encode()
        program = Path(sys.executable).parent / "containerd-shim-kata-v2"
        address = str(self.root / "containerd.sock")
        process = await asyncio.create_subprocess_exec(
            str(program), "-namespace", NAMESPACE, "-address", address, "-publish-binary", "/bin/false",
            "-id", self.id, "-debug", "-bundle", str(self.bundle), action,
            cwd=self.bundle,
            env={**os.environ, "TTRPC_ADDRESS": str(self.containerd.path)},
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        stdout, stderr = await process.communicate(options)
        return subprocess.CompletedProcess([action], process.returncode or 0, stdout, stderr)

    async def start(self) -> TtrpcClient:
        """Start the shim and connect to it."""
        done = await self.run("start")
        assert done.returncode == 0, done.stderr
        return await self.connect()

    async def connect(self) -> TtrpcClient:
        """Connect to the shim once more."""
        loop = asyncio.get_running_loop()
        _, client = await loop.create_unix_connection(lambda: TtrpcClient("the shim"), str(self.socket_path))
        self._clients.append(client)
        return client

    async def delete(self) -> subprocess.CompletedProcess[bytes]:
        """Execute the ``delete`` action."""
        return await self.run("delete", options=b"")

    async def call(self, client: TtrpcClient, method: str, request: Message, reply: type[M]) -> M:
        """Call the Task API."""
        return await client.call(task.SERVICE, method, request, reply, timeout_s=CALL_TIMEOUT_S)

    def create_request(self, *args: str, stdin: str = "", stdout: str = "", stderr: str = "") -> task.CreateTaskRequest:
        """Write the bundle's configuration for a command and return the request to create it."""
        config = json.loads((self.bundle / "config.json").read_text())
        config["process"]["args"] = list(args)
        (self.bundle / "config.json").write_text(json.dumps(config))
        mount = task.Mount(type="bind", source=str(self.rootfs), options=["rbind", "rw"])
        return task.CreateTaskRequest(
            id=self.id, bundle=str(self.bundle), rootfs=[mount], stdin=stdin, stdout=stdout, stderr=stderr
        )

    async def wait_shim_gone(self) -> None:
        """Wait until the shim's process has ended."""
        await _wait_pidfd(self.shim_pid)

    async def kill_shim(self) -> None:
        """Kill the shim with SIGKILL."""
        pid = self.shim_pid
        os.kill(pid, signal.SIGKILL)
        await _wait_pidfd(pid)

    def leftovers(self) -> list[str]:
        """Return what is left of the sandbox: processes, mounts, files, sockets, its cgroup."""
        found = mounts.mounted_below(str(self.root))
        places = (self.sandbox_dir, self.socket_path, Path(cgroup.path(self.id)))
        found += [str(place) for place in places if place.exists()]
        if self.vms.process is not None and self.vms.process.returncode is None:
            found.append(f"VMM {self.vms.process.pid}")
        return found

    def _write_files(self) -> None:
        self.bundle.mkdir()
        (self.rootfs / "etc").mkdir(parents=True)
        os.mkfifo(self.bundle / "log")
        self._log = os.open(self.bundle / "log", os.O_RDWR | os.O_NONBLOCK)
        self.write_config()
        config = {
            "ociVersion": "1.0.2",
            "process": {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "root": {"path": "rootfs"},
        }
        (self.bundle / "config.json").write_text(json.dumps(config))


def _put_into_cgroup(pid: int, sandbox_id: str) -> None:
    Path(cgroup.create(sandbox_id), "cgroup.procs").write_text(str(pid))


async def _wait_pidfd(pid: int) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    gone = asyncio.Event()
    asyncio.get_running_loop().add_reader(fd, gone.set)
    await gone.wait()
    asyncio.get_running_loop().remove_reader(fd)
    os.close(fd)
