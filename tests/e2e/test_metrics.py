"""What Prometheus sees of a host with a container on it."""

from __future__ import annotations

import json
import urllib.request
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families

from common.services import device, vmm
from common.testing.containers import running

if TYPE_CHECKING:
    from common.testing.stack import Stack


def restart_monitor(stack: Stack) -> str:
    """Restart the monitor and return where it listens."""
    with stack.new_lines("monitor.log") as lines:
        stack.supervisorctl("restart", "monitor")
        records = (json.loads(line) for line in lines if line.startswith("{"))
        return next(str(record["address"]) for record in records if record["event"] == "listening")


def scrape(address: str) -> dict[tuple[str, str], float]:
    """Return samples by name and owner."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples]
    return {(s.name, s.labels.get("service") or s.labels.get("sandbox_id") or ""): s.value for s in samples}


def test_every_process_of_a_container_is_measured(stack: Stack) -> None:
    address = restart_monitor(stack)
    with running(stack) as name:
        seen = scrape(address)
        assert seen["kata_monitor_running_shim_count", ""] == 1
        assert seen["kata_sandbox_info", name] == 1
        for service in (vmm.service_name("qemu"), device.SERVICE):
            assert seen["kata_service_up", service] == 1
            assert seen["kata_service_resident_memory_bytes", service] > 1 << 20
        for role in ("shim", "hypervisor", "virtiofsd"):
            assert seen[f"kata_{role}_resident_memory_bytes", name] > 1 << 20
            assert seen[f"kata_{role}_threads", name] >= 1
    seen = scrape(address)
    assert seen["kata_monitor_running_shim_count", ""] == 0
    assert ("kata_sandbox_info", name) not in seen
