"""A shim under test: the real program and its real process, between fakes of all that it talks to.

The stand executes ``start`` and ``delete`` in a bundle and calls the Task API, as containerd does. Around the shim are
the fakes of :mod:`common.testing.shim_peers`. All of it is in one directory, which is the run directory too.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import toml

from common import paths
from common.bus.events import Publisher
from common.bus.server import BusServer
from common.config import HYPERVISORS
from common.linux import cgroup, mounts
from common.protocols import task
from common.services import device, vmm
from common.testing.isolation import in_event_loop, run_dir
from common.testing.shim_peers import FakeContainerd, FakeDeviceManager, FakeVmManager
from common.ttrpc.client import TtrpcClient

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

    from common.protobuf import Message

M = TypeVar("M", bound="Message")
T = TypeVar("T")

NAMESPACE = "test"
CALL_TIMEOUT_S = 60


def stand_test(test: Callable[[ShimStand], Awaitable[None]]) -> Callable[[], None]:
    """Run an asynchronous test in a stand of its own."""

    @functools.wraps(test)
    @in_event_loop
    async def run() -> None:
        with run_dir() as root:
            async with ShimStand(root) as stand:
                await test(stand)

    del run.__wrapped__  # pytest would take the test's parameter for a fixture
    return run


class ShimStand:
    """One sandbox's surroundings; an async context manager that leaves nothing behind.

    Attributes:
        id: the container's and sandbox's id.
        root: the directory of everything.
        vms: the VM manager.
        devices: the device manager.
        containerd: takes events.
    """

    PROGRAM = Path(sys.executable).parent / "containerd-shim-kata-v2"

    def __init__(self, root: Path) -> None:
        self.id = f"c{secrets.token_hex(6)}"
        self.root = root
        self.bundle = self.root / "bundle"
        self.rootfs = self.root / "rootfs"
        self.config = self.root / "configuration.toml"
        self._stack = contextlib.AsyncExitStack()
        self._publishing = contextlib.AsyncExitStack()
        self.vms = FakeVmManager(self._stack)
        self.devices = FakeDeviceManager()
        self.containerd = FakeContainerd(self.root / "containerd.sock.ttrpc")
        self._group = asyncio.TaskGroup()
        self._log: int | None = None
        self._clients: list[TtrpcClient] = []

    async def __aenter__(self) -> Self:
        await self._stack.__aenter__()
        await self._stack.enter_async_context(self._group)
        await self.containerd.listen(self._group)
        managers, devices = [BusServer(vmm.service_name(name)) for name in HYPERVISORS], BusServer(device.SERVICE)
        for manager in managers:
            self.vms.register(manager)
        self.devices.register(devices)
        for server in (*managers, devices):
            await self._stack.enter_async_context(server)
        await self._stack.enter_async_context(self._publishing)
        await self.restart_publisher()
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
            assert self.leftovers() == []
        finally:
            if self._log is not None:
                os.close(self._log)
            mounts.unmount_below(str(self.root))

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

    @contextlib.asynccontextmanager
    async def containerd_away(self) -> AsyncIterator[None]:
        """Stop taking events, drop the connections, and begin again afterwards."""
        await self.containerd.stop()
        yield
        await self.containerd.listen(self._group)

    def log(self) -> str:
        """Return what the shim has logged and was not read yet."""
        if self._log is None:
            return ""
        try:
            return os.read(self._log, 1 << 20).decode()
        except BlockingIOError:
            return ""

    async def restart_publisher(self) -> None:
        """Have the device manager publish anew, as one does that was restarted."""
        await self._publishing.aclose()
        self.devices.publisher = await self._publishing.enter_async_context(Publisher(device.SERVICE))

    async def logged(self, event: str) -> dict[str, Any]:
        """Wait until the shim logs an event; return the first such record of those that were not read yet."""
        assert self._log is not None
        loop, text = asyncio.get_running_loop(), ""
        while True:
            *lines, text = (text + self.log()).split("\n")
            for record in map(json.loads, lines):
                if record["event"] == event:
                    return dict(record)
            is_readable = loop.create_future()
            loop.add_reader(self._log, is_readable.set_result, None)
            try:
                await is_readable
            finally:
                loop.remove_reader(self._log)

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
        address = str(self.root / "containerd.sock")
        process = await asyncio.create_subprocess_exec(
            str(self.PROGRAM), "-namespace", NAMESPACE, "-address", address, "-publish-binary", "/bin/false",
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

    async def end_from_outside(self) -> None:
        """End the container as nobody has asked for: here its VM dies."""
        await self.vms.end_vm()

    async def hold(self, verb: str) -> Callable[[], object]:
        """Have the next Create or Start take until what is returned is called."""
        await self.vms.has_vm.wait()
        assert self.vms.guest is not None
        gate = self.vms.guest.gates[f"{verb}Container"] = asyncio.Event()
        return gate.set

    async def kill_shim(self) -> None:
        """Kill the shim with SIGKILL."""
        await kill(self.shim_pid)

    def leftovers(self) -> list[str]:
        """Return what is left of the sandbox: processes, mounts, files, sockets, its cgroup."""
        found = mounts.mounted_below(str(self.root))
        places = [self.sandbox_dir, Path(cgroup.path(self.id))]
        if (self.bundle / "address").exists():  # else it was refused before it listened
            places.append(self.socket_path)
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
        (self.bundle / "config.json").write_text(json.dumps(self.spec()))

    def spec(self) -> dict[str, Any]:
        """Return the configuration of the bundle; a test may change what it says of the process."""
        return {
            "ociVersion": "1.0.2",
            "process": {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "root": {"path": "rootfs"},
        }


async def kill(pid: int) -> None:
    """Kill a process and wait until it is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    await _wait_pidfd(pid)


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
