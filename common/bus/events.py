"""Events: news that a service publishes and that nobody has to hear.

Each event has an audience, a name that both sides know, such as a sandbox's: what concerns one of a thousand sandboxes
wakes one of a thousand shims. ZeroMQ leaves out at the publisher's end what a subscriber did not ask for.

Each event has a sequence number, counted for its audience. A *repeat* is the last number without an event, since
otherwise the loss of a last event would never show: it is sent to whoever subscribes, which one who lost its connection
does again, and some times after an event, ever later (:data:`REPEATS_S`). Then there is silence: who waits for news of
a service in which nothing happens sleeps. A subscriber that cannot know whether it missed something (first contact, a
gap, a publisher that restarted) gets :class:`Resync` first: its reader then reads the state itself.
"""

from __future__ import annotations

import asyncio
import secrets
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import msgspec
import zmq
import zmq.asyncio

from common import log, paths
from common.bus.wire import VERSION, Event, News, convert, decode, encode
from common.errors import KataError
from common.workers import Workers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from types import TracebackType

Q = TypeVar("Q", bound=msgspec.Struct)

REPEATS_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Pauses before repeats. Events are lost where a queue is full, and none is full for as long as all of these."""
_QUEUE = 1000
_END = b"\0"
"""What ends an audience's name in a frame: a subscription is to whatever begins as it does."""
_SUBSCRIBED = b"\x01"
"""How the message of an XPUB socket begins that tells of a subscription (zmq_socket(3), ZMQ_XPUB)."""


class Resync(msgspec.Struct, frozen=True, kw_only=True):
    """Events of a service may have been missed: read its state."""

    service: str


class Received(msgspec.Struct, frozen=True, kw_only=True):
    """An event as it came; :meth:`body_of` gives its body if it is of a kind."""

    service: str
    news: News

    def body_of(self, event: Event[Q]) -> Q | None:
        """Return the body if this is such an event, else None.

        Raises:
            WireError: it is, but its body is not of the event's type.
        """
        return convert(self.news.body, event.body) if self.news.topic == event.topic else None


class Publisher:
    """Publishes a service's events; an async context manager."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._identity = secrets.token_hex(8)
        self._sequences: dict[str, int] = {}
        self._repeats: dict[str, asyncio.TimerHandle] = {}
        self._stack = AsyncExitStack()
        self._workers = Workers()

    async def __aenter__(self) -> Self:
        Path(paths.bus_dir()).mkdir(mode=0o700, parents=True, exist_ok=True)
        context = zmq.asyncio.Context()
        self._stack.callback(context.destroy, linger=0)
        self._socket = context.socket(zmq.XPUB)
        self._socket.setsockopt(zmq.XPUB_VERBOSE, 1)  # tell of each subscription, not of the first only
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, _QUEUE)
        self._socket.bind(f"ipc://{paths.bus_dir()}/{self._service}.events")
        await self._stack.enter_async_context(self._workers)
        self._stack.callback(self._stop_repeats)
        self._workers.spawn(self._greet())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    async def publish(self, event: Event[Q], body: Q, *, audience: str) -> None:
        """Tell whoever listens.

        Args:
            event: what it is.
            body: what is told.
            audience: whom it concerns; a name without NUL.
        """
        self._sequences[audience] = self._sequences.get(audience, 0) + 1
        await self._send(audience, event.topic, msgspec.to_builtins(body))
        self._repeat_later(audience, REPEATS_S)

    async def _send(self, audience: str, topic: str, body: dict[str, object]) -> None:
        sequence = self._sequences.get(audience, 0)
        news = News(v=VERSION, publisher=self._identity, sequence=sequence, topic=topic, body=body)
        await self._socket.send_multipart((_frame(audience), encode(news)))

    async def _greet(self) -> None:
        """Tell whoever subscribes which event was the last of its audience."""
        while True:
            message = await self._socket.recv()
            audience = message.removeprefix(_SUBSCRIBED).removesuffix(_END)
            if message.startswith(_SUBSCRIBED):
                await self._send(audience.decode(errors="replace"), "", {})

    def _repeat_later(self, audience: str, pauses: Sequence[float]) -> None:
        """Repeat to an audience which event was the last, after each pause, unless there is another before."""
        if audience in self._repeats:
            self._repeats.pop(audience).cancel()
        if pauses:
            later = asyncio.get_running_loop().call_later
            self._repeats[audience] = later(pauses[0], self._repeat, audience, pauses[1:])

    def _repeat(self, audience: str, pauses: Sequence[float]) -> None:
        self._workers.spawn(self._send(audience, "", {}))
        self._repeat_later(audience, pauses)

    def _stop_repeats(self) -> None:
        for timer in self._repeats.values():
            timer.cancel()


class Subscriber:
    """Hears the events of services; an async context manager and an async iterator."""

    def __init__(self, audiences: Mapping[str, str]) -> None:
        """Say what to listen to.

        Args:
            audiences: of each service, as which audience.
        """
        self._audiences = dict(audiences)
        self._queue: asyncio.Queue[Received | Resync] = asyncio.Queue(_QUEUE)
        self._stack = AsyncExitStack()
        self._workers = Workers()

    async def __aenter__(self) -> Self:
        context = zmq.asyncio.Context()
        self._stack.callback(context.destroy, linger=0)
        await self._stack.enter_async_context(self._workers)
        for service, audience in self._audiences.items():
            socket = context.socket(zmq.SUB)
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVHWM, _QUEUE)
            socket.setsockopt(zmq.SUBSCRIBE, _frame(audience))
            socket.connect(f"ipc://{paths.bus_dir()}/{service}.events")
            self._workers.spawn(self._read(service, socket))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    def __aiter__(self) -> AsyncIterator[Received | Resync]:
        return self

    async def __anext__(self) -> Received | Resync:
        return await self._queue.get()

    async def _read(self, service: str, socket: zmq.asyncio.Socket) -> None:
        publisher, sequence = "", 0
        while True:
            try:
                _, message = await socket.recv_multipart()
                news = decode(message, News)
            except (KataError, ValueError) as err:
                log.get().warning("malformed event dropped", service=service, error=str(err))
                continue
            expected = sequence + 1 if news.topic else sequence
            if news.publisher != publisher or news.sequence != expected:
                await self._queue.put(Resync(service=service))
            publisher, sequence = news.publisher, news.sequence
            if news.topic:
                await self._queue.put(Received(service=service, news=news))


def _frame(audience: str) -> bytes:
    return audience.encode() + _END
