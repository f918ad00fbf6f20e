"""Where a bare boot's time goes: the phases from QEMU's start until the agent answers."""

from __future__ import annotations

import json
import time

from bench.peers import wait_greeted, wait_healthy
from bench.vm import bare_vm
from guest.image.cpio import Archive
from procs.vmm_manager.drivers.qemu.channel import AGENT_SOCKET


def boot_phases(accelerator: str) -> dict[str, float]:
    """Boot a guest that tells how far it is; return the seconds of each phase, in order.

    The host's clock sees the first two and the last phase, the guest's the others. What lies between QEMU's greeting
    and the first count of the guest's clock is the firmware; it is what remains.
    """
    archive = Archive()
    archive.add_directory("/bench/dev")
    began = time.monotonic()
    with bare_vm(accelerator, script="guest_phases", archive=archive) as vm, vm.connect(AGENT_SOCKET) as agent:
        qemu = time.monotonic()
        wait_greeted(agent)
        greeted = time.monotonic()
        wait_healthy(agent)
        healthy = time.monotonic()
        at = _marks(vm.console())
    return {
        "QEMU": qemu - began,
        "firmware": greeted - qemu - at["up"],
        "kernel before the initrd": at["initrd"],
        "kernel while it unpacks the initrd": at["unpacked"] - at["initrd"],
        "kernel after the initrd": at["kernel"] - at["unpacked"],
        "Python": at["python"] - at["kernel"],
        "agent: imports": at["agent"] - at["python"],
        "agent: modules, mounts, port": at["up"] - at["agent"] - at["reading"],
        "agent: first answer": healthy - greeted,
    }


def _marks(console: str) -> dict[str, float]:
    """Return the times that the guest printed: those of the script, and the agent's own."""
    marks: dict[str, float] = {}
    for line in console.splitlines():
        words = line.split()
        if words[:1] == ["bench"]:
            marks[words[1]] = float(words[2])
        elif '"agent is up"' in line:
            marks["up"] = float(json.loads(line)["t"])
    return marks
