"""What every service answers: is it alive, which process is it, what has it done."""

from __future__ import annotations

import msgspec

from common.bus.wire import Empty, Verb


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """A service's own view of itself.

    Attributes:
        service: its bus name.
        pid: its process.
        uptime_s: seconds since it began to answer.
        gauges: what it counts, by name; each service documents its own.
    """

    service: str
    pid: int
    uptime_s: float
    gauges: dict[str, float]


HEALTH = Verb("health", Empty, Health)
