"""The monitor as a process: what a scrape shows, with services and without."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families

from common.services import device

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


pytestmark = pytest.mark.usefixtures("run_dir")


@contextmanager
def monitor() -> Iterator[str]:
    """A running monitor; yields its URL, which it logs itself."""
    command = [sys.executable, "-m", "procs.monitor", "--listen-address", "127.0.0.1:0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            listening = json.loads(process.stdout.readline())
            yield f"http://127.0.0.1:{listening['address'].rsplit(':', 1)[1]}"
        finally:
            process.terminate()
            assert process.wait(30) == 0


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=30) as answer:  # noqa: S310 - our own, on the loopback
        return str(answer.read().decode())


def samples(text: str) -> dict[tuple[str, str], float]:
    """Return the samples by name and service (or nothing)."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name, sample.labels.get("service", "")] = sample.value
    return found


def test_services_that_are_down_do_not_fail_a_scrape(run_dir: Path) -> None:
    (run_dir / "bus").mkdir()
    (run_dir / "bus/vmm.qemu.lock").touch()
    with monitor() as url:
        seen = samples(get(f"{url}/metrics"))
        assert seen["kata_service_up", "vmm.qemu"] == 0
        assert seen["kata_service_up", device.SERVICE] == 0
        assert ("kata_service_up", "vmm.clh") not in seen, "this host has no such manager"
        assert seen["kata_monitor_running_shim_count", ""] == 0
        assert samples(get(f"{url}/metrics"))["kata_monitor_scrape_count", ""] == 1, "those before it"


def test_a_service_that_is_up_shows_its_health_and_its_process() -> None:
    with (
        monitor() as url,
        subprocess.Popen([sys.executable, "-m", "procs.device_manager"], stdout=subprocess.DEVNULL) as service,
    ):
        try:
            seen: dict[tuple[str, str], float] = {}
            while not seen.get(("kata_service_up", device.SERVICE)):  # it starts meanwhile
                seen = samples(get(f"{url}/metrics"))
            assert seen["kata_service_resident_memory_bytes", device.SERVICE] > 1 << 20
            assert seen["kata_service_cpu_seconds_total", device.SERVICE] > 0
            assert seen["kata_service_fds", device.SERVICE] > 3
            assert seen["kata_device_queue_length", device.SERVICE] == 0, "what it shows of itself"
        finally:
            service.terminate()


def test_sandboxes_are_listed_by_their_shims(run_dir: Path) -> None:
    with monitor() as url:
        for name in ("b", "a"):
            (run_dir / "sandboxes" / name).mkdir(parents=True)
            (run_dir / "sandboxes" / name / "shim.json").write_text('{"pid": 1}')
        assert get(f"{url}/sandboxes") == "a\nb\n"
        assert samples(get(f"{url}/metrics"))["kata_monitor_running_shim_count", ""] == 2


def test_other_pages_say_what_there_is() -> None:
    with monitor() as url:
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(f"{url}/nothing")
        with refused.value as answer:
            assert answer.code == 404
            assert b"/metrics and /sandboxes" in answer.read()


def test_an_address_that_cannot_be_had_is_a_message_not_a_traceback() -> None:
    command = [sys.executable, "-m", "procs.monitor", "--listen-address", "192.0.2.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode != 0
    assert "kata-monitor: cannot listen on 192.0.2.1:1" in done.stderr
    assert "Traceback" not in done.stderr
