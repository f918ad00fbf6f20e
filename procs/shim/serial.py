"""The channel over virtio-serial (:mod:`common.channel`): ports, which know no connections.

*Agent.* The hello is how both ends agree on where a conversation begins. It may be sent long before the guest is up:
QEMU keeps it until the agent opens its port, so waiting for the answer *is* waiting for the guest, and nothing is tried
twice.

*Streams.* A VM has a fixed number of ports. A process uses one for standard input and output, which go opposite ways,
and another for standard error; with a terminal, which has no standard error, only the first. A port may be used again
once the guest's end frame has come and no frame of ours is half written. Otherwise bytes of this use would reach the
next one; such a port stays taken until the VM ends. A frame whose process has ended is therefore still written to its
end, for which the guest has a moment.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from typing import TYPE_CHECKING

from common import log
from common.channel import HELLO, HELLO_REPLY, NONCE_SIZE, port_of, stream_number
from common.errors import ExhaustedError, GuestError, UnavailableError
from procs.shim import unix
from procs.shim.ports import PortUse

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from common.services.channel import VirtioSerial
    from procs.shim.ports import ProcessName, TellTaken

PORTS_TIMEOUT_S = 30
"""How long a process waits for ports: many short ones may begin at once, a few long ones must not keep all others."""

_MAX_NOISE = 1 << 20
"""Bytes of an earlier conversation that may precede the answer to the hello."""


class SerialChannel:
    """See :class:`procs.shim.channel.Channel`."""

    def __init__(self, where: VirtioSerial) -> None:
        self.ports = StreamPorts(where.stream_sockets)
        self._agent_socket = where.agent_socket

    async def connect_agent(self) -> socket.socket:
        """Connect to the agent's port and wait until the agent answers the hello, for ever.

        Raises:
            UnavailableError: the VM is gone.
            GuestError: what answers is not the agent.
        """
        sock = unix.connect(self._agent_socket)
        try:
            await _greet(sock)
        except BaseException:
            sock.close()
            raise
        return sock


class StreamPorts:
    """Which ports of a VM are free. The one that rested longest is taken first.

    Args:
        sockets: where to connect to each port.
        wait_s: how long a process waits for ports that others have, in seconds.
    """

    by_call = False
    tell_taken: TellTaken | None = None

    def __init__(self, sockets: Sequence[str], wait_s: float = PORTS_TIMEOUT_S) -> None:
        self._sockets = sockets
        self._wait_s = wait_s
        self._free = deque(range(len(sockets)))
        self._generation = 0
        self._changed = asyncio.Condition()

    async def take(self, count: int, _process: ProcessName, group: asyncio.TaskGroup) -> list[PortUse]:
        """Connect to free ports, each under a stream number that was never used in this VM.

        All at once or none: two processes that hold one each and want another would wait for one another.

        Args:
            count: how many.
            group: where frames are sent.

        Raises:
            ExhaustedError: too many were taken for too long.
            UnavailableError: the VM is gone.
        """
        try:
            async with asyncio.timeout(self._wait_s), self._changed:
                await self._changed.wait_for(lambda: len(self._free) >= count)
                return [self._connect(group) for _ in range(count)]
        except TimeoutError as err:
            raise ExhaustedError(
                f"all {len(self._sockets)} stream ports of the VM are in use",
                hint="a process takes one with a terminal and two without; end one first",
            ) from err

    def _connect(self, group: asyncio.TaskGroup) -> PortUse:
        port = self._free.popleft()
        self._generation += 1
        sock = unix.connect(self._sockets[port])
        return PortUse(stream_number(self._generation, port), sock, group, self.tell_taken)

    async def give_back(self, use: PortUse) -> None:
        """Disconnect; the port is free again if nothing of this use can reach the next."""
        if await use.close():
            async with self._changed:
                self._free.append(port_of(use.stream))
                self._changed.notify_all()
        else:
            log.get().warning("stream port stays taken", port=port_of(use.stream))


async def _greet(sock: socket.socket) -> None:
    """Say hello, and drop what comes before its answer."""
    loop = asyncio.get_running_loop()
    nonce = secrets.token_bytes(NONCE_SIZE)
    wanted = HELLO_REPLY + nonce
    await loop.sock_sendall(sock, HELLO + nonce)
    seen = b""
    noise = 0
    while not seen.endswith(wanted):
        data = await loop.sock_recv(sock, 65536)
        if not data:
            raise UnavailableError("the VM closed the agent's port")
        seen = (seen + data)[-2 * len(wanted) :]
        noise += len(data)
        if noise > _MAX_NOISE:
            raise GuestError(f"the guest sent {noise} bytes on the agent's port and no answer to the hello")
