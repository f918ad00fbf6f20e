"""containerd's metrics of a task, in the form of cgroup v1 and in that of v2, as far as a VM has them.

Field numbers: containerd/cgroups v1.1.0 ``stats/v1/metrics.proto`` and ``v2/stats/metrics.proto``.
"""

from __future__ import annotations

from common.protobuf import Message, message, messages, string, uint

V1_URL = "io.containerd.cgroups.v1.Metrics"
V2_URL = "io.containerd.cgroups.v2.Metrics"


class NetworkStat(Message):
    """An interface; both forms have the same."""

    name: str = string(1)
    rx_bytes: int = uint(2)
    rx_packets: int = uint(3)
    rx_errors: int = uint(4)
    rx_dropped: int = uint(5)
    tx_bytes: int = uint(6)
    tx_packets: int = uint(7)
    tx_errors: int = uint(8)
    tx_dropped: int = uint(9)


class PidsStat(Message):
    """Processes and threads; both forms have the same."""

    current: int = uint(1)
    limit: int = uint(2)


class CPUUsage(Message):
    """Nanoseconds."""

    total: int = uint(1)
    kernel: int = uint(2)
    user: int = uint(3)


class Throttle(Message):
    """How often a quota has stopped the container, and for how many nanoseconds."""

    periods: int = uint(1)
    throttled_periods: int = uint(2)
    throttled_time: int = uint(3)


class CPUStat(Message):
    """The processor."""

    usage: CPUUsage | None = message(1, CPUUsage)
    throttling: Throttle | None = message(2, Throttle)


class MemoryEntry(Message):
    """Use and limit of one kind of memory, in bytes."""

    limit: int = uint(1)
    usage: int = uint(2)
    max: int = uint(3)
    failcnt: int = uint(4)


class MemoryStat(Message):
    """Memory in bytes; a total includes the cgroups below."""

    cache: int = uint(1)
    rss: int = uint(2)
    pg_fault: int = uint(9)
    pg_maj_fault: int = uint(10)
    inactive_file: int = uint(13)
    hierarchical_memory_limit: int = uint(16)
    total_cache: int = uint(18)
    total_rss: int = uint(19)
    total_pg_fault: int = uint(26)
    total_pg_maj_fault: int = uint(27)
    total_inactive_file: int = uint(30)
    usage: MemoryEntry | None = message(33, MemoryEntry)
    swap: MemoryEntry | None = message(34, MemoryEntry)
    kernel: MemoryEntry | None = message(35, MemoryEntry)
    kernel_tcp: MemoryEntry | None = message(36, MemoryEntry)


class BlkIOEntry(Message):
    """A number of one block device."""

    op: str = string(1)
    device: str = string(2)
    major: int = uint(3)
    minor: int = uint(4)
    value: int = uint(5)


class BlkIOStat(Message):
    """Bytes and requests."""

    io_service_bytes_recursive: list[BlkIOEntry] = messages(1, BlkIOEntry)
    io_serviced_recursive: list[BlkIOEntry] = messages(2, BlkIOEntry)


class HugetlbStat(Message):
    """Huge pages of one size, in bytes."""

    usage: int = uint(1)
    max: int = uint(2)
    failcnt: int = uint(3)
    pagesize: str = string(4)


class MemoryOomControl(Message):
    """Whether and how often memory ran out."""

    oom_kill_disable: int = uint(1)
    under_oom: int = uint(2)
    oom_kill: int = uint(3)


class MetricsV1(Message):
    """``io.containerd.cgroups.v1.Metrics``."""

    hugetlb: list[HugetlbStat] = messages(1, HugetlbStat)
    pids: PidsStat | None = message(2, PidsStat)
    cpu: CPUStat | None = message(3, CPUStat)
    memory: MemoryStat | None = message(4, MemoryStat)
    blkio: BlkIOStat | None = message(5, BlkIOStat)
    network: list[NetworkStat] = messages(7, NetworkStat)
    memory_oom_control: MemoryOomControl | None = message(9, MemoryOomControl)


class CPUStatV2(Message):
    """Microseconds."""

    usage_usec: int = uint(1)
    user_usec: int = uint(2)
    system_usec: int = uint(3)
    nr_periods: int = uint(4)
    nr_throttled: int = uint(5)
    throttled_usec: int = uint(6)


class MemoryStatV2(Message):
    """Memory in bytes: keys of ``memory.stat``, then use and limits."""

    anon: int = uint(1)
    file: int = uint(2)
    kernel_stack: int = uint(3)
    slab: int = uint(4)
    sock: int = uint(5)
    shmem: int = uint(6)
    file_mapped: int = uint(7)
    file_dirty: int = uint(8)
    file_writeback: int = uint(9)
    anon_thp: int = uint(10)
    inactive_anon: int = uint(11)
    active_anon: int = uint(12)
    inactive_file: int = uint(13)
    active_file: int = uint(14)
    unevictable: int = uint(15)
    slab_reclaimable: int = uint(16)
    slab_unreclaimable: int = uint(17)
    pgfault: int = uint(18)
    pgmajfault: int = uint(19)
    usage: int = uint(32)
    usage_limit: int = uint(33)
    swap_usage: int = uint(34)
    swap_limit: int = uint(35)


class MemoryEvents(Message):
    """Counters of ``memory.events``."""

    low: int = uint(1)
    high: int = uint(2)
    max: int = uint(3)
    oom: int = uint(4)
    oom_kill: int = uint(5)


class IOEntry(Message):
    """Bytes and requests of one block device."""

    major: int = uint(1)
    minor: int = uint(2)
    rbytes: int = uint(3)
    wbytes: int = uint(4)
    rios: int = uint(5)
    wios: int = uint(6)


class IOStat(Message):
    """Block devices."""

    usage: list[IOEntry] = messages(1, IOEntry)


class HugeTlbStatV2(Message):
    """Huge pages of one size, in bytes."""

    current: int = uint(1)
    max: int = uint(2)
    pagesize: str = string(3)


class MetricsV2(Message):
    """``io.containerd.cgroups.v2.Metrics``."""

    pids: PidsStat | None = message(1, PidsStat)
    cpu: CPUStatV2 | None = message(2, CPUStatV2)
    memory: MemoryStatV2 | None = message(4, MemoryStatV2)
    io: IOStat | None = message(6, IOStat)
    hugetlb: list[HugeTlbStatV2] = messages(7, HugeTlbStatV2)
    memory_events: MemoryEvents | None = message(8, MemoryEvents)
    network: list[NetworkStat] = messages(9, NetworkStat)
