"""A ttrpc client on an asyncio transport: many calls at once on one connection, answered in any order.

The client is the protocol object of its transport, so it needs no task of its own. When the connection ends, every call
that waits fails with :class:`common.errors.UnavailableError`: whether the peer did what was asked is not known.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from common import status
from common.errors import (
    AlreadyExistsError,
    DeadlineError,
    ExhaustedError,
    KataError,
    NotFoundError,
    StateError,
    UnavailableError,
    UnsupportedError,
    UsageError,
    WireError,
)
from common.protobuf import DecodeError, Message
from common.text import readable
from common.ttrpc import frames

if TYPE_CHECKING:
    from collections.abc import Mapping

M = TypeVar("M", bound=Message)

MAX_UNREAD = 2 * frames.MAX_PAYLOAD
"""Bytes that may wait for a peer that does not read. A call is refused while there are more: the peer may be a guest
that has stopped reading for ever, and calls whose time is up have left theirs behind."""

MAX_MESSAGE = 4096
"""Characters of a peer's error that are passed on. Clients show them to people, and the peer may be a guest."""

_ERRORS: dict[int, type[KataError]] = {
    kind.code: kind
    for kind in (
        UsageError, DeadlineError, NotFoundError, AlreadyExistsError, ExhaustedError, StateError, UnsupportedError,
        UnavailableError, WireError,
    )
}  # fmt: skip


class TtrpcClient(asyncio.Protocol):
    """One connection to a ttrpc server.

    Args:
        peer: what to call the other end in errors, for example ``the guest's agent``.
    """

    def __init__(self, peer: str) -> None:
        self._peer = peer
        self._decoder = frames.Decoder()
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._next_stream = 1
        self._transport: asyncio.WriteTransport | None = None
        self.closed = asyncio.Event()

    def connection_made(self, transport: asyncio.WriteTransport) -> None:  # type: ignore[override]  # of a stream
        """Begin (called by asyncio)."""
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail all calls that wait (called by asyncio)."""
        self._transport = None
        self.closed.set()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(UnavailableError(f"connection to {self._peer} was lost: {exc or 'closed'}"))

    def data_received(self, data: bytes) -> None:
        """Hand each reply to its call (called by asyncio). A reply that nobody waits for is dropped."""
        for frame in self._decoder.feed(data):
            future = self._waiting.get(frame.stream)
            if frame.type != frames.RESPONSE or future is None or future.done():
                continue
            if frame.payload is None:
                future.set_exception(KataError(f"reply of {self._peer} exceeds {frames.MAX_PAYLOAD} bytes"))
            else:
                future.set_result(frame.payload)

    def close(self) -> None:
        """End the connection."""
        if self._transport is not None:
            self._transport.close()

    async def call(
        self,
        service: str,
        method: str,
        request: Message,
        reply: type[M],
        *,
        timeout_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> M:
        """Call a method.

        Args:
            service: full name, for example ``grpc.AgentService``.
            method: its name.
            request: what to send.
            reply: the type of the answer.
            timeout_s: how long to wait, in seconds; the server is told. None is for ever.
            metadata: travels with the call.

        Raises:
            KataError: the server's own error, by its status code.
            DeadlineError: no answer in time.
            UnavailableError: the connection is lost, or was.
            ExhaustedError: the peer has not read what earlier calls sent.
            WireError: the answer is not such a message.
        """
        message = frames.Request(
            service=service,
            method=method,
            payload=request.encode(),
            timeout_nano=int(timeout_s * 1e9) if timeout_s is not None else 0,
            metadata=[frames.KeyValue(key=key, value=value) for key, value in (metadata or {}).items()],
        )
        try:
            async with asyncio.timeout(timeout_s):
                payload = await self._exchange(message.encode())
        except TimeoutError as err:
            raise DeadlineError(f"{self._peer} did not answer {method} within {timeout_s} s") from err
        return self._read(method, payload, reply)

    async def _exchange(self, data: bytes) -> bytes:
        if self._transport is None:
            raise UnavailableError(f"no connection to {self._peer}")
        if (unread := self._transport.get_write_buffer_size()) > MAX_UNREAD:
            raise ExhaustedError(f"{self._peer} does not read: {unread} bytes of earlier calls wait for it")
        stream = self._next_stream
        self._next_stream += 2
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[stream] = future
        try:
            self._transport.write(frames.encode(stream, frames.REQUEST, data))
            return await future
        finally:
            del self._waiting[stream]

    def _read(self, method: str, payload: bytes, reply: type[M]) -> M:
        try:
            response = frames.Response.decode(payload)
            if response.status is None or response.status.code == status.OK:
                return reply.decode(response.payload)
        except DecodeError as err:
            raise WireError(f"{self._peer} answered {method} with bytes that are no reply: {err}") from err
        raise _ERRORS.get(response.status.code, KataError)(readable(response.status.message[:MAX_MESSAGE]))
