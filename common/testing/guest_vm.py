"""A bare VM with our agent in it: QEMU and nothing of ours on the host, for tests and measurements of the guest.

::

    with GuestVm(vmlinux, initrd) as vm, vm.connect() as agent:
        agent.call("grpc.Health", "Check", CheckRequest(), HealthCheckResponse)
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Self

from common import guest_cmdline
from common.channel import (
    AGENT_PORT,
    AGENT_VSOCK_PORT,
    STREAM_NUMBER,
    STREAM_PORT,
    STREAM_VSOCK_PORT,
    stream_number,
)
from common.protocols.agent import SHARE_TAG
from common.testing.agent_client import AgentClient, Stream
from common.testing.vsock_device import VsockDevice

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BOOT_TIMEOUT_S = 120
"""Until an answer: a limit for a loaded machine, not a measure of anything."""
_HELPER_TIMEOUT_S = 30
_MEMORY = "384M"
_VIRTIOFSD = "/usr/lib/qemu/virtiofsd"


class GuestVm:
    """A running VM; leaving the context ends it and all that belongs to it.

    Attributes:
        share: a host directory that :meth:`plug_share` shows to the guest.
    """

    def __init__(
        self,
        vmlinux: Path,
        initrd: Path,
        *,
        streams: int = 8,
        parameters: str = "",
        has_vsock: bool = False,
        devices: Sequence[str] = (),
    ) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="kt-", dir="/tmp"))  # socket paths must be short
        self.share = self._directory / "share"
        self.share.mkdir()
        self._generation = 0
        self._free_ports = list(range(streams))
        self.vsock = VsockDevice(self.path("vhost-vsock"), self.path("vsock")) if has_vsock else None
        self._command = [*self._qemu(vmlinux, initrd, parameters), *devices]
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        if self.vsock is not None:
            self.vsock.__enter__()
        with self.path("qemu.log").open("wb") as log:
            self._processes.append(subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        return self

    def __exit__(self, *_: object) -> None:
        qemu, *helpers = self._processes
        qemu.kill()
        qemu.wait()
        for helper in helpers:  # virtiofsd ends with its connection; killed, it would orphan a child in a namespace
            helper.wait(_HELPER_TIMEOUT_S)
        if self.vsock is not None:
            self.vsock.__exit__()
        shutil.rmtree(self._directory)

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return self._processes[0].pid

    def path(self, name: str) -> Path:
        """Return the path of a file of this VM."""
        return self._directory / name

    def console(self) -> str:
        """Return what the guest has printed."""
        return self.path("console").read_text(errors="replace")

    def wait(self) -> int:
        """Wait until QEMU exits; return its exit code."""
        return self._processes[0].wait(BOOT_TIMEOUT_S)

    def wait_told(self, event: str) -> None:
        """Wait until QEMU tells an event that is about the whole VM; it tells who has begun to wait before."""
        with self._open("qmp") as qmp:
            _execute(qmp, "qmp_capabilities", until=(event, None))

    def connect(self, *, hello: bool = True) -> AgentClient:
        """Connect to the agent and, unless told otherwise or by vsock, say hello."""
        with ExitStack() as undo:
            client = undo.enter_context(AgentClient(self._dial(AGENT_VSOCK_PORT) or self._open("agent")))
            if hello and self.vsock is None:
                client.say_hello()
            undo.pop_all()
        return client

    def stream(self) -> Stream:
        """Begin a use of the lowest port that is free, or a stream connection by vsock.

        Raises:
            IndexError: none is free.
        """
        port = self._free_ports.pop(0)
        self._generation += 1
        number = stream_number(self._generation, port)
        connection = self._dial(STREAM_VSOCK_PORT)
        if connection is not None:
            connection.sendall(STREAM_NUMBER.pack(number))
            assert connection.recv(STREAM_NUMBER.size, socket.MSG_WAITALL) == STREAM_NUMBER.pack(number)
        return Stream(connection or self._open(f"stream{port}"), number, self._free_ports)

    def plug_share(self) -> None:
        """Hot-plug the share directory as a virtio-fs device."""
        listener = socket.socket(socket.AF_UNIX)
        with listener:
            listener.bind(str(self.path("virtiofs")))
            listener.listen(1)
            options = f"source={self.share},cache=auto,sandbox=chroot"  # which also works where tests run in a chroot
            command = [_VIRTIOFSD, f"--fd={listener.fileno()}", "-o", options]
            with self.path("virtiofsd.log").open("wb") as log:
                self._processes.append(
                    subprocess.Popen(
                        command, pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL, stdout=log, stderr=log
                    )
                )
        with self._open("qmp") as qmp:
            backend = {"type": "socket", "data": {"addr": _unix_address(self.path("virtiofs")), "server": False}}
            device = {"driver": "vhost-user-fs-pci", "id": "share", "chardev": "share", "tag": SHARE_TAG, "bus": "hp0"}
            _execute(qmp, "qmp_capabilities")
            _execute(qmp, "chardev-add", {"id": "share", "backend": backend})
            _execute(qmp, "device_add", device)

    def plug_disk(self, image: Path, serial: str, *, slot: int = 1, lun: int | None = None) -> None:
        """Hot-plug a disk: behind the bridge, or with a ``lun``, to the SCSI controller. It is named by its serial."""
        with self._open("qmp") as qmp:
            _execute(qmp, "qmp_capabilities")
            file = {"driver": "host_device" if image.is_block_device() else "file", "filename": str(image)}
            _execute(qmp, "blockdev-add", {"driver": "raw", "node-name": f"n{serial}", "file": file})
            if lun is None:
                where = {"driver": "virtio-blk-pci", "bus": "bridge0", "addr": f"{slot:#x}", "disable-legacy": "on"}
            else:
                where = {"driver": "scsi-hd", "bus": "scsi0.0", "scsi-id": "0", "lun": f"{lun}"}
            device = {**where, "id": f"d{serial}", "drive": f"n{serial}", "serial": serial}
            _execute(qmp, "device_add", device)

    def resize_disk(self, serial: str, size: int) -> None:
        """Give a disk another size, in bytes, and tell the guest."""
        with self._open("qmp") as qmp:
            _execute(qmp, "qmp_capabilities")
            _execute(qmp, "block_resize", {"node-name": f"n{serial}", "size": size})

    def unplug_disk(self, serial: str) -> None:
        """Remove a disk and wait until the guest has let go."""
        with self._open("qmp") as qmp:
            _execute(qmp, "qmp_capabilities")
            _execute(qmp, "device_del", {"id": f"d{serial}"}, until=("DEVICE_DELETED", f"d{serial}"))
            _execute(qmp, "blockdev-del", {"node-name": f"n{serial}"})

    def _dial(self, port: int) -> socket.socket | None:
        """Connect to a vsock port of the guest; return None if it has no vsock."""
        if self.vsock is None:
            return None
        connection = self._open(self.vsock.path.name)
        connection.sendall(f"CONNECT {port}\n".encode())
        answer = b""
        while not answer.endswith(b"\n"):
            byte = connection.recv(1)
            if not byte:
                connection.close()
                raise ConnectionRefusedError(f"the guest refuses vsock port {port}")
            answer += byte
        return connection

    def _open(self, name: str) -> socket.socket:
        """Connect to one of QEMU's sockets, which are there before QEMU runs the guest."""
        with ExitStack() as undo:
            connection = undo.enter_context(socket.socket(socket.AF_UNIX))
            connection.settimeout(BOOT_TIMEOUT_S)
            while connection.connect_ex(str(self.path(name))):  # not there yet, or bound and not yet listening
                if self._processes[0].poll() is not None:
                    raise RuntimeError(f"QEMU has ended: {self.path('qemu.log').read_text()}")
                os.sched_yield()
            undo.pop_all()
        return connection

    def _channel(self) -> list[str]:
        if self.vsock is not None:
            chardev = f"socket,id=vsock,path={self.vsock.vhost_path}"
            return ["-chardev", chardev, "-device", "vhost-user-vsock-pci,chardev=vsock"]
        ports = {"agent": AGENT_PORT, **{f"stream{n}": f"{STREAM_PORT}{n}" for n in self._free_ports}}
        return ["-device", "virtio-serial-pci,max_ports=31"] + [
            argument
            for name, port in ports.items()
            for argument in (
                *("-chardev", f"socket,id={name},path={self.path(name)},server=on,wait=off"),
                *("-device", f"virtserialport,chardev={name},name={port}"),
            )
        ]

    def _qemu(self, vmlinux: Path, initrd: Path, parameters: str) -> list[str]:
        return [
            "qemu-system-x86_64", "-M", "q35,memory-backend=mem", "-accel", "tcg",
            "-cpu", guest_cmdline.QEMU_CPU["tcg"], "-smp", "1", "-m", _MEMORY,
            "-object", f"memory-backend-memfd,id=mem,size={_MEMORY},share=on",
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-kernel", str(vmlinux), "-initrd", str(initrd), "-append", guest_cmdline.parameters(parameters),
            "-serial", f"file:{self.path('console')}",
            "-qmp", f"unix:{self.path('qmp')},server=on,wait=off",
            "-device", "pcie-root-port,id=hp0,bus=pcie.0,addr=4,chassis=1,slot=1",
            "-device", "pci-bridge,id=bridge0,bus=pcie.0,addr=5,chassis_nr=2,shpc=off,"
                       "io-reserve=4k,mem-reserve=1m,pref64-reserve=1m",
            "-device", "virtio-scsi-pci,id=scsi0,bus=pcie.0,addr=6",
            *self._channel(),
        ]  # fmt: skip


def _unix_address(path: Path) -> dict[str, object]:
    return {"type": "unix", "data": {"path": str(path)}}


def _execute(
    qmp: socket.socket,
    command: str,
    arguments: Mapping[str, object] | None = None,
    until: tuple[str, str | None] | None = None,
) -> None:
    """Run a command; wait for its answer and, if one is named, for an event, about a device or about none."""
    qmp.sendall(json.dumps({"execute": command, "arguments": arguments or {}}).encode())
    is_answered = is_heard = False
    with qmp.makefile() as lines:
        for line in lines:
            message = json.loads(line)
            if "error" in message:
                raise RuntimeError(f"{command}: {message['error']['desc']}")
            is_answered = is_answered or "return" in message
            is_heard = is_heard or until == (message.get("event"), message.get("data", {}).get("device"))
            if is_answered and (is_heard or until is None):
                return
