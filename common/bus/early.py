"""A call that is sent before the process is ready to wait for its answer.

Importing asyncio and all that stands on it takes longer than sending a message. So a process whose first act is a call
sends it with this module, goes on importing, and then makes the same call with a :class:`common.bus.client.BusClient`
under the same call id: the server answers a call id once, so the second call joins the first or finds its answer. If
the first never arrived, the second is the call.
"""

from __future__ import annotations

import os
import time
from typing import TypeVar

import msgspec
import zmq

from common import paths
from common.bus.wire import VERSION, Call, Verb, encode

Q = TypeVar("Q", bound=msgspec.Struct)
R = TypeVar("R", bound=msgspec.Struct)


class EarlyCall:
    """A call on its way.

    Attributes:
        call_id: under which it is to be made again.
        request_id: on whose behalf it was made.
    """

    def __init__(self, service: str, verb: Verb[Q, R], request: Q, *, timeout_s: float) -> None:
        self.call_id = os.urandom(8).hex()
        self.request_id = os.urandom(8).hex()
        call = Call(
            v=VERSION,
            call_id=self.call_id,
            request_id=self.request_id,
            service=service,
            verb=verb.name,
            deadline_ns=time.monotonic_ns() + int(timeout_s * 1e9),
            body=msgspec.to_builtins(request),
        )
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(f"ipc://{paths.bus_dir()}/{service}")
        self._socket.send(encode(call), flags=zmq.NOBLOCK)  # queued here; ZeroMQ's own thread connects and sends

    def close(self) -> None:
        """Forget it, once the same call has been answered or has failed."""
        self._context.destroy(linger=0)
