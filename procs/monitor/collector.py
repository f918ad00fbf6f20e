"""What was observed, as Prometheus metric families. Pure: an observation in, families out.

Names are upstream's where upstream has the metric (Kata Containers, ``docs/design/kata-2-0-metrics.md``):
``kata_shim_threads``, ``kata_hypervisor_fds``, ``kata_monitor_running_shim_count`` and so on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from procs.monitor.observation import Observation, ProcessSample

ROLES = {"service": "service", "shim": "sandbox_id", "hypervisor": "sandbox_id", "virtiofsd": "sandbox_id"}
"""Each kind of process, and the label that names its owner."""


def families(seen: Observation) -> Iterator[Metric]:
    """Yield every metric family of one observation."""
    yield GaugeMetricFamily("kata_monitor_running_shim_count", "Running shims.", value=len(seen.shims))
    yield from _services(seen)
    yield from _own(seen)
    yield from _sandboxes(seen)
    for role, label in ROLES.items():
        yield from _processes(role, label, [sample for sample in seen.processes if sample.role == role])


def _services(seen: Observation) -> Iterator[Metric]:
    up = GaugeMetricFamily("kata_service_up", "Whether the service answers.", labels=["service"])
    uptime = GaugeMetricFamily("kata_service_uptime_seconds", "Since the service began to answer.", labels=["service"])
    state = GaugeMetricFamily("kata_service_state", "What the service counts.", labels=["service", "item"])
    for service, health in seen.health.items():
        up.add_metric([service], 1 if health else 0)
        if health:
            uptime.add_metric([service], health.uptime_s)
            for item, value in health.gauges.items():
                state.add_metric([service, item], value)
    yield from (up, uptime, state)


def _sandboxes(seen: Observation) -> Iterator[Metric]:
    info = GaugeMetricFamily(
        "kata_sandbox_info", "A running sandbox.", labels=["sandbox_id", "hypervisor", "version", "accelerator"]
    )
    for vm in seen.vms:
        info.add_metric([vm.sandbox_id, vm.hypervisor, vm.version, vm.accelerator], 1)
    yield info


def _own(seen: Observation) -> Iterator[Metric]:
    """Yield what the services show of themselves; a label tells those apart that show the same."""
    shown: dict[str, Metric] = {}
    for service, health in seen.health.items():
        for family in health.metrics if health else ():
            metric = shown.setdefault(family.name, Metric(family.name, family.help, family.kind))
            for sample in family.samples:
                metric.add_sample(sample.name, {"service": service, **sample.labels}, sample.value)
    yield from shown.values()


def _processes(role: str, label: str, samples: Iterable[ProcessSample]) -> Iterator[Metric]:
    cpu = CounterMetricFamily(f"kata_{role}_cpu_seconds", "User and system CPU time.", labels=[label])
    rss = GaugeMetricFamily(f"kata_{role}_resident_memory_bytes", "Resident memory.", labels=[label])
    fds = GaugeMetricFamily(f"kata_{role}_fds", "Open file descriptors.", labels=[label])
    threads = GaugeMetricFamily(f"kata_{role}_threads", "Threads.", labels=[label])
    for sample in samples:
        cpu.add_metric([sample.owner], sample.cpu_s)
        rss.add_metric([sample.owner], sample.rss_bytes)
        fds.add_metric([sample.owner], sample.fds)
        threads.add_metric([sample.owner], sample.threads)
    yield from (cpu, rss, fds, threads)
