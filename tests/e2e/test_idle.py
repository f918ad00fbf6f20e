"""A container in which nothing happens costs nothing: nobody looks whether something has."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

from common.testing.containers import running

if TYPE_CHECKING:
    from common.testing.stack import Stack

_SECONDS = 10
_FEW = 5
"""System calls that strace(1) itself makes a process repeat when it comes and goes are among them."""


def system_calls(pid: int) -> int:
    """Return how many system calls a process and its threads make in a while."""
    watch = ["/usr/bin/timeout", "-s", "INT", str(_SECONDS), "/usr/bin/strace", "-c", "-f", "-p", str(pid)]
    said = subprocess.run(watch, capture_output=True, text=True, check=False).stderr
    assert f"Process {pid} attached" in said
    total = re.search(r"^100\.00 .* (\d+) .*total$", said, re.MULTILINE)
    return int(total[1].split()[0]) if total else 0


def test_an_idle_shim_sleeps(stack: Stack) -> None:
    with running(stack):
        (shim,) = stack.processes("containerd-shim-kata-v2")
        assert system_calls(shim.pid) < _FEW
