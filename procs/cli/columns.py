"""Text in columns, for people."""

from __future__ import annotations

import time
from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_UNITS = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))


def aligned(rows: Iterable[Sequence[str]]) -> str:
    """Return rows whose cells stand below one another; what a terminal would obey is ``?`` and nothing is ``-``."""
    cells = [[_shown(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip_longest(*cells, fillvalue="")]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in cells)
    return "\n".join(line.rstrip() for line in lines)


def age(since: float, now: float) -> str:
    """Return how long ago something was, in its two largest units, for example ``2h 5m``."""
    parts: list[str] = []
    seconds = max(0, int(now - since))
    for unit, size in _UNITS:
        if seconds >= size or (unit == "s" and not parts):
            parts.append(f"{seconds // size}{unit}")
            seconds %= size
    return " ".join(parts[:2])


def moment(at: float) -> str:
    """Return a time as logs have it: UTC, to the millisecond."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at * 1000) % 1000:03d}Z"


def _shown(cell: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in cell) or "-"
