"""Kata's agent protocol: the answer of ``StatsContainer``.

Field numbers and names: ``agent.proto`` of Kata Containers 4.1.0. Times are nanoseconds, sizes bytes. A module of its
own, since a guest loads it only when it is asked for statistics.

Our agent adds the counters of ``memory.events`` to ``MemoryStats.stats``, under their names behind :data:`EVENTS`.
"""

from __future__ import annotations

from common.protobuf import Message, boolean, map_of, message, messages, repeated, string, uint

NO_LIMIT = (1 << 64) - 1
"""A limit that is not set."""

EVENTS = "events."
OOM_KILLS = f"{EVENTS}oom_kill"


class CpuUsage(Message):
    """Time spent, as a whole and by mode."""

    total: int = uint(1)
    percpu: list[int] = repeated(uint(2))
    kernel: int = uint(3)
    user: int = uint(4)


class ThrottlingData(Message):
    """How often a quota has stopped the container."""

    periods: int = uint(1)
    throttled_periods: int = uint(2)
    throttled_time: int = uint(3)


class CpuStats(Message):
    """The processor."""

    cpu_usage: CpuUsage | None = message(1, CpuUsage)
    throttling_data: ThrottlingData | None = message(2, ThrottlingData)


class PidsStats(Message):
    """Processes and threads; a limit of 0 is none."""

    current: int = uint(1)
    limit: int = uint(2)


class MemoryData(Message):
    """Use and limit of one kind of memory."""

    usage: int = uint(1)
    max_usage: int = uint(2)
    failcnt: int = uint(3)
    limit: int = uint(4)


class MemoryStats(Message):
    """Memory; ``stats`` has what the guest's kernel says in ``memory.stat``."""

    cache: int = uint(1)
    usage: MemoryData | None = message(2, MemoryData)
    swap_usage: MemoryData | None = message(3, MemoryData)
    kernel_usage: MemoryData | None = message(4, MemoryData)
    use_hierarchy: bool = boolean(5)
    stats: dict[str, int] = map_of(6, uint(2))


class BlkioStatsEntry(Message):
    """A number of one block device."""

    major: int = uint(1)
    minor: int = uint(2)
    op: str = string(3)
    value: int = uint(4)


class BlkioStats(Message):
    """Bytes and requests; cgroup v1 has six lists more, a guest with cgroup v2 has not."""

    io_service_bytes_recursive: list[BlkioStatsEntry] = messages(1, BlkioStatsEntry)
    io_serviced_recursive: list[BlkioStatsEntry] = messages(2, BlkioStatsEntry)


class HugetlbStats(Message):
    """Huge pages of one size."""

    usage: int = uint(1)
    max_usage: int = uint(2)
    failcnt: int = uint(3)


class CgroupStats(Message):
    """All that is counted for a cgroup; huge pages by their size, such as ``2MB``."""

    cpu_stats: CpuStats | None = message(1, CpuStats)
    memory_stats: MemoryStats | None = message(2, MemoryStats)
    pids_stats: PidsStats | None = message(3, PidsStats)
    blkio_stats: BlkioStats | None = message(4, BlkioStats)
    hugetlb_stats: dict[str, HugetlbStats | None] = map_of(5, message(2, HugetlbStats))


class NetworkStats(Message):
    """An interface of the guest."""

    name: str = string(1)
    rx_bytes: int = uint(2)
    rx_packets: int = uint(3)
    rx_errors: int = uint(4)
    rx_dropped: int = uint(5)
    tx_bytes: int = uint(6)
    tx_packets: int = uint(7)
    tx_errors: int = uint(8)
    tx_dropped: int = uint(9)


class StatsContainerResponse(Message):
    """``StatsContainer``."""

    cgroup_stats: CgroupStats | None = message(1, CgroupStats)
    network_stats: list[NetworkStats] = messages(2, NetworkStats)
