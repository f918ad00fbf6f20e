"""What a service has answered: a call that comes again under its call id gets the same answer."""

from __future__ import annotations

import time
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.bus.wire import Call

REMEMBER_S = 120.0
"""How long a reply can be had again under its call id."""

_MAX_REMEMBERED = 4096


class Memory:
    """Replies by call id, in this process; a service that must not forget them at its end has one of its own kind."""

    def __init__(self) -> None:
        self._replies: OrderedDict[str, tuple[float, bytes]] = OrderedDict()

    def recall(self, call_id: str) -> bytes | None:
        """Return the answer that a call was given, or None."""
        self._forget()
        known = self._replies.get(call_id)
        return None if known is None else known[1]

    def remember(self, call: Call, reply: bytes) -> None:
        """Keep the answer to a call."""
        self._replies[call.call_id] = (time.monotonic() + REMEMBER_S, reply)

    def _forget(self) -> None:
        now = time.monotonic()
        while self._replies:
            expires, _ = next(iter(self._replies.values()))
            if expires > now and len(self._replies) < _MAX_REMEMBERED:
                return
            self._replies.popitem(last=False)
