"""``GetMetrics``: the guest as its kernel counts it, under upstream's names (docs/design/kata-2-0-metrics.md of Kata).

Prometheus' text format: https://prometheus.io/docs/instrumenting/exposition_formats. All but the count are gauges.
"""

from __future__ import annotations

import posix

from common.protocols.guest import Metrics
from guest.agent.files import read_text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from common.protocols.agent import Empty
    from guest.agent.rpc import Call

    Sample = tuple[str, str]
    """Labels as they are written, and the value."""

_CPU = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal", "guest", "guest_nice")
_DISK = (
    "reads", "merged", "sectors_read", "time_reading", "writes", "writes_merged", "sectors_written", "time_writing",
    "in_progress", "time_in_progress", "weighted_time_in_progress", "discards", "discards_merged", "sectors_discarded",
    "time_discarding", "flushes", "time_flushing",
)  # fmt: skip
_NETDEV = (
    "recv_bytes", "recv_packets", "recv_errs", "recv_drop", "recv_fifo", "recv_frame", "recv_compressed",
    "recv_multicast", "sent_bytes", "sent_packets", "sent_errs", "sent_drop", "sent_fifo", "sent_colls",
    "sent_carrier", "sent_compressed",
)  # fmt: skip
"""Columns of /proc/stat, /proc/diskstats and /proc/net/dev (proc(5), Documentation/admin-guide/iostats.rst)."""

_scrapes = 0


def get_metrics(_request: Empty, _call: Call) -> Metrics:
    """Return all of them as text."""
    global _scrapes  # noqa: PLW0603 - a counter of this process
    _scrapes += 1
    families = {
        "kata_agent_scrape_count": (("", str(_scrapes)),),
        "kata_agent_total_rss": _agent_rss(),
        "kata_guest_load": _load(),
        "kata_guest_tasks": _tasks(),
        "kata_guest_cpu_time": _cpu_time(),
        "kata_guest_vm_stat": _vm_stat(),
        "kata_guest_meminfo": _meminfo(),
        "kata_guest_diskstat": _diskstat(),
        "kata_guest_netdev_stat": _netdev(),
    }
    lines = []
    for name, samples in families.items():
        kind = "counter" if name.endswith("_count") else "gauge"
        lines.append(f"# TYPE {name} {kind}\n")
        lines += [f"{name}{labels} {value}\n" for labels, value in samples]
    return Metrics(metrics="".join(lines))


def _agent_rss() -> Iterator[Sample]:
    pages = int(read_text("/proc/self/statm").split()[1])
    yield "", str(pages * posix.sysconf("SC_PAGESIZE"))


def _load() -> Iterator[Sample]:
    values = read_text("/proc/loadavg").split()
    return _items(("load1", "load5", "load15"), values)


def _tasks() -> Iterator[Sample]:
    current = read_text("/proc/loadavg").split()[3].partition("/")[2]
    return _items(("cur", "max"), (current, read_text("/proc/sys/kernel/threads-max").strip()))


def _cpu_time() -> Iterator[Sample]:
    for line in read_text("/proc/stat").splitlines():
        name, *values = line.split()
        if name.startswith("cpu"):
            yield from _items(_CPU, values, f'cpu="{name[3:] or "total"}",')


def _vm_stat() -> Iterator[Sample]:
    for line in read_text("/proc/vmstat").splitlines():
        name, value = line.split()
        yield from _items([name], [value])


def _meminfo() -> Iterator[Sample]:
    for line in read_text("/proc/meminfo").splitlines():
        name, value, *unit = line.replace(":", " ").split()
        number = int(value) * (1024 if unit else 1)
        yield from _items([_snake(name)], [str(number)])


def _diskstat() -> Iterator[Sample]:
    for line in read_text("/proc/diskstats").splitlines():
        _major, _minor, name, *values = line.split()
        yield from _items(_DISK, values, f'disk="{name}",')


def _netdev() -> Iterator[Sample]:
    for line in read_text("/proc/net/dev").splitlines()[2:]:
        name, _, values = line.partition(":")
        yield from _items(_NETDEV, values.split(), f'interface="{name.strip()}",')


def _items(names: Sequence[str], values: Sequence[str], labels: str = "") -> Iterator[Sample]:
    for name, value in zip(names, values, strict=False):  # newer kernels add columns
        yield f'{{{labels}item="{name}"}}', value


def _snake(name: str) -> str:
    """Return a name of /proc/meminfo as upstream writes it: ``mem_total`` for ``MemTotal``."""
    text = name.replace("(", "_").replace(")", "")
    parts = []
    for before, letter in zip(" " + text, text, strict=False):
        if letter.isupper() and before.islower():
            parts.append("_")
        parts.append(letter.lower())
    return "".join(parts)
