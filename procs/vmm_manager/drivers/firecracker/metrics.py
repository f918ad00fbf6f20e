"""What Firecracker counts of itself, as it writes it into its metrics FIFO: a JSON object a line, once a minute.

::

    {"utc_timestamp_ms": 1764012345678, "api_server": {"process_startup_time_us": 52000, …}, "vcpu": {"exit_io_in": 3,
     …, "exit_io_in_agg": {"min_us": 1, …}}, "block": {…}, "block_disk_1": {…}, …}

Groups and names are Firecracker's own, most count since the flush before; what comes next takes the place of what was.
Shown are the groups that upstream shows (Kata Containers, ``fc_metrics.go``) and the entropy device. Those of single
devices are not: each attached disk is a new one.

Firecracker runs as somebody else and its guest is hostile, so what is no number is left out, and a group is bounded.

Source: src/vmm/src/logger/metrics.rs and docs/metrics.md of Firecracker; the period is ``WRITE_METRICS_PERIOD_MS``.
"""

from __future__ import annotations

import json
import re
from typing import Any

GROUPS = frozenset(
    (
        *("api_server", "get_api_requests", "put_api_requests", "patch_api_requests", "latencies_us", "logger", "mmds"),
        *("block", "net", "vsock", "entropy", "i8042", "rtc", "uart", "vcpu", "vmm", "seccomp", "signals"),
    )
)
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_MAX_ITEMS = 128
"""Of a group; Firecracker 1.16 has fewer than 40 in its largest."""
_MAX_VALUE = 1 << 64

Counters = dict[str, dict[str, int]]
"""Values by group and name."""


def counters(line: bytes) -> Counters | None:
    """Return what a line says; None if it is none of Firecracker's, for example because it was cut."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict):
        return None
    return {group: _items(said[group]) for group in GROUPS & said.keys()}


def _items(group: Any) -> dict[str, int]:  # noqa: ANN401 - JSON of somebody else's
    pairs = list(group.items())[:_MAX_ITEMS] if isinstance(group, dict) else []
    return {name: value for name, value in pairs if _NAME.fullmatch(name) and _is_count(value)}


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_VALUE
