"""The calling end of the bus.

One DEALER socket per service, opened at the first call. The socket's monitor tells when the peer comes and goes:

- a call to a peer that is away waits for it :data:`GRACE_S` and then fails with UnavailableError: nothing was sent;
- when the peer goes while calls are in flight, it has the same time to come back: then they are sent again under the
  same call id, which makes them safe to repeat; if it does not come back they fail with InterruptedCallError;
- a deadline that passes is a DeadlineError; whether the call took effect must be asked.

Source of the socket events: zmq_socket_monitor(3).
"""

from __future__ import annotations

import asyncio
import secrets
import time
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Self, TypeVar

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from common import log, paths
from common.bus.wire import VERSION, Call, Reply, Verb, convert, decode, encode
from common.errors import DeadlineError, InterruptedCallError, KataError, UnavailableError, from_wire
from common.workers import Workers

if TYPE_CHECKING:
    from types import TracebackType

Q = TypeVar("Q", bound=msgspec.Struct)
R = TypeVar("R", bound=msgspec.Struct)

GRACE_S = 1.0
"""How long a peer may be away before its callers are told."""

_HINT = "`supervisorctl status` shows whether the service runs"
_NOTICE_MS = 500
_RECONNECT_MS = 20
_RECONNECT_MAX_MS = 500


class BusClient:
    """Calls services; an async context manager, to be left by the task that entered it."""

    def __init__(self) -> None:
        self._context = zmq.asyncio.Context()
        self._peers: dict[str, _Peer] = {}
        self._stack = AsyncExitStack()
        self._workers = Workers()

    async def __aenter__(self) -> Self:
        self._stack.callback(self._context.destroy, linger=0)
        await self._stack.enter_async_context(self._workers)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for peer in self._peers.values():
            peer.close()
        await self._stack.__aexit__(kind, error, trace)

    async def call(
        self, service: str, verb: Verb[Q, R], request: Q, *, timeout_s: float, call_id: str | None = None
    ) -> R:
        """Ask a service for something and return its reply.

        Args:
            service: the service's bus name.
            verb: what is asked; ``request`` is of its request type.
            request: the verb's body.
            timeout_s: when to give up, in seconds from now.
            call_id: the idempotency key; give the same one to repeat a call whose outcome is unknown.

        Raises:
            UnavailableError: the service is down; nothing was asked.
            InterruptedCallError: it went down before it answered; whether the call took effect is unknown.
            DeadlineError: it did not answer in time.
            KataError: what the service itself answered.
        """
        call = Call(
            v=VERSION,
            call_id=call_id or secrets.token_hex(8),
            request_id=log.request_id.get(),
            service=service,
            verb=verb.name,
            deadline_ns=time.monotonic_ns() + int(timeout_s * 1e9),
            body=msgspec.to_builtins(request),
        )
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self._peer(service).ask(call.call_id, encode(call))
        except TimeoutError as err:
            raise DeadlineError(f"{service} did not answer {verb.name} within {timeout_s:g} s", hint=_HINT) from err
        if reply.fault is not None:
            fault = reply.fault
            raise from_wire(fault.kind, fault.message, fault.hint, fault.context)
        return convert(reply.body, verb.reply)

    def _peer(self, service: str) -> _Peer:
        if service not in self._peers:
            self._peers[service] = _Peer(service, self._context, self._workers)
        return self._peers[service]


class _Peer:
    """The connection to one service and the calls in flight on it."""

    def __init__(self, service: str, context: zmq.asyncio.Context, workers: Workers) -> None:
        self._service = service
        self._socket = context.socket(zmq.DEALER)
        for option, value in (
            (zmq.LINGER, 0),
            (zmq.IMMEDIATE, 1),
            (zmq.RECONNECT_IVL, _RECONNECT_MS),
            (zmq.RECONNECT_IVL_MAX, _RECONNECT_MAX_MS),
        ):
            self._socket.setsockopt(option, value)
        self._is_present = asyncio.Event()
        self._in_flight: dict[str, tuple[asyncio.Future[Reply], bytes]] = {}
        self._monitor = self._socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._workers = workers
        workers.spawn(self._watch())
        workers.spawn(self._receive())
        self._socket.connect(f"ipc://{paths.bus_dir()}/{service}")

    def close(self) -> None:
        """Stop the monitor; the context closes the sockets."""
        self._socket.disable_monitor()

    async def ask(self, call_id: str, data: bytes) -> Reply:
        """Send a call and wait for its reply; the caller bounds the wait."""
        await self._wait_present()
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._in_flight[call_id] = (future, data)
        try:
            await self._send(data)
            return await future
        finally:
            del self._in_flight[call_id]

    async def _wait_present(self) -> None:
        try:
            async with asyncio.timeout(GRACE_S):
                await self._is_present.wait()
        except TimeoutError as err:
            raise UnavailableError(f"service {self._service} is down", hint=_HINT) from err

    async def _send(self, data: bytes) -> None:
        # ZeroMQ may notice a peer a moment after its handshake is known (zmq_send takes up news of its own threads once
        # a millisecond). One that has just gone takes nothing; the call is sent when it comes back, or given up.
        with suppress(zmq.Again):
            try:
                await self._socket.send(data, flags=zmq.NOBLOCK)
            except zmq.Again:
                await self._socket.poll(_NOTICE_MS, zmq.POLLOUT)  # type: ignore[call-arg]  # its stub lacks the flags
                await self._socket.send(data, flags=zmq.NOBLOCK)

    async def _receive(self) -> None:
        while True:
            data = await self._socket.recv()
            try:
                reply = decode(data, Reply)
            except KataError as err:
                log.get().warning("malformed reply dropped", service=self._service, error=str(err))
                continue
            future, _ = self._in_flight.get(reply.call_id, (None, b""))
            if future is not None and not future.done():
                future.set_result(reply)

    async def _watch(self) -> None:
        """Follow the peer's coming and going."""
        absence: asyncio.Task[None] | None = None
        while True:
            event = await recv_monitor_message(self._monitor)
            if absence is not None:
                absence.cancel()
                absence = None
            if event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._is_present.set()
                for _, data in list(self._in_flight.values()):
                    await self._send(data)
            else:
                self._is_present.clear()
                absence = self._workers.spawn(self._give_up())

    async def _give_up(self) -> None:
        """Fail the calls in flight unless the peer comes back within the grace time."""
        try:
            async with asyncio.timeout(GRACE_S):
                await self._is_present.wait()
        except TimeoutError:
            for future, _ in self._in_flight.values():
                if not future.done():
                    future.set_exception(
                        InterruptedCallError(
                            f"service {self._service} went down before it answered; the outcome is unknown", hint=_HINT
                        )
                    )
