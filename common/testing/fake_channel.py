"""The guest's end of a channel, faked: what a VM has instead of a device, on Unix sockets of the host."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Protocol

from common.channel import (
    AGENT_VSOCK_PORT,
    HELLO,
    HELLO_REPLY,
    NONCE_SIZE,
    STREAM_NUMBER,
    STREAM_VSOCK_PORT,
    port_of,
)
from common.services.channel import HybridVsock, VirtioSerial

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from common.services.channel import GuestChannel

    End = tuple[asyncio.StreamReader, asyncio.StreamWriter]

PORTS = 4


class FakeChannel(Protocol):
    """The guest's end.

    Attributes:
        is_silent: whether nobody answers who wants the agent.
        has_hello: set when somebody has wanted it.
    """

    is_silent: bool
    has_hello: asyncio.Event

    @property
    def where(self) -> GuestChannel:
        """What the VM manager says of it."""

    async def listen(self, converse: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> None:
        """Take connections; ``converse`` gets those that carry ttrpc."""

    def stream(self, number: int) -> End:
        """Return the guest's end of a stream that the host has connected."""

    def close(self) -> None:
        """End all connections at once."""


class _Sockets:
    """Unix sockets that end together."""

    def __init__(self) -> None:
        self.is_silent = False
        self.has_hello = asyncio.Event()
        self._servers: list[asyncio.Server] = []
        self._writers: list[asyncio.StreamWriter] = []

    async def _serve(self, path: str, handle: Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]) -> None:
        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Awaitable[None] | None:
            self._writers.append(writer)
            handling = handle(reader, writer)
            return _until_closed(handling) if asyncio.iscoroutine(handling) else None

        self._servers.append(await asyncio.start_unix_server(connected, path))

    def close(self) -> None:
        """End all connections at once."""
        for server in self._servers:
            server.close()
        for writer in self._writers:
            writer.close()


async def _until_closed(handling: Awaitable[object]) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        await handling


class FakeSerial(_Sockets):
    """virtio-serial ports."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.where = VirtioSerial(
            agent_socket=str(directory / "agent.sock"),
            stream_sockets=tuple(str(directory / f"stream.{port}.sock") for port in range(PORTS)),
        )
        self._ports: dict[int, End] = {}

    async def listen(self, converse: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> None:
        """Take connections."""

        async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            hello = await reader.readexactly(len(HELLO) + NONCE_SIZE)
            self.has_hello.set()
            if self.is_silent:
                await reader.read()
                return
            writer.write(b"left over from before" + HELLO_REPLY + hello[len(HELLO) :])
            await converse(reader, writer)

        await self._serve(self.where.agent_socket, greet)
        for port, path in enumerate(self.where.stream_sockets):

            def keep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int = port) -> None:
                self._ports[port] = reader, writer

            await self._serve(path, keep)

    def stream(self, number: int) -> End:
        """Return the guest's end of a stream that the host has connected."""
        return self._ports[port_of(number)]


class FakeHybrid(_Sockets):
    """Hybrid vsock.

    Attributes:
        refusals: how many connections to the agent are refused first, as before it listens.
        asked: the ports that were asked for.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self.where = HybridVsock(socket=str(directory / "vsock.sock"))
        self.refusals = 2
        self.asked: list[int] = []
        self._streams: dict[int, End] = {}

    async def listen(self, converse: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]) -> None:
        """Take connections."""

        async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            verb, port = (await reader.readuntil(b"\n")).split()
            assert verb == b"CONNECT"
            self.asked.append(int(port))
            if int(port) == STREAM_VSOCK_PORT:
                writer.write(b"OK 1073741824\n")
                number = await reader.readexactly(STREAM_NUMBER.size)
                self._streams[STREAM_NUMBER.unpack(number)[0]] = reader, writer
                writer.write(number)
            elif int(port) == AGENT_VSOCK_PORT and not self.is_silent and not self.refusals:
                writer.write(b"OK 1073741825\n")
                self.has_hello.set()
                await converse(reader, writer)
            else:
                self.refusals -= not self.is_silent
                self.has_hello.set()
                writer.close()

        await self._serve(self.where.socket, connect)

    def stream(self, number: int) -> End:
        """Return the guest's end of a stream that the host has connected."""
        return self._streams[number]
