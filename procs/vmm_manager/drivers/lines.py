"""Lines that a VMM writes: cut out of what comes in pieces, bounded in length, and in number before they reach our log.

A writer into a FIFO that is full loses bytes and waits for nobody (``output``), so a line may be cut anywhere. Who
reads lines has to bear that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common import log, text

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_LINE = 64 << 10
"""Bytes of a line; of a longer one nothing is kept."""
_MAX_LOGGED_LINE = 1024
_PERIOD_S = 60.0
_LINES_A_PERIOD = 100


class Lines:
    """Cuts bytes into lines.

    Args:
        take: is given each line, without its end.
    """

    def __init__(self, take: Callable[[bytes], object]) -> None:
        self._take = take
        self._rest = b""
        self._is_skipping = False

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        *lines, rest = (self._rest + data).split(b"\n")
        for line in lines:
            if not self._is_skipping and len(line) <= MAX_LINE:
                self._take(line)
            self._is_skipping = False
        self._is_skipping = self._is_skipping or len(rest) > MAX_LINE
        self._rest = b"" if self._is_skipping else rest


class Relay:
    """Writes what a VMM logs into our log, so many lines a minute; what is more is counted.

    Args:
        sandbox_id: whose VMM.
        name: of the VMM.
        now: the time, in seconds.
    """

    def __init__(self, sandbox_id: str, name: str, now: Callable[[], float]) -> None:
        self._log = log.get().bind(sandbox=sandbox_id, vmm=name)
        self._now = now
        self._until = now() + _PERIOD_S
        self._left = _LINES_A_PERIOD
        self._unsaid = 0

    def take(self, line: bytes) -> None:
        """Log a line, or count it."""
        if self._now() >= self._until:
            self._until = self._now() + _PERIOD_S
            self._left, unsaid, self._unsaid = _LINES_A_PERIOD, self._unsaid, 0
            if unsaid:
                self._log.warning("the VMM logged more than is shown", lines=unsaid)
        if not self._left:
            self._unsaid += 1
            return
        self._left -= 1
        self._log.warning("the VMM says", said=text.readable(line[:_MAX_LOGGED_LINE].decode("utf-8", "replace")))
