"""What the guest says a container has used, in the form that containerd expects: that of the host's cgroups. Pure.

The guest has cgroup v2. For a host with v1, whose containerd takes nothing else, the numbers go to the fields that v1
has for them; what v1 counts and v2 does not is zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.protocols import metrics as form
from common.protocols.stats import (
    EVENTS,
    OOM_KILLS,
    BlkioStats,
    BlkioStatsEntry,
    CgroupStats,
    CpuStats,
    CpuUsage,
    MemoryData,
    MemoryStats,
    PidsStats,
    ThrottlingData,
)
from common.protocols.task import Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from common.protocols.stats import StatsContainerResponse

_NS_PER_US = 1000
_U64_MAX = (1 << 64) - 1
_V1_NO_LIMIT = 0x7FFF_FFFF_FFFF_F000
"""What ``memory.limit_in_bytes`` says when there is none: the largest number of whole pages."""


def any_of(stats: StatsContainerResponse) -> Any:
    """Return the metrics as containerd on this host takes them."""
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():  # only the root of cgroup2 has it
        return Any(type_url=form.V2_URL, value=v2(stats).encode())
    return Any(type_url=form.V1_URL, value=v1(stats).encode())


def v1(stats: StatsContainerResponse) -> form.MetricsV1:
    """Return the form of cgroup v1."""
    cgroup = stats.cgroup_stats or CgroupStats()
    pids = cgroup.pids_stats or PidsStats()
    return form.MetricsV1(
        hugetlb=[
            form.HugetlbStat(usage=pages.usage, max=pages.max_usage, failcnt=pages.failcnt, pagesize=size)
            for size, pages in cgroup.hugetlb_stats.items()
            if pages
        ],
        pids=form.PidsStat(current=pids.current, limit=pids.limit),
        cpu=_cpu_v1(cgroup.cpu_stats or CpuStats()),
        memory=_memory_v1(cgroup.memory_stats or MemoryStats()),
        blkio=_blkio_v1(cgroup.blkio_stats or BlkioStats()),
        network=_network(stats),
        memory_oom_control=form.MemoryOomControl(oom_kill=_counter(cgroup, OOM_KILLS)),
    )


def v2(stats: StatsContainerResponse) -> form.MetricsV2:
    """Return the form of cgroup v2."""
    cgroup = stats.cgroup_stats or CgroupStats()
    pids = cgroup.pids_stats or PidsStats()
    events = {field.name: _counter(cgroup, EVENTS + field.name) for field in form.MemoryEvents.fields()}
    return form.MetricsV2(
        pids=form.PidsStat(current=pids.current, limit=pids.limit or _U64_MAX),
        cpu=_cpu_v2(cgroup.cpu_stats or CpuStats()),
        memory=_memory_v2(cgroup.memory_stats or MemoryStats()),
        io=_io_v2(cgroup.blkio_stats or BlkioStats()),
        hugetlb=[
            form.HugeTlbStatV2(current=pages.usage, max=pages.max_usage, pagesize=size)
            for size, pages in cgroup.hugetlb_stats.items()
            if pages
        ],
        memory_events=form.MemoryEvents(**events),
        network=_network(stats),
    )


def _cpu_v1(cpu: CpuStats) -> form.CPUStat:
    usage, throttling = cpu.cpu_usage or CpuUsage(), cpu.throttling_data or ThrottlingData()
    return form.CPUStat(
        usage=form.CPUUsage(total=usage.total, kernel=usage.kernel, user=usage.user),
        throttling=form.Throttle(
            periods=throttling.periods,
            throttled_periods=throttling.throttled_periods,
            throttled_time=throttling.throttled_time,
        ),
    )


def _cpu_v2(cpu: CpuStats) -> form.CPUStatV2:
    usage, throttling = cpu.cpu_usage or CpuUsage(), cpu.throttling_data or ThrottlingData()
    return form.CPUStatV2(
        usage_usec=usage.total // _NS_PER_US,
        user_usec=usage.user // _NS_PER_US,
        system_usec=usage.kernel // _NS_PER_US,
        nr_periods=throttling.periods,
        nr_throttled=throttling.throttled_periods,
        throttled_usec=throttling.throttled_time // _NS_PER_US,
    )


def _memory_v1(memory: MemoryStats) -> form.MemoryStat:
    """An agent in a guest with cgroup v1 names the totals itself."""
    stats = memory.stats
    cache, rss = memory.cache, stats.get("rss", stats.get("anon", 0))
    faults, major_faults = stats.get("pgfault", 0), stats.get("pgmajfault", 0)
    inactive = stats.get("inactive_file", 0)
    return form.MemoryStat(
        cache=cache,
        rss=rss,
        pg_fault=faults,
        pg_maj_fault=major_faults,
        inactive_file=inactive,
        hierarchical_memory_limit=_entry_v1(memory.usage).limit,
        total_cache=stats.get("total_cache", cache),
        total_rss=stats.get("total_rss", rss),
        total_pg_fault=stats.get("total_pgfault", faults),
        total_pg_maj_fault=stats.get("total_pgmajfault", major_faults),
        total_inactive_file=stats.get("total_inactive_file", inactive),
        usage=_entry_v1(memory.usage),
        swap=_entry_v1(memory.swap_usage),
        kernel=_entry_v1(memory.kernel_usage),
        kernel_tcp=form.MemoryEntry(),
    )


def _entry_v1(data: MemoryData | None) -> form.MemoryEntry:
    data = data or MemoryData()
    limit = min(data.limit, _V1_NO_LIMIT)
    return form.MemoryEntry(limit=limit, usage=data.usage, max=data.max_usage, failcnt=data.failcnt)


def _memory_v2(memory: MemoryStats) -> form.MemoryStatV2:
    """The keys of ``memory.stat`` are the names of the fields."""
    usage, swap = memory.usage or MemoryData(), memory.swap_usage or MemoryData()
    told = form.MemoryStatV2(usage=usage.usage, usage_limit=usage.limit, swap_usage=swap.usage, swap_limit=swap.limit)
    for field in told.fields():
        if field.name in memory.stats:
            setattr(told, field.name, memory.stats[field.name])
    return told


def _blkio_v1(blkio: BlkioStats) -> form.BlkIOStat:
    return form.BlkIOStat(
        io_service_bytes_recursive=_entries_v1(blkio.io_service_bytes_recursive),
        io_serviced_recursive=_entries_v1(blkio.io_serviced_recursive),
    )


def _entries_v1(entries: Iterable[BlkioStatsEntry]) -> list[form.BlkIOEntry]:
    return [form.BlkIOEntry(op=e.op, major=e.major, minor=e.minor, value=e.value) for e in entries]


def _io_v2(blkio: BlkioStats) -> form.IOStat:
    devices: dict[tuple[int, int], form.IOEntry] = {}
    for entries, columns in (
        (blkio.io_service_bytes_recursive, {"Read": "rbytes", "Write": "wbytes"}),
        (blkio.io_serviced_recursive, {"Read": "rios", "Write": "wios"}),
    ):
        for entry in entries:
            key = (entry.major, entry.minor)
            device = devices.setdefault(key, form.IOEntry(major=entry.major, minor=entry.minor))
            if entry.op in columns:
                setattr(device, columns[entry.op], entry.value)
    return form.IOStat(usage=list(devices.values()))


def _network(stats: StatsContainerResponse) -> list[form.NetworkStat]:
    return [form.NetworkStat(**vars(interface)) for interface in stats.network_stats]


def _counter(cgroup: CgroupStats, name: str) -> int:
    return cgroup.memory_stats.stats.get(name, 0) if cgroup.memory_stats else 0
