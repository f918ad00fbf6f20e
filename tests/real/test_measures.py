"""What a VM takes, by hypervisor: until its agent answers, for a disk to come and go, of memory. See README.md."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from common.services.vmm import BlockDriver
from common.testing.hotplug_stand import disk, running
from common.testing.isolation import in_event_loop
from common.testing.real_vmms import REAL

if TYPE_CHECKING:
    from common.processes import ProcessIdentity

_CYCLES = 11
_SECTIONS: dict[str, tuple[str, dict[str, object], BlockDriver]] = {
    "qemu": ("qemu", {}, BlockDriver.VIRTIO_BLK),
    **{name: (kind.hypervisor, {**kind.config, "path": kind.program}, kind.driver) for name, kind in REAL.items()},
}


@pytest.mark.parametrize(("hypervisor", "section", "driver"), _SECTIONS.values(), ids=_SECTIONS)
@in_event_loop
async def test_what_a_vm_takes(hypervisor: str, section: dict[str, object], driver: BlockDriver) -> None:
    async with running(hypervisor, section) as (vm, devices):
        boot_s, memory_mib = _age_s(vm.process), _pss_kib(vm.process.pid) / 1024
        spec, took = disk("a", driver), []
        for _ in range(_CYCLES):
            began = time.monotonic()
            await devices.detach(await devices.confirm(await devices.attach(spec=spec)))
            took.append(time.monotonic() - began)
        cycle_s = statistics.median(took)
        print(  # noqa: T201 - what it is for
            f"measured: {hypervisor} {vm.version} {vm.accelerator} {driver}: boot {boot_s:.2f} s, "
            f"cycle {cycle_s:.3f} s, {memory_mib:.0f} MiB; load {os.getloadavg()[0]:.1f}"
        )
        assert 0 < boot_s < _LONGEST_BOOT_S
        assert 0 < memory_mib < _MOST_MEMORY_MIB


_LONGEST_BOOT_S = 300
_MOST_MEMORY_MIB = 512
"""More than the guest has, and all that a VMM may take beside."""


def _age_s(process: ProcessIdentity) -> float:
    """Return for how long a process has been there."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - process.start_time / os.sysconf("SC_CLK_TCK")


def _pss_kib(pid: int) -> int:
    """Return a process's proportional share of memory (proc_pid_smaps_rollup(5))."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
