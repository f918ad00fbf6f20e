"""The sender of task events: in order, never in the way of a call, patient while containerd is away.

containerd says in ``$TTRPC_ADDRESS`` where it takes them. Events wait in one queue and one coroutine sends them one by
one, so containerd sees them in the order of :meth:`EventSender.publish`. When containerd restarts, the first one that
fails is sent again until it answers; one that containerd refuses is logged and dropped, since it always would be.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING

from common import log
from common.errors import DeadlineError, KataError, UnavailableError
from common.protocols.events import FORWARD, SERVICE, Envelope, ForwardRequest, TaskEvent
from common.protocols.task import Any, Empty, Timestamp
from common.ttrpc.client import TtrpcClient
from procs.shim import unix

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_QUEUE = 2048
"""Events that wait while containerd is away; the oldest are dropped beyond it (containerd's own shims keep as many)."""

SEND_TIMEOUT_S = 5
RETRY_S = 1

_log = log.get()


class EventSender:
    """Sends events to one containerd.

    Args:
        address: containerd's ttrpc socket; empty if there is none, then events are only logged.
        namespace: containerd's namespace.
        now_ns: the time of day, in nanoseconds since 1970.
    """

    def __init__(self, address: str, namespace: str, now_ns: Callable[[], int] = time.time_ns) -> None:
        self._address = address
        self.namespace = namespace
        self._now_ns = now_ns
        self._queue: deque[ForwardRequest] = deque()
        self._has_work = asyncio.Event()
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._client: TtrpcClient | None = None

    def publish(self, event: TaskEvent) -> None:
        """Queue an event; it bears the time of this call."""
        _log.debug("event", topic=event.TOPIC, body=repr(event))
        if not self._address:
            return
        envelope = Envelope(
            timestamp=Timestamp.from_ns(self._now_ns()),
            namespace=self.namespace,
            topic=event.TOPIC,
            event=Any(type_url=event.TYPE_URL, value=event.encode()),
        )
        if len(self._queue) >= MAX_QUEUE:
            dropped = self._queue.popleft().envelope
            _log.error("event dropped, containerd is away", topic=dropped.topic if dropped else "")
        self._queue.append(ForwardRequest(envelope=envelope))
        self._has_work.set()
        self._is_idle.clear()

    async def run(self) -> None:
        """Send what is queued, for ever."""
        while True:
            await self._has_work.wait()
            while self._queue:
                await self._send(self._queue[0])
            self._has_work.clear()
            self._is_idle.set()

    async def wait_idle(self) -> None:
        """Wait until everything is sent."""
        await self._is_idle.wait()

    async def flush(self, timeout_s: float) -> None:
        """Wait until everything is sent, but not longer than ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._is_idle.wait()
        except TimeoutError:
            _log.error("events were not sent, containerd is away", count=len(self._queue))

    async def _send(self, request: ForwardRequest) -> None:
        """Send the first event of the queue, and drop it from there unless it should be tried again."""
        try:
            client = await self._connected()
            await client.call(SERVICE, FORWARD, request, Empty, timeout_s=SEND_TIMEOUT_S)
        except (UnavailableError, DeadlineError) as err:
            _log.debug("containerd does not take events", error=str(err))
            self._disconnect()
            await asyncio.sleep(RETRY_S)  # nothing tells when a socket will be listened on again
            return
        except KataError as err:
            _log.error("containerd refused an event", error=str(err))
        if self._queue and self._queue[0] is request:
            self._queue.popleft()

    async def _connected(self) -> TtrpcClient:
        if self._client is None or self._client.closed.is_set():
            sock = unix.connect(self._address)
            loop = asyncio.get_running_loop()
            _, self._client = await loop.create_connection(lambda: TtrpcClient("containerd"), sock=sock)
        return self._client

    def _disconnect(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
