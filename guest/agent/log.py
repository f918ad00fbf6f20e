"""Log lines, one JSON object each, on the console of the VM; the host keeps its last part."""

from __future__ import annotations

import posix
import time

from guest.agent.json_text import dumps

_CONSOLE = 2


def log(level: str, event: str, **fields: object) -> None:
    """Write one record: ``level`` is error, warning or info; fields are plain values."""
    record = {"t": f"{time.monotonic():.3f}", "level": level, "event": event, **fields}
    posix.write(_CONSOLE, dumps(record).encode() + b"\n")
