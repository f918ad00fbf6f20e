"""What a container has used: files of its cgroup, and the guest's interfaces, in the form of the agent protocol.

Loaded when somebody asks. A file that is not there, since a controller is not or the container does not run, counts as
zeros. Formats: https://docs.kernel.org/admin-guide/cgroup-v2.html and proc_pid_net(5).
"""

from __future__ import annotations

import posix

from common.protocols.stats import (
    EVENTS,
    NO_LIMIT,
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
from guest.agent.cgroup import read_numbers
from guest.agent.files import read_text

_NS_PER_US = 1000
_IO_BYTES = (("rbytes", "Read"), ("wbytes", "Write"), ("dbytes", "Discard"))
_IO_REQUESTS = (("rios", "Read"), ("wios", "Write"), ("dios", "Discard"))
_INTERFACE = (
    ("rx_bytes", 0), ("rx_packets", 1), ("rx_errors", 2), ("rx_dropped", 3),
    ("tx_bytes", 8), ("tx_packets", 9), ("tx_errors", 10), ("tx_dropped", 11),
)  # fmt: skip
"""Fields of :class:`NetworkStats` and the columns of /proc/net/dev that have them."""


def read(cgroup: str) -> StatsContainerResponse:
    """Return the statistics of the container whose cgroup's directory is given."""
    pids = PidsStats(current=_number(f"{cgroup}/pids.current"), limit=_number(f"{cgroup}/pids.max", no_limit=0))
    stats = CgroupStats(
        cpu_stats=_cpu(cgroup),
        memory_stats=_memory(cgroup),
        pids_stats=pids,
        blkio_stats=_io(cgroup),
        hugetlb_stats=_hugetlb(cgroup),
    )
    return StatsContainerResponse(cgroup_stats=stats, network_stats=_network())


def _cpu(cgroup: str) -> CpuStats:
    stat = read_numbers(read_text(f"{cgroup}/cpu.stat"))
    return CpuStats(
        cpu_usage=CpuUsage(
            total=stat.get("usage_usec", 0) * _NS_PER_US,
            kernel=stat.get("system_usec", 0) * _NS_PER_US,
            user=stat.get("user_usec", 0) * _NS_PER_US,
        ),
        throttling_data=ThrottlingData(
            periods=stat.get("nr_periods", 0),
            throttled_periods=stat.get("nr_throttled", 0),
            throttled_time=stat.get("throttled_usec", 0) * _NS_PER_US,
        ),
    )


def _memory(cgroup: str) -> MemoryStats:
    stats = read_numbers(read_text(f"{cgroup}/memory.stat"))
    events = read_numbers(read_text(f"{cgroup}/memory.events"))
    usage = _memory_data(f"{cgroup}/memory")
    usage.failcnt = events.get("max", 0)
    return MemoryStats(
        cache=stats.get("file", 0),
        usage=usage,
        swap_usage=_memory_data(f"{cgroup}/memory.swap"),
        kernel_usage=MemoryData(usage=stats.get("kernel", 0)),
        use_hierarchy=True,
        stats={**stats, **{EVENTS + name: count for name, count in events.items()}},
    )


def _memory_data(prefix: str) -> MemoryData:
    return MemoryData(
        usage=_number(f"{prefix}.current"),
        max_usage=_number(f"{prefix}.peak"),
        limit=_number(f"{prefix}.max", no_limit=NO_LIMIT),
    )


def _io(cgroup: str) -> BlkioStats:
    stats = BlkioStats()
    lists = (stats.io_service_bytes_recursive, _IO_BYTES), (stats.io_serviced_recursive, _IO_REQUESTS)
    for line in read_text(f"{cgroup}/io.stat").splitlines():
        device, *pairs = line.split()
        major, minor = map(int, device.split(":"))
        numbers = {key: int(value) for key, _, value in (pair.partition("=") for pair in pairs)}
        for entries, columns in lists:
            entries += [
                BlkioStatsEntry(major=major, minor=minor, op=name, value=numbers.get(key, 0)) for key, name in columns
            ]
    return stats


def _hugetlb(cgroup: str) -> dict[str, HugetlbStats | None]:
    """Return the use of huge pages by their size, from files such as ``hugetlb.2MB.current``."""
    try:
        names = posix.listdir(cgroup)
    except FileNotFoundError:
        return {}
    sizes = [name.split(".")[1] for name in names if name.startswith("hugetlb.") and name.endswith("B.current")]
    return {
        size: HugetlbStats(
            usage=_number(f"{cgroup}/hugetlb.{size}.current"),
            failcnt=read_numbers(read_text(f"{cgroup}/hugetlb.{size}.events")).get("max", 0),
        )
        for size in sizes
    }


def _network() -> list[NetworkStats]:
    """Return the numbers of every interface but the loopback; containers share the guest's."""
    found = []
    for line in read_text("/proc/self/net/dev").splitlines()[2:]:
        name, _, columns = line.partition(":")
        numbers = list(map(int, columns.split()))
        if name.strip() != "lo":
            found.append(NetworkStats(name=name.strip(), **{field: numbers[column] for field, column in _INTERFACE}))
    return found


def _number(path: str, no_limit: int = 0) -> int:
    """Return the number in a file, ``no_limit`` for "max", 0 for a file that is not there."""
    text = read_text(path).strip() or "0"
    return no_limit if text == "max" else int(text)
