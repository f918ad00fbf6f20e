"""The monitor's HTTP end: ``/metrics`` for Prometheus, ``/sandboxes`` for people and scripts.

Requests run in threads of the WSGI server; an observation runs in the event loop that owns the bus. Scrapes that come
together share nothing and wait for nobody.
"""

from __future__ import annotations

import asyncio
import time
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import structlog
from prometheus_client import CollectorRegistry, Gauge, Histogram, make_wsgi_app
from prometheus_client.registry import Collector

from procs.monitor.collector import families

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from prometheus_client.core import Metric

    from procs.monitor.observation import Observation

log = structlog.get_logger()

_OBSERVATION_TIMEOUT_S = 5.0


class SandboxCollector(Collector):
    """Observes at each scrape and keeps account of the scrapes themselves."""

    def __init__(self, observe: Callable[[], Observation], registry: CollectorRegistry) -> None:
        self._observe = observe
        # Counters by meaning; the client library would add "_total" to a Counter's name, and upstream's has none.
        self._scrapes = Gauge("kata_monitor_scrape_count", "Scrapes.", registry=registry)
        self._failures = Gauge("kata_monitor_scrape_failed_count", "Scrapes that failed.", registry=registry)
        self._durations = Histogram(
            "kata_monitor_scrape_durations_histogram_milliseconds",
            "Time to gather the metrics of all sandboxes.",
            buckets=[2**n for n in range(10)],
            registry=registry,
        )

    def describe(self) -> Iterable[Metric]:
        """Say nothing beforehand, so that registration does not observe."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Observe now; yield what was seen."""
        self._scrapes.inc()
        began = time.monotonic()
        try:
            seen = self._observe()
        except BaseException:
            self._failures.inc()
            raise
        self._durations.observe((time.monotonic() - began) * 1000)
        yield from families(seen)


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        log.debug("http request", client=self.client_address[0], request=format % args)


class _Server(ThreadingMixIn, WSGIServer):
    """One thread a request; a stuck client is left behind at the end."""

    daemon_threads = True
    timeout: float | None = 0
    """``handle_request`` is called when there is one, and waits for none."""


def serve(address: str, observe: Callable[[], Awaitable[Observation]], loop: asyncio.AbstractEventLoop) -> WSGIServer:
    """Bind ``host:port`` (port 0 = any) and return the server.

    Its ``handle_request`` is to be called whenever its socket is readable: ``serve_forever`` would look twice a second
    whether it is to end.

    Raises:
        OSError: the address cannot be bound.
    """

    def observe_in_loop() -> Observation:
        async def bounded() -> Observation:
            return await asyncio.wait_for(observe(), _OBSERVATION_TIMEOUT_S)

        return asyncio.run_coroutine_threadsafe(bounded(), loop).result()

    registry = CollectorRegistry()
    registry.register(SandboxCollector(observe_in_loop, registry))
    host, _, port = address.rpartition(":")
    return make_server(host, int(port), _application(make_wsgi_app(registry), observe_in_loop), _Server, _Handler)


def _application(metrics: WSGIApplication, observe: Callable[[], Observation]) -> WSGIApplication:
    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "/")
        if path == "/metrics":
            return metrics(environ, start_response)
        if path == "/sandboxes":
            start_response("200 OK", [("Content-Type", "text/plain; charset=utf-8")])
            return [f"{sandbox}\n".encode() for sandbox in sorted(observe().shims)]
        start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
        return [b"kata-monitor serves /metrics and /sandboxes\n"]

    return answer
