"""What a VM takes, by hypervisor: until its agent answers, for a disk to come and go, of memory. See README.md."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest

from common.testing.hotplug_stand import plugging_into
from common.testing.isolation import in_event_loop
from common.testing.real_vmms import REAL, Real

_CYCLES = 11


@pytest.mark.parametrize("kind", REAL.values(), ids=REAL)
@in_event_loop
async def test_what_a_vm_takes(kind: type[Real]) -> None:
    async with plugging_into(kind) as stand:
        memory_mib = _pss_kib(stand.vm.process.pid) / 1024
        spec, took = stand.disk("a"), []
        for _ in range(_CYCLES):
            began = time.monotonic()
            await stand.devices.detach(await stand.devices.confirm(await stand.devices.attach(spec=spec)))
            took.append(time.monotonic() - began)
        boot_s, cycle_s = stand.vmm.boot_s, statistics.median(took)
        print(  # noqa: T201 - what it is for
            f"measured: {kind.__name__} {stand.vm.version}: boot {boot_s:.2f} s, cycle {cycle_s:.3f} s, "
            f"{memory_mib:.0f} MiB"
        )
        assert 0 < boot_s < _LONGEST_BOOT_S
        assert 0 < memory_mib < _MOST_MEMORY_MIB


_LONGEST_BOOT_S = 300
_MOST_MEMORY_MIB = 512
"""More than the guest has, and all that a VMM may take beside."""


def _pss_kib(pid: int) -> int:
    """Return a process's proportional share of memory (proc_pid_smaps_rollup(5))."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
