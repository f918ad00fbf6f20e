"""Named points in the code at which a test ends the process: ``PYKATA_TRACE=add:answered:kill``.

The value is a list, separated by commas, of ``<point>:kill`` or ``<point>:kill:<n>``: the process ends by SIGKILL when
it reaches the point, or reaches it for the n-th time. What comes after must cope with whatever that leaves behind.
Without the variable a point is a call of an empty function.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

VARIABLE = "PYKATA_TRACE"


def reach(point: str) -> None:
    """Note that a point is reached, which usually means nothing."""


def _parse(value: str) -> dict[str, int]:
    """Return each point's number of the time that is to be the last.

    Raises:
        ValueError: an entry is no ``<point>:kill`` or ``<point>:kill:<n>``.
    """
    points = {}
    for entry in filter(None, value.split(",")):
        point, kill, number = f"{entry}:".partition(":kill:")
        if not point or not kill:
            raise ValueError(f"{VARIABLE}: {entry!r} is no <point>:kill or <point>:kill:<n>")
        points[point] = int(number.rstrip(":") or 1)
    return points


_fatal = _parse(os.environ.get(VARIABLE, ""))
_reached: Counter[str] = Counter()


def _reach(point: str) -> None:
    _reached[point] += 1
    if _reached[point] == _fatal.get(point):
        os.kill(os.getpid(), signal.SIGKILL)


if _fatal:
    reach = _reach
