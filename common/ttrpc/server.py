"""A ttrpc server on a Unix socket, for the shim: many connections, many calls at once, answers in any order.

*Who may call*: only processes of our own user and group (SO_PEERCRED), as containerd's own shims have it.

*Calls are finished*: the end of a connection and a client's deadline stop the waiting, not the work. A client that
comes back asks for the state; it must find the outcome of what it began, and not half of it. So calls belong to the
server and not to their connection, their number is bounded, and an answer to a connection that is gone is dropped.

*Errors*: a :class:`common.errors.KataError` is answered with its code and text. The text ends with the class of the
error, as Go programs have it: containerd 1.6 would add that by itself, 2.x prints what it got. Anything else is a bug
of ours: it is logged with its traceback and answered with INTERNAL.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from typing import TYPE_CHECKING

from common import log, status
from common.errors import ExhaustedError, KataError, UnsupportedError, UsageError
from common.protobuf import DecodeError, Message
from common.ttrpc import frames

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from typing import Any

    Handler = Callable[[Any], Awaitable[Message]]

MAX_CALLS = 1024
"""Calls in flight. A Wait is one for as long as its process lives."""

_CLASSES = {
    status.INVALID_ARGUMENT: "invalid argument",
    status.NOT_FOUND: "not found",
    status.ALREADY_EXISTS: "already exists",
    status.FAILED_PRECONDITION: "failed precondition",
    status.UNIMPLEMENTED: "not implemented",
    status.UNAVAILABLE: "unavailable",
}
"""What containerd's errors end with, by code (github.com/containerd/errdefs v1.0.0)."""

_UCRED = struct.Struct("3i")  # struct ucred: pid, uid, gid (unix(7))


class TtrpcServer:
    """Serves methods on a listening socket.

    Args:
        methods: by service and method name: the request's type and the handler.
        group: where calls run; its owner decides when the server ends.

    Attributes:
        has_clients: set while somebody is connected.
        is_alone: set while nobody is.
    """

    def __init__(
        self, methods: Mapping[tuple[str, str], tuple[type[Message], Handler]], group: asyncio.TaskGroup
    ) -> None:
        self._methods = methods
        self._group = group
        self._calls = 0
        self._listener: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self.has_clients = asyncio.Event()
        self.is_alone = asyncio.Event()
        self.is_alone.set()

    async def listen(self, listener: socket.socket) -> None:
        """Accept connections on a listening Unix socket until :meth:`close`."""
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_unix_server(lambda: _Connection(self), sock=listener)

    def close(self) -> None:
        """Accept no more connections and end those that there are; calls that run go on."""
        if self._listener is not None:
            self._listener.close()
        for connection in list(self._connections):
            connection.close()

    def join(self, connection: _Connection) -> None:
        """Count a client in."""
        self._connections.add(connection)
        self.is_alone.clear()
        self.has_clients.set()

    def leave(self, connection: _Connection) -> None:
        """Count a client out, if it was counted in."""
        self._connections.discard(connection)
        if not self._connections:
            self.has_clients.clear()
            self.is_alone.set()

    def begin(self, connection: _Connection, frame: frames.Frame) -> None:
        """Run one call; the answer goes to ``connection``."""
        if self._calls >= MAX_CALLS:
            connection.answer(frame.stream, _failure(ExhaustedError(f"{MAX_CALLS} calls are in flight")))
            return
        self._calls += 1
        self._group.create_task(self._call(connection, frame))

    async def _call(self, connection: _Connection, frame: frames.Frame) -> None:
        try:
            connection.answer(frame.stream, frames.Response(status=None, payload=(await self._run(frame)).encode()))
        except KataError as err:
            connection.answer(frame.stream, _failure(err))
        except Exception as err:  # noqa: BLE001 - one of the three boundaries where a bug becomes an answer
            log.get().exception("call failed")
            bug = frames.Status(code=status.INTERNAL, message=f"internal error: {type(err).__name__}: {err}")
            connection.answer(frame.stream, frames.Response(status=bug, payload=b""))
        finally:
            self._calls -= 1

    async def _run(self, frame: frames.Frame) -> Message:
        if frame.payload is None:
            raise ExhaustedError(f"request exceeds {frames.MAX_PAYLOAD} bytes")
        try:
            request = frames.Request.decode(frame.payload)
            found = self._methods.get((request.service, request.method))
            if found is None:
                raise UnsupportedError(f"method {request.method} of service {request.service} is not implemented")
            kind, handler = found
            message = kind.decode(request.payload)
        except DecodeError as err:
            raise UsageError(f"malformed request: {err}") from err
        return await handler(message)


class _Connection(asyncio.Protocol):
    """One client: reads frames, checks their stream numbers, writes answers."""

    def __init__(self, server: TtrpcServer) -> None:
        self._server = server
        self._decoder = frames.Decoder()
        self._last_stream = 0
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # of a stream
        peer = transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        _, uid, gid = _UCRED.unpack(peer)
        if (uid, gid) == (os.getuid(), os.getgid()):
            self._transport = transport
            self._server.join(self)
        else:
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._server.leave(self)

    def close(self) -> None:
        """End the connection once what was answered is sent."""
        if self._transport is not None:
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        for frame in self._decoder.feed(data):
            if frame.type != frames.REQUEST:
                continue
            if frame.stream % 2 == 0 or frame.stream <= self._last_stream:
                self.answer(frame.stream, _failure(UsageError(f"stream {frame.stream} is even or was used before")))
                continue
            self._last_stream = frame.stream
            self._server.begin(self, frame)

    def answer(self, stream: int, response: frames.Response) -> None:
        """Send an answer, if the client is still there."""
        if self._transport is None:
            return
        data = response.encode()
        if len(data) > frames.MAX_PAYLOAD:
            data = _failure(ExhaustedError(f"reply of {len(data)} bytes exceeds {frames.MAX_PAYLOAD}")).encode()
        self._transport.write(frames.encode(stream, frames.RESPONSE, data))


def _failure(err: KataError) -> frames.Response:
    text, name = str(err), _CLASSES.get(err.code, "")
    if name and not text.endswith(name):
        text = f"{text}: {name}"
    return frames.Response(status=frames.Status(code=err.code, message=text), payload=b"")
