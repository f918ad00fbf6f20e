"""The peers that we are measured against: a bare VM of the same kind, and crun in the same guest without us."""

from __future__ import annotations

import json
import os
import py_compile
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from common.channel import HELLO, NONCE_SIZE
from common.config import QemuConfig
from common.testing.oci_image import busybox_tree
from common.testing.stack import GUEST
from common.ttrpc import frames
from guest.image.cpio import Archive
from procs.vmm_manager.drivers.qemu.cmdline import AGENT_SOCKET, QMP_SOCKET, QemuCommand
from procs.vmm_manager.drivers.qemu.spawn import connect, listening

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

_INIT = b"#!/usr/bin/python3.11 -ISE\nimport sys\nsys.path[:] = %s\nfrom bench_crun import main\nmain()\n"
_GUEST_PATH = b'"/bench", "/usr/lib/kata-agent", "/usr/lib/python3.11", "/usr/lib/python3.11/lib-dynload"'
_TIMEOUT_S = 120


def config(**changes: object) -> QemuConfig:
    """Return the configuration that the stack uses, so that all VMs are alike."""
    plain = {"kernel": str(GUEST / "vmlinux"), "initrd": str(GUEST / "initrd.img"), "default_memory": 512, **changes}
    return QemuConfig(**plain)  # type: ignore[arg-type]  # names and types are ours, above


@contextmanager
def qemu(used: QemuConfig) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A VM started with the VM manager's own command line; yields its directory and its process."""
    directory = tempfile.mkdtemp(prefix="kt-", dir="/tmp")
    try:
        with listening(directory, QMP_SOCKET) as listener:
            command = QemuCommand(sandbox_id="bare", config=used, accelerator="tcg", qmp_fd=listener.fileno()).argv()
            process = subprocess.Popen(command, cwd=directory, pass_fds=[listener.fileno()], stdin=subprocess.DEVNULL)
        try:
            yield directory, process
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    finally:
        shutil.rmtree(directory)


def bare_boot() -> float:
    """Boot the guest and nothing else; return the seconds from QEMU's start until the agent answers Health.Check."""
    began = time.monotonic()
    with qemu(config()) as (directory, _), _when_listening(directory, AGENT_SOCKET) as agent:
        agent.settimeout(_TIMEOUT_S)
        agent.sendall(HELLO + os.urandom(NONCE_SIZE))
        agent.recv(4096)
        check = frames.Request(service="grpc.Health", method="Check").encode()
        agent.sendall(frames.encode(1, frames.REQUEST, check))
        agent.recv(4096)
        return time.monotonic() - began


@contextmanager
def _when_listening(directory: str, name: str) -> Iterator[socket.socket]:
    """Connect to one of QEMU's sockets; its monitor's greeting says that they are there."""
    with connect(directory, QMP_SOCKET) as monitor:
        monitor.settimeout(_TIMEOUT_S)
        monitor.recv(4096)
        with connect(directory, name) as connection:
            yield connection


def crun_in_guest() -> dict[str, list[float]]:
    """Boot the same image once; return what `crun run` and `crun exec` take in it, in seconds."""
    with tempfile.NamedTemporaryFile(prefix="kt-initrd-") as initrd:
        initrd.write((GUEST / "initrd.img").read_bytes() + _bench_archive())
        initrd.flush()
        used = config(initrd=initrd.name, kernel_params="rdinit=/bench/init")
        with qemu(used) as (directory, _), connect(directory, QMP_SOCKET) as monitor:
            return _read_measurements(monitor)


def _read_measurements(monitor: socket.socket) -> dict[str, list[float]]:
    """Read the console through QEMU's monitor until the guest is done (its end pauses QEMU, and is an event)."""
    monitor.settimeout(_TIMEOUT_S)
    lines = monitor.makefile("rw")
    found: dict[str, list[float]] = {"run": [], "exec": []}
    lines.readline()
    lines.write('{"execute": "qmp_capabilities"}\n')
    lines.flush()
    while "SHUTDOWN" not in lines.readline():
        pass
    lines.write('{"execute": "ringbuf-read", "arguments": {"device": "console", "size": 65536}}\n')
    lines.flush()
    answer: dict[str, str] = {}
    while "return" not in answer:
        answer = json.loads(lines.readline())
    for line in answer["return"].splitlines():
        words = line.split()
        if words[:1] == ["bench"] and words[1] in found:
            found[words[1]].append(float(words[2]))
        elif words[:2] == ["bench", "failed:"]:
            raise RuntimeError(line)
    if not found["exec"]:
        raise RuntimeError(f"the guest measured nothing; its console:\n{answer['return']}")
    return found


def _bench_archive() -> bytes:
    archive = Archive()
    archive.add_file("/bench/init", _INIT % _GUEST_PATH, 0o755)
    archive.add_file("/bench/bench_crun.pyc", _compiled(Path(__file__).parent / "guest_crun.py"))
    for name, arguments in {"true": ["true"], "sleep": ["sleep", "1000"]}.items():
        archive.add_file(f"/bench/{name}/config.json", _bundle(arguments))
    files, links = busybox_tree()
    for path, data in files.items():
        archive.add_file(f"/bench/rootfs/{path}", data, 0o755)
    for path, target in links.items():
        archive.add_link(f"/bench/rootfs/{path}", target)
    for path in ("proc", "dev", "sys"):
        archive.add_directory(f"/bench/rootfs/{path}")
    return archive.encode()


def _compiled(source: Path) -> bytes:
    """Compile for the guest, whose trimmed library cannot: it has the same Python as Debian's host."""
    with tempfile.NamedTemporaryFile(suffix=".pyc") as target:
        py_compile.compile(
            str(source), target.name, doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH
        )
        return Path(target.name).read_bytes()


def _bundle(arguments: list[str]) -> bytes:
    """Return an OCI specification like the one that containerd writes, as far as crun's work depends on it."""
    namespaces = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount")]
    mounts = [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
        {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["nosuid", "newinstance"]},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "ro"]},
    ]
    process = {"args": arguments, "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}}
    specification = {
        "ociVersion": "1.0.2",
        "process": process,
        "root": {"path": "/bench/rootfs"},
        "mounts": mounts,
        "linux": {"namespaces": namespaces},
    }
    return json.dumps(specification).encode()
