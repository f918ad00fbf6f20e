"""The channel over vsock: every use is a connection of its own, to a port of the guest (:mod:`common.channel`).

*Waiting for the guest.* A connection that is asked for before the guest has a driver for the device waits in the VMM or
in the host's kernel. Our agent listens before it loads that driver, so this wait is all there is. An agent in a kernel
that has the driver built in may listen later: then the guest refuses, and nothing tells when it will not, so we ask
again after a moment.

A socket that is there only when the guest has its driver (``is_late``) is waited for first.

*Hybrid vsock.* The answer ``OK`` comes from the VMM when the guest has accepted; a closed connection is a refusal.

*Kernel vsock.* connect(2) fails with ENODEV when no VM has the address (net/vmw_vsock/af_vsock.c,
drivers/vhost/vsock.c), ECONNRESET when the guest refuses, ETIMEDOUT after 2 s without an answer.
"""

from __future__ import annotations

import asyncio
import errno
import random
import socket
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from common.channel import AGENT_VSOCK_PORT, RESERVED_PORTS, STREAM_NUMBER, STREAM_VSOCK_PORT, stream_number
from common.errors import ExhaustedError, GuestError, UnavailableError
from common.linux import inotify
from common.services.channel import HybridVsock, KernelVsock
from procs.shim import unix
from procs.shim.ports import PortUse

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from procs.shim.ports import ProcessName, TellTaken

    Dial = Callable[[int], Awaitable[socket.socket]]

STREAM_TIMEOUT_S = 30
"""How long the agent may take to know a stream connection, on a host that is loaded beyond reason."""

_REFUSED_PAUSE_S = 0.01
_MAX_ANSWER = 32
"""Bytes of the VMM's answer to CONNECT: ``OK``, a number of 32 bits, a line feed."""


class VsockChannel:
    """See :class:`procs.shim.channel.Channel`."""

    def __init__(self, where: HybridVsock | KernelVsock) -> None:
        self._where = where
        self._dial = _dialler(where)
        self.ports = StreamConnections(self._dial)

    async def connect_agent(self) -> socket.socket:
        """Connect to the agent, as often as the guest refuses.

        Raises:
            UnavailableError: the VM is gone.
        """
        if isinstance(self._where, HybridVsock) and self._where.is_late:
            await _appears(Path(self._where.socket))
        while True:
            try:
                return await self._dial(AGENT_VSOCK_PORT)
            except (ConnectionError, TimeoutError):
                await asyncio.sleep(_REFUSED_PAUSE_S)


class StreamConnections:
    """Streams as connections; see :class:`procs.shim.ports.Ports`. There are as many as the VMM and the guest allow."""

    by_call = False
    tell_taken: TellTaken | None = None
    """Unused: a connection has an end to what it takes."""

    def __init__(self, dial: Dial) -> None:
        self._dial = dial
        self._generation = 0

    async def take(self, count: int, _process: ProcessName, group: asyncio.TaskGroup) -> list[PortUse]:
        """Make so many connections that the agent knows by their numbers.

        Raises:
            UnavailableError: the VM is gone.
            GuestError: the agent does not take them.
        """
        async with AsyncExitStack() as undo:
            uses = []
            for _ in range(count):
                uses.append(use := await self._connect(group))
                undo.push_async_callback(use.close)
            undo.pop_all()
        return uses

    async def give_back(self, use: PortUse) -> None:
        """Close the connection."""
        await use.close()

    async def _connect(self, group: asyncio.TaskGroup) -> PortUse:
        self._generation += 1
        number = stream_number(self._generation, 0)
        try:
            async with asyncio.timeout(STREAM_TIMEOUT_S):
                sock = await self._dial(STREAM_VSOCK_PORT)
                try:
                    await _introduce(sock, STREAM_NUMBER.pack(number))
                except BaseException:
                    sock.close()
                    raise
        except (ConnectionError, TimeoutError) as err:
            raise GuestError(f"the guest's agent took no stream connection on vsock port {STREAM_VSOCK_PORT}") from err
        return PortUse(number, sock, group)


async def _appears(socket_path: Path) -> None:
    """Wait until there is a socket.

    Raises:
        UnavailableError: the VM is gone, or the host does not tell.
    """
    try:
        with inotify.watching(socket_path.parent) as directory:
            await directory.wait_for(socket_path.name)
    except OSError as err:
        raise UnavailableError(f"cannot wait for {socket_path}: {err.strerror}") from err


async def _introduce(sock: socket.socket, number: bytes) -> None:
    """Say which stream a connection is, and wait until the agent knows."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, number)
    answer = b""
    while len(answer) < len(number):
        data = await loop.sock_recv(sock, len(number) - len(answer))
        if not data:
            raise ConnectionResetError("closed by the guest")
        answer += data
    if answer != number:
        raise GuestError(f"the guest answers to stream {number.hex()} with {answer.hex()}")


def _dialler(where: HybridVsock | KernelVsock) -> Dial:
    """Return what connects to a port of the guest.

    It raises:
        ConnectionError, TimeoutError: the guest refuses, or does not answer.
        UnavailableError: the VM is gone.
    """

    async def dial(port: int) -> socket.socket:
        if isinstance(where, HybridVsock):
            sock = unix.connect(where.socket)
            connecting = _ask_vmm(sock, port)
        else:
            sock = _kernel_socket()
            connecting = _ask_kernel(sock, where.cid, port)
        try:
            await connecting
        except BaseException:
            sock.close()
            raise
        return sock

    return dial


async def _ask_vmm(sock: socket.socket, port: int) -> None:
    """Ask for a port and read the answer, and no byte more."""
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, f"CONNECT {port}\n".encode())
    answer = b""
    while not answer.endswith(b"\n") and len(answer) < _MAX_ANSWER:
        byte = await loop.sock_recv(sock, 1)
        if not byte:
            raise ConnectionRefusedError(errno.ECONNREFUSED, f"the guest refuses vsock port {port}")
        answer += byte
    if not answer.startswith(b"OK "):
        raise GuestError(f"the VMM answers to CONNECT {port} with {answer!r}")


def _kernel_socket() -> socket.socket:
    """Return a socket for vsock, bound to a reserved port, which shows the guest that we are root.

    Raises:
        UnavailableError: the host's kernel has none.
        ExhaustedError: all reserved ports are in use.
    """
    try:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    except OSError as err:
        raise UnavailableError(f"no vsock socket: {err.strerror}", hint="load the kernel module vhost_vsock") from err
    sock.setblocking(False)
    for port in random.sample(RESERVED_PORTS, len(RESERVED_PORTS)):
        try:
            sock.bind((socket.VMADDR_CID_ANY, port))
        except OSError as err:
            if err.errno != errno.EADDRINUSE:
                sock.close()
                raise UnavailableError(f"cannot bind vsock port {port}: {err.strerror}") from err
        else:
            return sock
    sock.close()
    raise ExhaustedError(f"all {len(RESERVED_PORTS)} reserved vsock ports of the host are in use")


async def _ask_kernel(sock: socket.socket, cid: int, port: int) -> None:
    try:
        await asyncio.get_running_loop().sock_connect(sock, (cid, port))
    except OSError as err:
        if err.errno == errno.ENODEV:
            raise UnavailableError(f"no VM has the vsock address {cid}") from err
        raise
