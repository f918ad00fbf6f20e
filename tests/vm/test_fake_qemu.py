"""The fake QEMU is faithful: asked the same as a real QEMU without a guest, it says the same, word for word."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from common.testing.storage_daemon import serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REAL = ["/usr/bin/qemu-system-x86_64", "-S", "-accel", "tcg"]
FAKE = [sys.executable, "-m", "common.testing.fake_qemu"]
MACHINE = [
    *("-machine", "q35", "-nodefaults", "-display", "none", "-m", "64M,slots=1,maxmem=128M"),
    *("-device", "pci-bridge,id=bridge0,bus=pcie.0,addr=0x4,chassis_nr=1,shpc=off"),
    *("-device", "pcie-root-port,id=port0,bus=pcie.0,addr=0x5,chassis=1"),
    *("-device", "virtio-scsi-pci,id=scsi0,bus=pcie.0,addr=0x6"),
]


AWAIT = "DEVICE_DELETED"


class Client:
    """Asks one QEMU, one command at a time, and skips its events."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        self._ended: set[str] = set()
        self.greeting = json.loads(self._lines.readline())
        self.ask("qmp_capabilities")

    def _read(self) -> dict[str, Any]:
        message: dict[str, Any] = json.loads(self._lines.readline())
        if message.get("event") == AWAIT:
            self._ended.add(message["data"].get("device"))
        return message

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def ask(self, command: str, **arguments: object) -> Any:  # noqa: ANN401 - JSON
        """Return the result, or class and words of the refusal; or await the event of a device's end."""
        if command == AWAIT:
            while arguments["device"] not in self._ended:
                self._read()
            return {}
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while "event" in (answer := self._read()):
            continue
        return answer.get("return", answer.get("error"))


@contextmanager
def running(command: list[str], directory: Path) -> Iterator[Client]:
    """Run a QEMU, real or fake, and talk to it."""
    directory.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "qmp"))
        listener.listen()
        chardev = f"socket,id=qmp,fd={listener.fileno()},server=on,wait=off"
        argv = [*command, *MACHINE, "-chardev", chardev, "-mon", "chardev=qmp,mode=control"]
        with subprocess.Popen(argv, cwd=directory, pass_fds=[listener.fileno()]) as process:
            client = Client(directory / "qmp")
            try:
                yield client
            finally:
                client.close()
                process.kill()


def disk(name: str, file: Path, **more: object) -> dict[str, object]:
    return {"driver": "raw", "node-name": name, "file": {"driver": "file", "filename": str(file)}, **more}


def blk(name: str, drive: str, bus: str, addr: str = "0x0") -> dict[str, object]:
    return {"driver": "virtio-blk-pci", "id": name, "bus": bus, "addr": addr, "drive": drive}


def scsi(name: str, drive: str, lun: int) -> dict[str, object]:
    return {"driver": "scsi-hd", "id": name, "bus": "scsi0.0", "scsi-id": 0, "lun": lun, "drive": drive}


def nic(name: str, netdev: str, addr: str) -> dict[str, object]:
    return {"driver": "virtio-net-pci", "id": name, "bus": "bridge0", "addr": addr, "netdev": netdev}


def pmem(name: str, memory: str, addr: str) -> dict[str, object]:
    return {"driver": "virtio-pmem-pci", "id": name, "bus": "bridge0", "addr": addr, "memdev": memory}


def vhost_user_disk(name: str, chardev: str, addr: str) -> dict[str, object]:
    return {"driver": "vhost-user-blk-pci", "id": name, "bus": "bridge0", "addr": addr, "chardev": chardev}


def chardev(name: str, path: Path) -> dict[str, object]:
    address = {"type": "unix", "data": {"path": str(path)}}
    return {"id": name, "backend": {"type": "socket", "data": {"addr": address, "server": False}}}


def script(directory: Path) -> list[tuple[str, dict[str, object]]]:
    """Return what both are asked, in this order."""
    files = [directory / f"disk{number}" for number in range(7)]
    for file in files:
        file.write_bytes(bytes(1 << 20))
    return [
        ("query-status", {}),
        ("stop", {}),
        ("stop", {}),
        ("query-status", {}),
        ("blockdev-add", disk("n0", files[0])),
        ("blockdev-add", disk("n0", files[1])),
        ("blockdev-add", disk("n1", files[0])),
        ("blockdev-add", disk("0n", files[1])),
        ("blockdev-add", disk("n1", files[1], **{"read-only": True})),
        ("blockdev-add", disk("n01", files[0])),
        ("blockdev-add", disk("n2", files[2])),
        ("blockdev-add", disk("n3", files[3])),
        ("blockdev-add", disk("n4", files[4])),
        ("blockdev-add", disk("n5", files[5])),
        ("blockdev-add", disk("n6", files[6])),
        ("device_add", blk("d0", "n0", "pcie.0")),
        ("device_add", blk("d0", "n0", "nowhere")),
        ("device_add", blk("d0", "n9", "bridge0", "0x1")),
        ("device_add", blk("0d", "n0", "bridge0", "0x1")),
        ("device_add", blk("d0", "n0", "bridge0", "0x1")),
        ("device_add", blk("d0", "n2", "bridge0", "0x2")),
        ("device_add", blk("d01", "n01", "bridge0", "0x2")),
        ("device_add", blk("d02", "n0", "bridge0", "0x2")),
        ("device_add", {"driver": "virtio-blk-pci", "id": "d5", "bus": "port0", "drive": "n5"}),
        ("device_add", {"driver": "virtio-blk-pci", "id": "d6", "bus": "port0", "drive": "n6"}),
        ("device_add", blk("d2", "n2", "bridge0", "0x1")),
        ("device_add", blk("d2", "n2", "port0")),
        ("device_add", blk("d3", "n3", "port0")),
        ("device_add", scsi("d4", "n4", 1)),
        ("blockdev-del", {"node-name": "n0"}),
        ("blockdev-del", {"node-name": "n9"}),
        ("device_del", {"id": "d9"}),
        ("device_del", {"id": "d0"}),
        ("device_del", {"id": "d0"}),
        ("device_add", blk("d0", "n1", "bridge0", "0x3")),
        ("blockdev-del", {"node-name": "n0"}),
        ("device_del", {"id": "d4"}),
        (AWAIT, {"device": "d4"}),
        ("blockdev-del", {"node-name": "n4"}),
        ("object-add", {"qom-type": "memory-backend-memfd", "id": "m0", "size": 1 << 20}),
        ("object-add", {"qom-type": "memory-backend-memfd", "id": "m0", "size": 1 << 20}),
        ("qom-list", {"path": "/objects"}),
        ("qom-list", {"path": "/nowhere"}),
        ("object-del", {"id": "m9"}),
        ("object-del", {"id": "m0"}),
        ("netdev_add", {"type": "user", "id": "net0"}),
        ("netdev_add", {"type": "user", "id": "net0"}),
        ("device_add", nic("d7", "net9", "0x7")),
        ("device_add", nic("d7", "net0", "0x7")),
        ("device_add", nic("d8", "net0", "0x8")),
        ("netdev_del", {"id": "net9"}),
        ("netdev_del", {"id": "net0"}),
        ("netdev_del", {"id": "net0"}),
        ("device_add", pmem("d10", "m1", "0xa")),
        ("object-add", {"qom-type": "memory-backend-memfd", "id": "m1", "size": 2 << 20}),
        ("device_add", pmem("d10", "m1", "0xa")),
        ("device_add", pmem("d11", "m1", "0xb")),
        ("object-del", {"id": "m1"}),
        ("device_del", {"id": "d10"}),
        ("chardev-add", chardev("c0", directory / "nowhere")),
        ("chardev-add", chardev("c0", directory / "socket")),
        ("chardev-add", chardev("c0", directory / "socket")),
        ("device_add", vhost_user_disk("d12", "c9", "0xc")),
        ("device_add", vhost_user_disk("d12", "c0", "0xc")),
        ("device_add", vhost_user_disk("d13", "c0", "0xd")),
        ("chardev-remove", {"id": "c0"}),
        ("chardev-remove", {"id": "c9"}),
        ("device_add", {"driver": "vfio-pci", "id": "v0", "bus": "bridge0", "addr": "0xe", "host": "0000:ff:1f.7"}),
        ("nonsense", {}),
    ]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Any, Any]]:
    """Each command with both answers."""
    directory = tmp_path_factory.mktemp("qemu")
    commands = script(directory)
    (directory / "served").write_bytes(bytes(1 << 20))
    found = []
    for command, name in ((REAL, "real"), (FAKE, "fake")):
        with serving(directory / "served"), running(command, directory / name) as client:
            if name == "fake":
                client.ask("x-guest", **{"lets-go": False})
            found.append([client.ask(verb, **arguments) for verb, arguments in commands])
    asked = [f"{verb} {json.dumps(arguments)}" for verb, arguments in commands]
    return list(zip(asked, *found, strict=True))


def test_it_answers_and_refuses_as_qemu_does(answers: list[tuple[str, Any, Any]]) -> None:
    differing = [(asked, real, fake) for asked, real, fake in answers if _words(real) != _words(fake)]
    assert differing == []


def _words(answer: Any) -> Any:  # noqa: ANN401 - JSON
    """Return a refusal as it is, and of a result whether there is one."""
    return (answer["class"], answer["desc"]) if isinstance(answer, dict) and "class" in answer else "done"
