"""What a test can demand of a fake hypervisor: that the next answers, or the next events of a name, go wrong."""

from __future__ import annotations

from collections import deque
from enum import StrEnum


class How(StrEnum):
    """What goes wrong."""

    LATE = "late"
    NEVER = "never"
    TWICE = "twice"
    REFUSED = "refused"
    BUSY = "busy"
    ACTED_AND_REFUSED = "acted and refused"


class Demands:
    """What was demanded and has not come to pass, by the name of the command or event."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[How]] = {}

    def add(self, what: str, how: str, times: int = 1) -> None:
        """Have the next so many go wrong."""
        self._waiting.setdefault(what, deque()).extend([How(how)] * times)

    def next(self, what: str) -> How | None:
        """Return what goes wrong now, or None."""
        waiting = self._waiting.get(what)
        return waiting.popleft() if waiting else None
