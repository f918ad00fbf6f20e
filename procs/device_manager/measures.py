"""What the device manager shows to Prometheus: how many devices, how busy, how fast.

Counts are read from the live table when they are asked for; only what has passed (durations, losses) is kept.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from common.services.health import Family, Sample

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric

    from procs.device_manager.lives import Lives

_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""From an attach that finds its device plugged to a guest that does not let go."""


class Measures(Collector):
    """Keeps account of the operations, and counts what there is."""

    def __init__(self, lives: Lives) -> None:
        self._lives = lives
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._seconds = Histogram(
            "kata_device_operation_seconds",
            "Time of an attach until its device is plugged, or of a detach until its removal is confirmed.",
            ["operation", "hypervisor", "kind", "outcome"],
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        self._in_flight = Gauge(
            "kata_device_operations_in_flight", "Operations not yet answered.", ["operation"], registry=self._registry
        )

    @contextmanager
    def timed(self, operation: str, hypervisor: str, kind: str) -> Iterator[None]:
        """Take the time of an operation, whose outcome is ``ok`` or the name of the error."""
        began, outcome = time.monotonic(), "ok"
        try:
            with self._in_flight.labels(operation).track_inprogress():
                yield
        except BaseException as err:
            outcome = type(err).__name__
            raise
        finally:
            self._seconds.labels(operation, hypervisor, kind, outcome).observe(time.monotonic() - began)

    def collect(self) -> Iterator[Metric]:
        """Count what there is now."""
        devices = GaugeMetricFamily("kata_device_count", "Devices by state.", labels=["state"])
        for state, count in self._lives.table.counts().items():
            devices.add_metric([state], count)
        yield devices
        yield CounterMetricFamily("kata_device_lost", "Devices that vanished unasked.", value=self._lives.lost)
        yield GaugeMetricFamily(
            "kata_device_queue_length", "Commands of all sandboxes not yet done.", value=self._lives.commands.waiting
        )

    def families(self) -> tuple[Family, ...]:
        """Return every metric with its values."""
        return tuple(
            Family(name=metric.name, help=metric.documentation, kind=metric.type, samples=tuple(_samples(metric)))
            for metric in self._registry.collect()
        )


def _samples(metric: Metric) -> Iterator[Sample]:
    for sample in metric.samples:
        if not sample.name.endswith("_created"):  # when a series began, which nobody reads
            yield Sample(name=sample.name, labels=dict(sample.labels), value=sample.value)
