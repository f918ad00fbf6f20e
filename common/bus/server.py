"""The answering end of the bus.

A server takes a lock before it binds, since binding an ipc path silently takes it away from a living server. Each
call runs in a task of its own. Replies are remembered by call id (``memory``), so that a call that is sent again (its
reply was lost, or its sender reconnected) runs once: it joins the running one or gets the same answer. A process that
ends while it carries a call out has not remembered it; the services' verbs are therefore idempotent in what they do.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import msgspec
import zmq
import zmq.asyncio

from common import log, paths
from common.bus.memory import Memory
from common.bus.wire import VERSION, Call, Empty, Fault, Reply, Verb, convert, decode, encode
from common.errors import (
    AlreadyExistsError,
    BugError,
    DeadlineError,
    ExhaustedError,
    KataError,
    UnsupportedError,
)
from common.services.health import HEALTH, Family, Health
from common.trace import reach
from common.workers import Workers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    Handler = Callable[[Any], Awaitable[msgspec.Struct]]

Q = TypeVar("Q", bound=msgspec.Struct)
R = TypeVar("R", bound=msgspec.Struct)

MAX_RUNNING = 256
"""Calls in flight; more are refused."""


@dataclass(slots=True)
class _Running:
    """A call in execution and the senders who wait for it."""

    senders: set[bytes] = field(default_factory=set)


class BusServer:
    """Answers one service's verbs; an async context manager, to be left by the task that entered it.

    Args:
        service: its bus name.
        gauges: what its health counts.
        metrics: what its health shows to Prometheus.
        memory: keeps its replies.

    Raises on entering:
        AlreadyExistsError: another process answers for this service.
    """

    def __init__(
        self,
        service: str,
        gauges: Callable[[], dict[str, float]] = dict,
        metrics: Callable[[], tuple[Family, ...]] = tuple,
        memory: Memory | None = None,
    ) -> None:
        self._service = service
        self._gauges = gauges
        self._metrics = metrics
        self._memory = memory or Memory()
        self._began = time.monotonic()
        self._handlers: dict[str, tuple[type[msgspec.Struct], Handler]] = {}
        self._running: dict[str, _Running] = {}
        self._stack = AsyncExitStack()
        self._workers = Workers()
        self.register(HEALTH, self._health)

    def register(self, verb: Verb[Q, R], handler: Callable[[Q], Awaitable[R]]) -> None:
        """Answer a verb with a handler; its KataError travels to the caller."""
        self._handlers[verb.name] = (verb.request, handler)

    async def __aenter__(self) -> Self:
        self._lock()
        context = zmq.asyncio.Context()
        self._stack.callback(context.destroy, linger=0)
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(f"ipc://{paths.bus_dir()}/{self._service}")
        await self._stack.enter_async_context(self._workers)
        self._workers.spawn(self._receive())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    def _lock(self) -> None:
        directory = Path(paths.bus_dir())
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(directory / f"{self._service}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self._stack.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise AlreadyExistsError(
                f"another process answers for {self._service} in {directory}", hint="stop it first"
            ) from err

    async def _receive(self) -> None:
        while True:
            sender, *parts = await self._socket.recv_multipart()
            try:
                call = decode(parts[-1] if parts else b"", Call)
            except KataError as err:
                log.get().warning("malformed call dropped", error=str(err))
                continue
            await self._admit(sender, call)

    async def _admit(self, sender: bytes, call: Call) -> None:
        """Answer from memory, join the running call, or run it."""
        remembered = self._memory.recall(call.call_id)
        if remembered is not None:
            await self._send(sender, remembered)
        elif call.call_id in self._running:
            self._running[call.call_id].senders.add(sender)
        elif refusal := self._refusal(call):
            # Not remembered, since nothing was done: the same call may be tried again.
            log.get().warning("call refused", request=call.request_id, verb=call.verb, error=str(refusal))
            await self._send(sender, encode(_failure(call, refusal)))
        else:
            self._running[call.call_id] = _Running({sender})
            self._workers.spawn(self._run(call))

    def _refusal(self, call: Call) -> KataError | None:
        """Return why a call is not begun, if it is not."""
        if time.monotonic_ns() >= call.deadline_ns:
            return DeadlineError(f"{call.verb} reached {self._service} after its deadline; nothing was done")
        if len(self._running) >= MAX_RUNNING:
            return ExhaustedError(f"{self._service} has {MAX_RUNNING} calls in flight", hint="try again later")
        return None

    async def _run(self, call: Call) -> None:
        sandbox = call.body.get("sandbox_id", "")
        with log.bound(request=call.request_id, sandbox=sandbox if isinstance(sandbox, str) else "", verb=call.verb):
            data = await self._reply(call)
        running = self._running.pop(call.call_id)
        reach("reply:made")
        self._memory.remember(call, data)
        reach("reply:remembered")
        for sender in running.senders:
            await self._send(sender, data)

    async def _reply(self, call: Call) -> bytes:
        """Run the handler; every error becomes a fault and is logged here, once."""
        try:
            body = await self._handle(call)
            return encode(Reply(v=VERSION, call_id=call.call_id, body=msgspec.to_builtins(body)))
        except KataError as err:
            log.get().error("call failed", error=str(err), kind=type(err).__name__, **err.context)
            return encode(_failure(call, err))
        except Exception as err:  # noqa: BLE001 - the bus's boundary: a bug must not end the service
            log.get().exception("bug in a handler")
            return encode(_failure(call, BugError(f"{self._service} failed in {call.verb}: {err!r}")))

    async def _handle(self, call: Call) -> msgspec.Struct:
        known = self._handlers.get(call.verb)
        if call.service != self._service or known is None:
            raise UnsupportedError(f"{self._service} does not know {call.service}/{call.verb}")
        request, handler = known
        return await handler(convert(call.body, request))

    async def _send(self, sender: bytes, data: bytes) -> None:
        # EHOSTUNREACH: the sender is gone; it asks again under the same call id if it still wants to know.
        with suppress(zmq.ZMQError):
            await self._socket.send_multipart([sender, data], flags=zmq.NOBLOCK)

    async def _health(self, _: Empty) -> Health:
        return Health(
            service=self._service,
            pid=os.getpid(),
            uptime_s=time.monotonic() - self._began,
            gauges={"calls_in_flight": float(len(self._running)), **self._gauges()},
            metrics=self._metrics(),
        )


def _failure(call: Call, error: KataError) -> Reply:
    return Reply(v=VERSION, call_id=call.call_id, fault=msgspec.convert(error.to_wire(), Fault))
