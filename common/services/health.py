"""What every service answers: is it alive, which process is it, what has it done."""

from __future__ import annotations

import msgspec

from common.bus.wire import Empty, Verb


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One value of a metric.

    Attributes:
        name: the family's name, for some kinds with a suffix, for example ``_bucket``.
        labels: what tells it from the family's other values.
        value: the value.
    """

    name: str
    labels: dict[str, str]
    value: float


class Family(msgspec.Struct, frozen=True, kw_only=True):
    """A metric, as Prometheus knows it (https://prometheus.io/docs/instrumenting/exposition_formats/).

    Attributes:
        name: what it is called.
        help: what it says.
        kind: ``counter``, ``gauge`` or ``histogram``.
        samples: its values.
    """

    name: str
    help: str
    kind: str
    samples: tuple[Sample, ...]


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """A service's own view of itself.

    Attributes:
        service: its bus name.
        pid: its process.
        uptime_s: seconds since it began to answer.
        gauges: what it counts, by name; each service documents its own.
        metrics: what it shows to Prometheus beside that; kata-monitor adds a label ``service``.
    """

    service: str
    pid: int
    uptime_s: float
    gauges: dict[str, float]
    metrics: tuple[Family, ...] = ()


HEALTH = Verb("health", Empty, Health)
