"""vhost-device-vsock: the host's side of one VM's vsock, as a program, for hosts whose kernel has none.

QEMU speaks vhost-user to it and shows it the guest's memory; clients of the host connect to its other socket, as to
that of Cloud Hypervisor and Firecracker (:class:`common.services.channel.HybridVsock`). Both sockets are in the VM's
directory, which only root can enter.

*Its beginning.* It takes no listening socket and does not tell when it listens, so we ask until it does; QEMU inherits
our connection and never asks.

*The guest's.* A client that comes before the guest's driver is turned away; one that comes while QEMU sets up the
rings, after it has shown the memory, ends the thread that serves the clients, and nobody is ever served again
(``VhostUserVsockBackend::handle_event``, whose error ``VringEpollHandler::run`` returns). So the clients' socket gets
the name that they know when QEMU says that the device runs, which it says only to who asks.

*Its end.* It never ends by itself: when QEMU is gone it waits for another, and goes with the sandbox's cgroup. If
it ends before, the guest cannot be reached any more, ever: QEMU does not connect this device again. So that
is told, and the VM is ended, as for a virtiofsd (``drivers.daemons``).

Source: README.md and src/ of vhost-device-vsock 0.3.0 (crates.io); hw/virtio/vhost-user-vsock.c of QEMU 7.2.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from common import log, paths
from common.errors import HypervisorError, KataError, UnsupportedError
from procs.vmm_manager.drivers import spawn
from procs.vmm_manager.drivers.daemons import ends_before
from procs.vmm_manager.drivers.spawn import Process

if TYPE_CHECKING:
    import socket

    from common.workers import Workers
    from procs.vmm_manager.drivers.qemu.qmp import Qmp
    from procs.vmm_manager.record import VmRecord

SOCKET = "vsock"
"""Where clients of the host connect, in the VM's directory."""
DEVICE_ID = "vsock"
"""What QEMU calls its device."""

_EARLY_SOCKET = "vsock.early"
"""The same socket by the name that the daemon gives it."""
_VHOST_SOCKET = "vhost-vsock"
_LOG = "vsock.log"
_GUEST_CID = 3
"""The guest's address, which it shares with nobody: a daemon has one guest. Cloud Hypervisor and Firecracker use it."""
_START_TIMEOUT_S = 10.0
_PAUSE_S = 0.002
_LOOK_S = 0.03
"""How often QEMU is asked while a guest boots: a small part of the boot, and of QEMU's time."""
_LOOKS = 2
"""How often QEMU has to say so: it has sent the daemon all by then, which has had the time between to read it."""


async def start(path: str, *, directory: str, cgroup: str) -> tuple[Process, socket.socket]:
    """Start a daemon; return it and a connection for QEMU.

    Raises:
        HypervisorError: it ends, or does not listen in time; its own words are in the message.
    """
    argv = [path, f"--guest-cid={_GUEST_CID}", f"--socket={_VHOST_SOCKET}", f"--uds-path={_EARLY_SOCKET}"]
    async with AsyncExitStack() as undo:
        daemon = Process.start(argv, cgroup=cgroup, directory=directory, log=_LOG, fds=[])
        undo.push_async_callback(daemon.end)
        connection = await _connect(daemon, directory, path)
        undo.pop_all()
    return daemon, connection


def watch(daemon: Process, vmm: Process, qmp: Qmp, sandbox_id: str, workers: Workers) -> None:
    """Let clients in when the guest is ready for them, and end a VM when its daemon ends."""
    workers.spawn(_watch(daemon, vmm, sandbox_id))
    workers.spawn(_let_in(vmm, qmp, Path(paths.vm_dir(sandbox_id))))


def adopt(record: VmRecord, vmm: Process, qmp: Qmp, workers: Workers) -> None:
    """Go on with the daemon that an earlier manager started, if the VM has one."""
    if record.vsock_daemon is None:
        return
    daemon = Process.find(record.vsock_daemon, directory=paths.vm_dir(record.sandbox_id), log=_LOG)
    if daemon is not None:
        watch(daemon, vmm, qmp, record.sandbox_id, workers)
    elif not vmm.is_ending:
        _end(vmm, record.sandbox_id, "nothing that is still known")


async def _connect(daemon: Process, directory: str, path: str) -> socket.socket:
    """Connect as soon as the daemon listens: when this socket does, the other does already."""
    what = "ended before it listened"
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            while daemon.is_running:
                try:
                    return spawn.connect(directory, _VHOST_SOCKET)
                except (FileNotFoundError, ConnectionRefusedError):  # not there yet, or not listening yet
                    await asyncio.sleep(_PAUSE_S)
    except TimeoutError:
        what = f"does not listen after {_START_TIMEOUT_S:g} s"
    raise HypervisorError(
        f"vsock daemon {path} {what}: {daemon.output.tail().strip() or 'it said nothing'}",
        hint="check vhost_user_vsock_daemon of [hypervisor.qemu]; empty, VMs do without",
    )


async def _let_in(vmm: Process, qmp: Qmp, directory: Path) -> None:
    """Give the clients' socket its name when the device runs: the daemon has then been told all that it waits for."""
    looks = 0
    while looks < _LOOKS and not (directory / SOCKET).exists():
        await asyncio.sleep(_LOOK_S)
        if not vmm.is_running:
            return
        looks = looks + 1 if await _is_started(qmp) else 0
    with suppress(FileExistsError, FileNotFoundError):  # an earlier manager did it; or the sandbox is gone
        (directory / SOCKET).hardlink_to(directory / _EARLY_SOCKET)


async def _is_started(qmp: Qmp) -> bool:
    try:
        status = await qmp.execute("x-query-virtio-status", path=f"/machine/peripheral/{DEVICE_ID}/virtio-backend")
    except UnsupportedError:  # before QEMU 7.2: then clients have to be lucky
        return True
    except KataError:  # the monitor is lost, which is somebody else's care
        return False
    return bool(status["vhost-started"])


async def _watch(daemon: Process, vmm: Process, sandbox_id: str) -> None:
    if await ends_before(daemon, vmm):
        _end(vmm, sandbox_id, daemon.output.tail())


def _end(vmm: Process, sandbox_id: str, said: str) -> None:
    log.get().error("vsock daemon died, ending its VM", sandbox=sandbox_id, said=said)
    vmm.kill()
