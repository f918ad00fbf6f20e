"""What the guest counted, in both of containerd's forms."""

from __future__ import annotations

from common.protocols.stats import (
    NO_LIMIT,
    OOM_KILLS,
    BlkioStats,
    BlkioStatsEntry,
    CgroupStats,
    CpuStats,
    CpuUsage,
    HugetlbStats,
    MemoryData,
    MemoryStats,
    NetworkStats,
    PidsStats,
    StatsContainerResponse,
    ThrottlingData,
)
from procs.shim import metrics

COUNTED = StatsContainerResponse(
    cgroup_stats=CgroupStats(
        cpu_stats=CpuStats(
            cpu_usage=CpuUsage(total=9_000, kernel=3_000, user=6_000),
            throttling_data=ThrottlingData(periods=5, throttled_periods=2, throttled_time=7_000),
        ),
        memory_stats=MemoryStats(
            cache=40,
            usage=MemoryData(usage=100, max_usage=150, failcnt=1, limit=200),
            swap_usage=MemoryData(usage=10, limit=NO_LIMIT),
            stats={"anon": 60, "file": 40, "inactive_file": 15, "pgfault": 11, "pgmajfault": 2, OOM_KILLS: 3},
        ),
        pids_stats=PidsStats(current=4, limit=0),
        blkio_stats=BlkioStats(
            io_service_bytes_recursive=[
                BlkioStatsEntry(major=254, minor=0, op="Read", value=512),
                BlkioStatsEntry(major=254, minor=0, op="Write", value=1024),
                BlkioStatsEntry(major=254, minor=0, op="Discard", value=1),
            ],
            io_serviced_recursive=[BlkioStatsEntry(major=254, minor=0, op="Read", value=1)],
        ),
        hugetlb_stats={"2MB": HugetlbStats(usage=6, max_usage=7, failcnt=8)},
    ),
    network_stats=[NetworkStats(name="eth0", rx_bytes=1, tx_dropped=8)],
)


def test_the_form_of_cgroup_v1() -> None:
    told = metrics.v1(COUNTED)
    assert told.cpu is not None
    assert told.cpu.usage is not None
    assert (told.cpu.usage.total, told.cpu.usage.kernel, told.cpu.usage.user) == (9_000, 3_000, 6_000)
    assert told.cpu.throttling is not None
    assert vars(told.cpu.throttling) == {"periods": 5, "throttled_periods": 2, "throttled_time": 7_000}
    memory = told.memory
    assert memory is not None
    assert (memory.cache, memory.rss, memory.total_inactive_file) == (40, 60, 15)
    assert (memory.total_pg_fault, memory.total_pg_maj_fault) == (11, 2)
    assert memory.usage is not None
    assert vars(memory.usage) == {"limit": 200, "usage": 100, "max": 150, "failcnt": 1}
    assert memory.swap is not None
    assert memory.swap.limit == 0x7FFF_FFFF_FFFF_F000
    assert told.pids is not None
    assert (told.pids.current, told.pids.limit) == (4, 0)
    assert told.blkio is not None
    assert [entry.value for entry in told.blkio.io_service_bytes_recursive] == [512, 1024, 1]
    assert [vars(pages) for pages in told.hugetlb] == [{"usage": 6, "max": 7, "failcnt": 8, "pagesize": "2MB"}]
    assert told.memory_oom_control is not None
    assert told.memory_oom_control.oom_kill == 3
    assert [(interface.name, interface.rx_bytes, interface.tx_dropped) for interface in told.network] == [
        ("eth0", 1, 8)
    ]


def test_the_form_of_cgroup_v2() -> None:
    told = metrics.v2(COUNTED)
    assert told.cpu is not None
    assert (told.cpu.usage_usec, told.cpu.user_usec, told.cpu.system_usec) == (9, 6, 3)
    assert (told.cpu.nr_periods, told.cpu.nr_throttled, told.cpu.throttled_usec) == (5, 2, 7)
    memory = told.memory
    assert memory is not None
    assert (memory.anon, memory.file, memory.inactive_file, memory.pgfault) == (60, 40, 15, 11)
    assert (memory.usage, memory.usage_limit, memory.swap_usage, memory.swap_limit) == (100, 200, 10, NO_LIMIT)
    assert told.pids is not None
    assert (told.pids.current, told.pids.limit) == (4, NO_LIMIT)
    assert told.io is not None
    assert [vars(device) for device in told.io.usage] == [
        {"major": 254, "minor": 0, "rbytes": 512, "wbytes": 1024, "rios": 1, "wios": 0}
    ]
    assert told.memory_events is not None
    assert told.memory_events.oom_kill == 3
    assert [interface.name for interface in told.network] == ["eth0"]


def test_nothing_counted_is_zeros_and_not_nothing() -> None:
    """ctr reads ``cpu.usage`` and ``memory.usage`` without looking whether they are there."""
    told = metrics.v1(StatsContainerResponse())
    assert told.cpu is not None
    assert told.cpu.usage is not None
    assert told.memory is not None
    assert told.memory.usage is not None
    assert metrics.v2(StatsContainerResponse()).memory is not None
